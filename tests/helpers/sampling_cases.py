"""Batches that the draw's tests share, and how two draws are compared."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kernels import sampling_reference

TOKENS = 7
CLOSE = 1e-5


@dataclass(frozen=True)
class DrawArguments:
    """The arguments of `draw_tokens` by name."""

    logits: Tensor
    positions: Tensor
    limits: Tensor
    conditional_rows: Tensor
    unconditional_rows: Tensor
    guided_steps: Tensor
    image_slots: Tensor
    guidance_scales: Tensor
    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    seeds: Tensor
    image_indices: Tensor
    codes: Tensor
    lengths: Tensor
    failed: Tensor
    drafted: Tensor
    accepted: Tensor
    verdicts: Tensor

    def copy(self, device: str | torch.device = "cpu", **changes: Tensor) -> "DrawArguments":
        """A copy of every tensor on a device."""
        changed = replace(self, **changes)
        return DrawArguments(
            **{
                field.name: getattr(changed, field.name).to(device, copy=True)
                for field in fields(changed)
            }
        )

    def drawn_by(
        self, draw: Callable[..., None], images: int | None = None, **options: object
    ) -> "DrawArguments":
        """What one call of `draw` leaves behind; these arguments stay as they are."""
        result = self.copy(self.logits.device)
        tensors = {field.name: getattr(result, field.name) for field in fields(result)}
        draw(**tensors, images=len(self.conditional_rows) if images is None else images, **options)
        return result

    @property
    def window(self) -> int:
        """Tokens that are drawn for each image."""
        return len(self.logits) // len(self.positions)

    def at(self, index: int) -> "DrawArguments":
        """The same, but of each image's window only the one token of this index, drawn alone."""
        return replace(
            self,
            logits=self.logits[index :: self.window].clone(),
            positions=torch.where(self.positions < 0, -1, self.positions + index).int(),
        )

    def tokens(self, before: "DrawArguments") -> Tensor:
        """The first token of each image, if `before` is what the draw was given."""
        return self.codes[
            before.image_slots.long(), before.positions[before.conditional_rows.long()].long()
        ].cpu()


def plain_case(logits: Tensor, **changes: Tensor) -> DrawArguments:
    """One unguided image for each row of `logits`, at temperature 1 and unfiltered, at positions 0,
    1, ... 6, 0, ...
    """
    images = len(logits)
    numbers = torch.arange(images, dtype=torch.int32)
    case = DrawArguments(
        logits=logits,
        positions=numbers % TOKENS,
        limits=torch.full_like(numbers, TOKENS),
        conditional_rows=numbers.clone(),
        unconditional_rows=torch.full_like(numbers, -1),
        guided_steps=torch.full_like(numbers, TOKENS),
        image_slots=numbers.clone(),
        guidance_scales=torch.ones(images),
        temperatures=torch.ones(images),
        top_ks=torch.zeros_like(numbers),
        top_ps=torch.ones(images),
        seeds=torch.full((images,), 0x1234_5678_9ABC_DEF0),
        image_indices=numbers.clone(),
        codes=torch.full((images, TOKENS), -7, dtype=torch.int32),
        **_counts(images, numbers % TOKENS, images),
    )
    return replace(case, **changes)


def _counts(slots: int, lengths: Tensor, tokens_drawn: int) -> dict[str, Tensor]:
    names = ("failed", "drafted", "accepted")
    counts = {name: torch.zeros(slots, dtype=torch.int32) for name in names}
    return {
        **counts,
        "lengths": lengths,
        "verdicts": torch.full((tokens_drawn,), -7, dtype=torch.int32),
    }


