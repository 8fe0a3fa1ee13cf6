"""Random windows whose tokens have been drawn: what `kernels.lookahead.accept` is given."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.lookahead import BROKEN, HELD

GRID = 5


@dataclass
class AcceptCase:
    """The arguments of `accept` by name."""

    verdicts: Tensor
    positions: Tensor
    limits: Tensor
    conditional_rows: Tensor
    unconditional_rows: Tensor
    image_slots: Tensor
    codes: Tensor
    lengths: Tensor
    failed: Tensor
    drafted: Tensor
    accepted: Tensor

    def tensors(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """A copy of every tensor on a device."""
        return {
            field.name: getattr(self, field.name).to(device, copy=True) for field in fields(self)
        }


def accept_case(images: int, window: int, seed: int) -> AcceptCase:
    """Images with and without a pair, absent ones, ones at their limit and ones near their end.
    Most guesses held; a few tokens are broken.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = GRID**2

    def below(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=generator, dtype=torch.int32)

    rows = torch.randperm(2 * images, generator=generator).int()
    conditional, unconditional = rows[:images].clone(), rows[images:].clone()
    unconditional[::3] = -1
    positions, limits = torch.full((2 * images,), -1).int(), torch.zeros(2 * images).int()
    for row, pair in zip(conditional.tolist(), unconditional.tolist(), strict=True):
        at = int(below(tokens + 1))
        for each in (row, pair) if pair >= 0 else (row,):
            positions[each] = at
            limits[each] = min(tokens, at + int(below(2 * window + 1)))
    conditional[5::7] = -1
    held = torch.rand(images * window, generator=generator) < 0.7
    broken = torch.rand(images * window, generator=generator) < 0.05
    slots = torch.randperm(images + 3, generator=generator)[:images].int()
    lengths = torch.zeros(images + 3, dtype=torch.int32)
    lengths[slots.long()] = positions[conditional.clamp(min=0).long()]
    return AcceptCase(
        (held * HELD.value + broken * BROKEN.value).int(),
        positions,
        limits,
        conditional,
        unconditional,
        slots,
        below(99, images + 3, tokens),
        lengths,
        torch.zeros(images + 3, dtype=torch.int32),
        below(9, images + 3),
        below(9, images + 3),
    )
