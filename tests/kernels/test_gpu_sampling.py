"""The draw's Triton kernel on a GPU: against its torch reference at full size, its distribution,
and inside a CUDA graph.
"""

from collections.abc import Callable

import pytest
import torch
from sampling_cases import (
    assert_same_draws,
    chi_square_p_value,
    filtered_probabilities,
    mixed_case,
    plain_case,
    tied_logits,
)
from window_cases import accept_case

from kernels import sampling, sampling_reference
from kernels.lookahead import accept, accept_reference

pytestmark = pytest.mark.gpu

VOCAB = 16384


@pytest.mark.parametrize("vocab_size", [VOCAB, 16000, 1000, 1024, 64, 5])
def test_draws_equal_the_references(vocab_size: int) -> None:
    """Fails if any mixture of guidance, temperature and filters draws otherwise than the reference,
    rounding aside.
    """
    case = mixed_case(256, vocab_size, seed=vocab_size)
    expected = case.drawn_by(sampling_reference.draw_tokens)
    result = case.copy("cuda").drawn_by(sampling.draw_tokens).copy("cpu")
    assert assert_same_draws(case, result, expected) <= 2
    assert not result.failed.any()


def test_the_reference_draws_the_same_on_both_devices() -> None:
    """Fails if the reference depends on the device beyond rounding: it is what older GPUs run."""
    case = mixed_case(64, VOCAB, seed=1)
    result = case.copy("cuda").drawn_by(sampling_reference.draw_tokens).copy("cpu")
    assert assert_same_draws(case, result, case.drawn_by(sampling_reference.draw_tokens)) <= 1


@pytest.mark.parametrize("early_positions", [False, True])
def test_both_ways_of_waiting_draw_the_same(early_positions: bool) -> None:
    """Fails if making the noise before the wait changes it."""
    case = mixed_case(64, VOCAB, seed=2).copy("cuda")
    result = case.drawn_by(sampling.draw_tokens, early_positions=early_positions)
    for num_warps in (8, 32):
        other = case.drawn_by(sampling.draw_tokens, num_warps=num_warps)
        assert torch.equal(result.codes, other.codes)
        assert torch.equal(result.positions, other.positions)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2000, 1.0), (0, 0.9), (4000, 0.9)])
@pytest.mark.parametrize(
    "draw", [sampling.draw_tokens, sampling_reference.draw_tokens], ids=["triton", "torch"]
)
def test_draws_follow_the_filtered_probabilities(
    draw: Callable[..., None], top_k: int, top_p: float
) -> None:
    """Fails if the draw is biased: chi-square of 102,400 draws of 16,384 tokens with ties."""
    logits = tied_logits(VOCAB, seed=0)
    images, calls = 512, 200
    case = plain_case(
        logits.expand(images, -1).contiguous(),
        positions=torch.zeros(images, dtype=torch.int32),
        top_ks=torch.full((images,), top_k, dtype=torch.int32),
        top_ps=torch.full((images,), top_p),
    ).copy("cuda")
    counts = torch.zeros(VOCAB, dtype=torch.int64, device="cuda")
    for call in range(calls):
        case.seeds.fill_(call // 5)
        case.positions.fill_(call % 5)
        draw(**vars(case), images=images)
        counts += case.codes[:, call % 5].long().bincount(minlength=VOCAB)
    assert not case.failed.any()
    p_value = chi_square_p_value(
        counts.cpu(), filtered_probabilities(logits, top_k, top_p), bins=500
    )
    assert p_value > 0.001


def test_broken_logits_fail_their_image_alone() -> None:
    """Fails if NaN, +inf or all -inf is not marked and answered by token 0, hangs the search, or
    reaches another image.
    """
    clean = mixed_case(32, VOCAB, seed=3)
    clean.unconditional_rows.fill_(-1)
    damaged = clean.copy()
    for image, value in ((4, torch.nan), (9, torch.inf), (20, -torch.inf)):
        damaged.logits[damaged.conditional_rows[image].long()] = value
    result = damaged.copy("cuda").drawn_by(sampling.draw_tokens).copy("cpu")
    expected = clean.copy("cuda").drawn_by(sampling.draw_tokens).copy("cpu")
    failed = result.failed[damaged.image_slots.long()].bool()
    assert failed.nonzero()[:, 0].tolist() == [4, 9, 20]
    assert (result.tokens(damaged)[failed] == 0).all()
    assert torch.equal(result.tokens(damaged)[~failed], expected.tokens(clean)[~failed])


def test_the_draw_replays_in_a_graph() -> None:
    """Fails if the launch synchronises (capture refuses that), or a replay does not take the next
    step's position and noise.
    """
    images, steps = 8, 5
    case = plain_case(
        torch.randn(images, VOCAB, generator=torch.Generator().manual_seed(5)),
        positions=torch.zeros(images, dtype=torch.int32),
    )
    expected = case.copy()
    for _ in range(steps):
        sampling_reference.draw_tokens(**vars(expected), images=images)
    ours = case.copy("cuda")
    ours.copy("cuda").drawn_by(sampling.draw_tokens)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampling.draw_tokens(**vars(ours), images=images)
    for _ in range(steps):
        graph.replay()
    assert torch.equal(ours.codes.cpu(), expected.codes)
    assert torch.equal(ours.positions.cpu(), expected.positions)


@pytest.mark.parametrize("window", [2, 4, 9])
def test_each_token_of_a_window_is_drawn_as_alone(window: int) -> None:
    """Fails if a token takes another position's logits or noise, or guidance ends elsewhere."""
    case = mixed_case(32, VOCAB, seed=window, window=window).copy("cuda")
    together = case.drawn_by(sampling.draw_tokens).codes
    compared = 0
    for index in range(window):
        alone = case.at(index).drawn_by(sampling.draw_tokens).codes
        drawn = alone != case.codes
        assert torch.equal(together[drawn], alone[drawn]), index
        compared += int(drawn.sum())
    assert compared > 40


@pytest.mark.parametrize("window", [2, 4, 16, 64])
def test_accept_equals_the_reference(window: int) -> None:
    """Fails if anything is kept, counted or guessed otherwise than in torch."""
    case = accept_case(300, window, seed=window)
    got, expected = case.tensors("cuda"), case.tensors()
    accept(**got, images=300, window=window, launch_pdl=False)
    accept_reference(**expected, images=300, window=window)
    for name, values in expected.items():
        assert torch.equal(got[name].cpu(), values), name