def mixed_case(images: int, vocab_size: int, seed: int, window: int = 1) -> DrawArguments:
    """Images with and without guidance, every filter and temperature, ties, rows and slots in no
    order, unused rows all NaN. With windows of more than one token, some images have guidance up to
    the middle of theirs, and some windows end early.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype)[
            torch.randint(len(values), (images,), generator=generator)
        ]

    rows = torch.randperm(2 * images + 3, generator=generator).int()
    conditional, unconditional = rows[:images], rows[images : 2 * images].clone()
    unguided = torch.rand(images, generator=generator) < 0.4
    # Flat rows draw tokens at the filters' edges often enough for a token too many or too few to be
    # seen.
    shape = (len(rows), window, vocab_size)
    spread = torch.tensor([0.3, 0.3, 3.0])[torch.randint(3, shape[:2], generator=generator)]
    logits = torch.randn(shape, generator=generator) * spread[..., None]
    tied = torch.rand(shape[:2], generator=generator) < 0.5
    logits[tied] = (logits[tied] * 4).round() / 4
    logits[unconditional[unguided].long()] = torch.nan
    logits[rows[2 * images :].long()] = torch.nan
    unconditional[unguided] = -1
    positions = torch.full((len(rows),), -1, dtype=torch.int32)
    positions[conditional.long()] = torch.randint(TOKENS, (images,), generator=generator).int()
    guided = ~unguided
    positions[unconditional[guided].long()] = positions[conditional[guided].long()]
    slots = torch.randperm(images + 2, generator=generator)[:images].int()
    lengths = torch.zeros(images + 2, dtype=torch.int32)
    lengths[slots.long()] = positions[conditional.long()]
    limits = torch.full_like(positions, TOKENS)
    guided_steps = torch.full((images,), TOKENS, dtype=torch.int32)
    if window > 1:
        limits -= (torch.arange(len(rows)) % 3 == 0).int()
        guided_steps -= (torch.arange(images) % 3).int()
    return DrawArguments(
        logits=logits.flatten(0, 1),
        positions=positions,
        limits=limits,
        guided_steps=guided_steps,
        conditional_rows=conditional,
        unconditional_rows=unconditional,
        image_slots=slots,
        guidance_scales=pick([1.5, 2.0, 4.0]),
        temperatures=pick([0.0, 0.7, 1.0, 1.0, 1.0, 1.9]),
        top_ks=pick([0, 1, 2, 3, 7, vocab_size // 8, 10 * vocab_size], torch.int32),
        top_ps=pick([1.0, 1.0, 0.95, 0.6, 0.3, 0.0]),
        seeds=torch.randint(-(2**63), 2**63 - 1, (images,), generator=generator),
        image_indices=torch.randint(10, (images,), generator=generator).int(),
        codes=torch.full((images + 2, TOKENS), -7, dtype=torch.int32),
        **_counts(images + 2, lengths, images * window),
    )


def scaled_logits(case: DrawArguments) -> Tensor:
    """Guided logits over the temperature, image by image [images, vocab_size]."""
    rows = []
    for image, (row, pair) in enumerate(
        zip(case.conditional_rows.tolist(), case.unconditional_rows.tolist(), strict=True)
    ):
        guided = case.logits[row]
        if pair >= 0:
            guided = case.logits[pair] + (guided - case.logits[pair]) * case.guidance_scales[image]
        temperature = case.temperatures[image]
        rows.append(guided if temperature == 0 else guided * (1.0 / temperature.clamp(min=1e-5)))
    return torch.stack(rows)


def assert_same_draws(case: DrawArguments, result: DrawArguments, expected: DrawArguments) -> int:
    """Fails if two draws differ in anything but tokens that rounding may swap; returns how many
    tokens differ.

    It may swap tokens whose perturbed scores are within 1e-5, and it may keep or drop a token whose
    mass is within 1e-5 of top-p.
    """
    for name in ("positions", "lengths", "failed"):
        assert torch.equal(getattr(result, name).cpu(), getattr(expected, name).cpu()), name
    differing = result.codes.cpu() != expected.codes.cpu()
    ours, theirs = result.tokens(case), expected.tokens(case)
    images = (ours != theirs).nonzero()[:, 0]
    assert differing.sum() == len(images), "codes differ where no token was drawn"
    scaled = scaled_logits(case)
    steps = case.positions[case.conditional_rows.long()]
    for image in images.tolist():
        one = slice(image, image + 1)
        noise = sampling_reference.gumbel_noise(
            case.seeds[one], case.image_indices[one], steps[one], scaled.shape[1]
        )[0]
        row, pair = scaled[image], [int(ours[image]), int(theirs[image])]
        perturbed = row + noise * (case.temperatures[image] > 0)
        keeps = [
            sampling_reference.kept_tokens(row[None], case.top_ks[one], case.top_ps[one] + shift)[
                0
            ][pair].tolist()
            for shift in (-CLOSE, CLOSE)
        ]
        assert (
            keeps[0] != keeps[1] or abs(float(perturbed[pair[0]] - perturbed[pair[1]])) <= CLOSE
        ), (image, pair)
    return len(images)


def chi_square_p_value(counts: Tensor, probabilities: Tensor, bins: int) -> float:
    """The chance of draws at least this far from the probabilities.

    Args:
        counts: [vocab_size] how often each token was drawn; a token of probability 0 may not be
            among them.
        probabilities: float64 [vocab_size]
        bins: into about how many bins of like mass tokens are gathered in order of id; at least 100
            must come of it.
    """
    assert counts[probabilities == 0].sum() == 0, "a token was drawn that the filter ruled out"
    total = int(counts.sum())
    observed, expected = [0.0], [0.0]
    for count, probability in zip(counts.tolist(), probabilities.tolist(), strict=True):
        if expected[-1] >= total / bins:
            observed.append(0.0)
            expected.append(0.0)
        observed[-1] += count
        expected[-1] += probability * total
    # What is left for the last bin may be too little for the test.
    observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert len(expected) >= 100
    assert min(expected) > 20
    statistic = sum((seen - due) ** 2 / due for seen, due in zip(observed, expected, strict=True))
    halves = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def tied_logits(vocab_size: int, seed: int) -> Tensor:
    """Logits of many ties: normal, rounded to quarters [vocab_size]."""
    return (torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4


def filtered_probabilities(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The distribution that a draw should follow, by sorting, in float64 and independent of the
    kernels [vocab_size].
    """
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    values = logits.double()
    if top_k > 0:
        values = values.masked_fill(logits < logits[order[top_k - 1]], -torch.inf)
    probabilities = values.softmax(0)
    kept = torch.zeros_like(probabilities)
    mass = 0.0
    for token in order:
        if top_p < 1 and mass > top_p:
            break
        kept[token] = probabilities[token]
        mass += float(probabilities[token])
    return kept / kept.sum()
