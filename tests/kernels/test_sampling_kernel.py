"""The draw: its torch reference against rules computed by other means, and its Triton kernel
compiled for each architecture.

tests/kernels/interpreted/test_sampling.py runs the Triton kernel against the reference.
"""

import inspect

import pytest
import torch
from compiled import launches_of, machine_code
from sampling_cases import (
    TOKENS,
    chi_square_p_value,
    filtered_probabilities,
    mixed_case,
    plain_case,
    scaled_logits,
    tied_logits,
)
from triton.compiler import CompiledKernel

from autoregressive.models.generate import filter_logits
from kernels import sampling, sampling_reference
from kernels.sampling_reference import draw_tokens, gumbel, gumbel_noise, kept_tokens, philox4x32

PER_IMAGE = {
    "conditional_rows",
    "unconditional_rows",
    "guidance_scales",
    "temperatures",
    "top_ks",
    "top_ps",
    "seeds",
    "image_indices",
}


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Fails if the generator is not philox4x32-10; the vectors are Random123's (kat_vectors)."""
    tensors = [torch.tensor([word]) for word in (*counter, *key)]
    words = philox4x32((tensors[0], tensors[1], tensors[2], tensors[3]), (tensors[4], tensors[5]))
    assert tuple(int(word) for word in words) == expected


def test_noise_is_finite_and_exact_at_both_ends() -> None:
    """Fails if u rounds to 0 or 1: the largest and the smallest word have finite noise, and the
    right one.
    """
    ends = gumbel(torch.tensor([0, 2**32 - 1]))
    assert torch.allclose(ends, torch.tensor([-2.8524, 17.3287]), atol=1e-4)


