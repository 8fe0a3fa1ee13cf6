"""The draw's Triton kernel, statement by statement, against its torch reference; small
vocabularies, since it is interpreted.
"""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from sampling_cases import assert_same_draws, mixed_case, plain_case

from kernels import sampling, sampling_reference


@triton.jit
def _philox_kernel(
    words_pointer: Any, seed_pointer: Any, position: Any, image_index: Any, BLOCK: tl.constexpr
) -> None:
    quads = tl.arange(0, BLOCK)
    words = tl.philox(tl.load(seed_pointer), quads, position, image_index, 0)
    for word in tl.static_range(4):
        tl.store(words_pointer + quads * 4 + word, words[word].to(tl.int64))


@triton.jit
def _gumbel_kernel(words_pointer: Any, noise_pointer: Any, BLOCK: tl.constexpr) -> None:
    offsets = tl.arange(0, BLOCK)
    words = tl.load(words_pointer + offsets).to(tl.uint32)
    tl.store(noise_pointer + offsets, sampling._gumbel(words, FAST=False))


@pytest.mark.parametrize("seed", [0, 5, -1, 0x1234_5678_9ABC_DEF0])
def test_random_words_equal_the_references(seed: int) -> None:
    """Fails if one bit of Philox, or the order of key and counter words, differs from the
    reference.
    """
    words = torch.zeros(32, 4, dtype=torch.int64)
    _philox_kernel[(1,)](words, torch.tensor([seed]), 575, 9, BLOCK=32)
    counter = (torch.arange(32), torch.tensor(575), torch.tensor(9), torch.tensor(0))
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor((seed >> 32) & 0xFFFFFFFF))
    assert torch.equal(words, torch.stack(sampling_reference.philox4x32(counter, key), dim=-1))


def test_noise_equals_the_references() -> None:
    """Fails if the series near u = 1 or the logarithm elsewhere leaves its tolerance; both ends of
    u and the seam included.
    """
    ends = (
        torch.cat(
            [torch.arange(64), 2**24 - 1 - torch.arange(64), 7 * 2**21 - 32 + torch.arange(64)]
        )
        << 8
    )
    words = torch.cat(
        [
            ends,
            torch.randint(2**32, (4096 - len(ends),), generator=torch.Generator().manual_seed(0)),
        ]
    )
    noise = torch.zeros(len(words))
    _gumbel_kernel[(1,)](words, noise, BLOCK=len(words))
    assert torch.allclose(noise, sampling_reference.gumbel(words), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("images", "vocab_size"), [(40, 64), (30, 100), (20, 1024), (5, 6)])
def test_draws_equal_the_references(images: int, vocab_size: int) -> None:
    """Fails if any mixture of guidance, temperature, top-k and top-p draws, marks or moves
    otherwise than the reference.
    """
    case = mixed_case(images, vocab_size, seed=vocab_size)
    result = case.drawn_by(sampling.draw_tokens)
    assert_same_draws(case, result, case.drawn_by(sampling_reference.draw_tokens))
    assert result.failed.sum() == 0


def test_a_top_k_beyond_the_vocabulary_keeps_all() -> None:
    """Fails if more than there are, as far as int32 goes, draws otherwise than top-k 0, alone or
    with top-p.
    """
    logits = torch.randn(24, 100, generator=torch.Generator().manual_seed(4))
    top_ps = torch.tensor([1.0, 0.8]).repeat(12)
    case = plain_case(logits, top_ps=top_ps)
    expected = case.drawn_by(sampling.draw_tokens).tokens(case)
    for top_k in (100, 101, 2**31 - 1):
        larger = plain_case(
            logits, top_ks=torch.full((24,), top_k, dtype=torch.int32), top_ps=top_ps
        )
        for draw_tokens in (sampling.draw_tokens, sampling_reference.draw_tokens):
            assert torch.equal(larger.drawn_by(draw_tokens).tokens(larger), expected), top_k


def test_damage_and_absence_are_handled_as_in_the_reference() -> None:
    """Fails if NaN, infinities, padding images or positions out of range are treated otherwise than
    in the reference.
    """
    logits = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    logits[0, 5], logits[1, 7], logits[2], logits[3, 1:] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    case = plain_case(
        logits,
        top_ks=torch.tensor([0, 5, 0, 5, 0, 5, 5, 5, 0]),
        top_ps=torch.tensor([1.0, 0.5, 0.5] * 3),
    )
    case.conditional_rows[4] = -1
    case.positions[5], case.positions[6] = -1, case.codes.shape[1]
    result, expected = (
        case.drawn_by(sampling.draw_tokens),
        case.drawn_by(sampling_reference.draw_tokens),
    )
    for name in ("codes", "failed", "positions"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert result.failed.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_only_the_images_in_use_are_drawn() -> None:
    """Fails if entries beyond `images` are read as images, or a call with none launches
    anything.
    """
    case = plain_case(torch.randn(4, 64, generator=torch.Generator().manual_seed(2)))
    result = case.drawn_by(sampling.draw_tokens, images=2)
    assert (result.codes >= 0).sum(dim=1).tolist() == [1, 1, 0, 0]
    assert torch.equal(case.drawn_by(sampling.draw_tokens, images=0).codes, case.codes)


def test_what_the_kernel_cannot_take_is_refused() -> None:
    """Fails if a vocabulary or memory layout beyond the kernel would be read wrongly instead of
    refused.
    """
    case = plain_case(torch.zeros(2, 64))
    with pytest.raises(ValueError, match="contiguous"):
        sampling.draw_tokens(**{**vars(case), "logits": torch.zeros(64, 2).T}, images=2)
    with pytest.raises(ValueError, match="65536"):
        sampling.draw_tokens(**{**vars(case), "logits": torch.zeros(1, 65537)}, images=1)