def test_noise_is_keyed_by_seed_image_and_step_alone() -> None:
    """Fails if two draws of different keys share noise, the upper half of the seed is ignored, or
    the noise of a token moves.
    """
    seeds = torch.tensor([1, 2, 1 + 2**32, 1, 1, -1])
    image_indices, positions = torch.tensor([0, 0, 0, 1, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 0])
    noise = gumbel_noise(seeds, image_indices, positions, 1000)
    assert len({tuple(row) for row in noise.tolist()}) == len(seeds)
    assert torch.equal(
        gumbel_noise(seeds[3:4], image_indices[3:4], positions[3:4], 70)[0], noise[3, :70]
    )
    counter = (torch.tensor(250 // 4), torch.tensor(0), torch.tensor(1), torch.tensor(0))
    words = philox4x32(counter, (torch.tensor(1), torch.tensor(0)))
    assert noise[3, 250] == gumbel(words[250 % 4])


@pytest.mark.parametrize("seed", range(4))
def test_filters_agree_with_the_naive_loops(seed: int) -> None:
    """Fails if top-k with ties, or top-p, keeps other tokens than `filter_logits` (which ranks ties
    in no stated order).
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 200, generator=generator) * 2
    for top_k, top_p in (
        (0, 1.0),
        (1, 1.0),
        (17, 1.0),
        (200, 1.0),
        (500, 1.0),
        (0, 0.5),
        (0, 0.0),
        (30, 0.8),
        (3, 0.95),
    ):
        rounded = (logits * 4).round() / 4 if top_p == 1 else logits
        kept = kept_tokens(rounded, torch.full((6,), top_k), torch.full((6,), top_p))
        assert torch.equal(kept, filter_logits(rounded, top_k, top_p).isfinite()), (top_k, top_p)


def test_ties_at_the_kth_logit_are_all_kept() -> None:
    """Fails if top-k cuts through equal logits, or counts equal ones as larger."""
    scaled = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, -1.0, 2.0]]).expand(5, -1)
    kept = kept_tokens(scaled, torch.tensor([1, 2, 3, 5, 6]), torch.ones(5))
    assert kept.sum(dim=1).tolist() == [2, 2, 5, 5, 6]


def test_top_p_at_its_edges() -> None:
    """Fails if the token that crosses p is dropped, one after it kept, ties are not ranked by id,
    or p = 0 keeps nothing.
    """
    scaled = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(5, -1)
    kept = kept_tokens(
        scaled, torch.zeros(5, dtype=torch.int32), torch.tensor([0.0, 0.49, 0.5, 0.74, 0.76])
    )
    assert kept.int().tolist() == [[0, 1, 0], [0, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]
    flat = kept_tokens(torch.zeros(3, 8), torch.tensor([0, 2, 0]), torch.tensor([0.0, 0.3, 1.0]))
    assert flat.int().tolist() == [[1] + 7 * [0], [1, 1, 1] + 5 * [0], 8 * [1]]


def test_top_p_counts_the_mass_of_what_top_k_kept() -> None:
    """Fails if the softmax of top-p is over all tokens: of the two kept here the first has 2/3 of
    their mass, 0.4 of all.
    """
    scaled = torch.tensor([[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]]).log().expand(2, -1)
    kept = kept_tokens(scaled, torch.tensor([2, 0]), torch.tensor([0.5, 0.5]))
    assert kept.sum(dim=1).tolist() == [1, 2]


def test_draws_are_the_largest_perturbed_kept_token() -> None:
    """Fails if any mixture of guidance, filters and temperatures draws something else than computed
    here image by image.
    """
    case = mixed_case(60, 120, seed=3)
    result = case.drawn_by(draw_tokens)
    scaled = scaled_logits(case)
    for image, token in enumerate(result.tokens(case).tolist()):
        one = slice(image, image + 1)
        step = case.positions[case.conditional_rows[image]][None]
        noise = gumbel_noise(case.seeds[one], case.image_indices[one], step, 120)[0]
        if case.temperatures[image] == 0:
            expected = max(
                range(120), key=lambda candidate: (float(scaled[image, candidate]), -candidate)
            )
        else:
            kept = kept_tokens(scaled[one], case.top_ks[one], case.top_ps[one])[0]
            expected = int((scaled[image] + noise).masked_fill(~kept, -torch.inf).argmax())
        assert token == expected, image


def test_guidance_mixes_the_pair_of_rows() -> None:
    """Fails if conditional and unconditional rows are swapped, the scale is misapplied, or an
    unguided image is guided.
    """
    case = plain_case(torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0]]), temperatures=torch.zeros(2))
    one = case.copy(
        conditional_rows=torch.tensor([0, -1], dtype=torch.int32),
        unconditional_rows=torch.tensor([1, -1], dtype=torch.int32),
    )
    scales = {1.0: 1, 4.0: 0, 0.0: 1}  # guided logits: [1, 2, 0], [4, -1, 0], [0, 3, 0]
    for scale, token in scales.items():
        result = one.copy(guidance_scales=torch.full((2,), scale)).drawn_by(draw_tokens)
        assert result.codes[0, 0] == token, scale
        assert result.positions.tolist() == [1, 2]
    assert case.copy(guidance_scales=torch.full((2,), 4.0)).drawn_by(draw_tokens).tokens(
        case
    ).tolist() == [1, 1]


def test_greedy_takes_the_lowest_of_equal_ids_whatever_the_filter() -> None:
    """Fails if temperature 0 draws, or breaks ties upwards."""
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).clamp(max=0.5)
    case = plain_case(
        logits,
        temperatures=torch.zeros(40),
        top_ks=torch.arange(40) % 4,
        top_ps=torch.arange(40) / 40,
    )
    assert (
        case.drawn_by(draw_tokens).tokens(case).tolist()
        == (logits >= 0.5).int().argmax(dim=1).tolist()
    )


def test_broken_logits_fail_their_image_alone() -> None:
    """Fails if NaN, +inf or all -inf is not marked and answered by token 0, or if it reaches
    another image; -inf alone may be.
    """
    clean = plain_case(torch.randn(8, 30, generator=torch.Generator().manual_seed(4)))
    damaged = clean.copy()
    damaged.logits[1, 29], damaged.logits[3, 0], damaged.logits[5] = (
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    damaged.logits[6, damaged.logits[6].argmin()] = -torch.inf
    result, expected = damaged.drawn_by(draw_tokens), clean.drawn_by(draw_tokens)
    assert result.failed.tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    broken = result.failed.bool()
    assert (result.tokens(damaged)[broken] == 0).all()
    assert torch.equal(result.codes[~broken], expected.codes[~broken])
    assert torch.equal(result.positions, expected.positions)
    again = damaged.copy(failed=result.failed, positions=result.positions).drawn_by(draw_tokens)
    assert again.failed.tolist() == result.failed.tolist()


def test_absent_images_read_and_write_nothing() -> None:
    """Fails if padding images, rows of no image or positions out of range are drawn for, moved, or
    spoil another's cell.
    """
    case = mixed_case(12, 40, seed=9)
    result = case.drawn_by(draw_tokens)
    padded = case.copy()
    padded.conditional_rows[7], padded.image_slots[7] = -1, padded.image_slots[2]
    left = padded.drawn_by(draw_tokens)
    assert not left.failed.any()
    others = torch.arange(12) != 7
    assert torch.equal(left.tokens(case)[others], result.tokens(case)[others])
    assert (left.codes != padded.codes).sum() == 11
    gone = [int(case.conditional_rows[7]), int(case.unconditional_rows[7])]
    moved = torch.zeros(len(case.positions), dtype=torch.int32)
    for row in (*case.conditional_rows.tolist(), *case.unconditional_rows.tolist()):
        moved[row] += int(row >= 0 and row not in gone)
    assert torch.equal(left.positions - case.positions, moved)
    outside = case.copy()
    (
        outside.positions[outside.conditional_rows[0]],
        outside.positions[outside.conditional_rows[1]],
    ) = -1, TOKENS
    assert (outside.drawn_by(draw_tokens).codes != case.codes).sum() == 10


def test_an_image_draws_the_same_wherever_it_stands() -> None:
    """Fails if a token depends on the image's place in the batch, its rows, its slot, or its
    neighbours.
    """
    case = mixed_case(24, 64, seed=12)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    per_image = {name: tensor[order] for name, tensor in vars(case).items() if name in PER_IMAGE}
    moved = case.copy(**per_image)
    assert torch.equal(
        moved.drawn_by(draw_tokens).tokens(moved), case.drawn_by(draw_tokens).tokens(case)[order]
    )


def test_draws_follow_the_filtered_probabilities() -> None:
    """Fails if the draw is biased: chi-square of 100,000 draws of 16,384 tokens with ties,
    unfiltered and filtered.

    The same noise serves every filter; that `draw_tokens` is this argmax is tested above.
    """
    vocab_size, draws, together = 16384, 100_000, 10  # few at a time stay in the processor's cache
    logits = tied_logits(vocab_size, seed=0)
    filters = ((0, 1.0), (4000, 0.9))
    kept = kept_tokens(
        logits.expand(2, -1),
        torch.tensor([k for k, _ in filters]),
        torch.tensor([p for _, p in filters]),
    )
    masked = torch.where(kept, logits, -torch.inf)
    counts = torch.zeros(2, vocab_size, dtype=torch.int64)
    for start in range(0, draws, together):
        images = torch.arange(start, start + together)
        noise = gumbel_noise(images // 1000, images % 10, images % 1000 // 10, vocab_size)
        for index in range(2):
            counts[index] += (noise + masked[index]).argmax(dim=-1).bincount(minlength=vocab_size)
    assert counts.sum(dim=1).tolist() == [draws] * 2
    p_values = [
        chi_square_p_value(counts[index], filtered_probabilities(logits, top_k, top_p), bins=500)
        for index, (top_k, top_p) in enumerate(filters)
    ]
    assert min(p_values) > 0.001, p_values


def test_both_draws_take_the_same_arguments() -> None:
    """Fails if the kernel and its reference cannot stand in for each other: the kernel only adds
    arguments with defaults.
    """
    reference = inspect.signature(sampling_reference.draw_tokens).parameters
    kernel = inspect.signature(sampling.draw_tokens).parameters
    assert list(kernel)[: len(reference)] == list(reference)
    assert all(
        kernel[name].default is not inspect.Parameter.empty
        for name in list(kernel)[len(reference) :]
    )


def compiled(capability: int, early_positions: bool, vocab_size: int = 16384) -> CompiledKernel:
    """The kernel as the launcher would compile it, without a GPU."""
    with launches_of(capability) as builds:
        case = plain_case(torch.zeros(2, vocab_size))
        case.drawn_by(sampling.draw_tokens, early_positions=early_positions)
    (build,) = builds
    return build.compiled(capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("vocab_size", [1000, 16384])
def test_the_kernel_compiles(capability: int, vocab_size: int) -> None:
    """Fails if an architecture refuses the kernel, also for a codebook that is no power of two, or
    has no dependent launch.
    """
    ptx = compiled(capability, early_positions=False, vocab_size=vocab_size).asm["ptx"]
    assert ("griddepcontrol" in ptx) == (capability >= 90)


def test_what_is_read_before_the_wait() -> None:
    """Fails if the kernel reads anything another may be writing before the dependent-launch wait,
    or the noise is made too late.

    Early positions: the noise (all its logarithms) is made before the wait, no logits are read.
    Else nothing is read at all.
    """
    late, early = (machine_code(compiled(90, early_positions)) for early_positions in (False, True))
    before, after = late[: late.index("ACQBULK")], late[late.index("ACQBULK") :]
    assert not any(name.startswith("LDG") for name in before)
    assert any(name.startswith("LDG.E.128") for name in after)
    before, after = early[: early.index("ACQBULK")], early[early.index("ACQBULK") :]
    assert sum(name.startswith("LDG") for name in before) == 5
    assert not any(name.startswith("LDG.E.128") for name in before)
    assert "MUFU.LG2" in before
    assert "MUFU.LG2" not in after


def test_the_vocabulary_stays_in_registers() -> None:
    """Fails if the default tile no longer fits into the registers of sm_90 and spills
    into memory.
    """
    assert not [
        name
        for name in machine_code(compiled(90, early_positions=False))
        if name.startswith(("LDL", "STL"))
    ]
