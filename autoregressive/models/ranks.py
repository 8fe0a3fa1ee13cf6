"""Processes that share one transformer (tensor parallelism), and which part of each weight a rank
holds.

The heads and the feed-forward layer are split. A product that leads into them keeps a share of its
outputs, and one that leads out of them a share of its inputs: the ranks' results are then terms of
a sum. The head is split by vocabulary. Embeddings and norms are whole on every rank. Method:
Shoeybi et al. 2019, arXiv:1909.08053.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# by the name of the module: the split dimension, and of how many matrices the weight consists
_SPLIT = {
    "wqkv": (0, 3),  # queries, keys and values, one above the other
    "wo": (1, 1),
    "w1": (0, 1),
    "w3": (0, 1),
    "w2": (1, 1),
    "output": (0, 1),
}


@dataclass(frozen=True)
class WeightPart:
    """One rank's part of a weight."""

    dim: int  # that is split
    pieces: int  # of the part: one of each matrix that the weight consists of
    rank: int
    ranks: int

    def whole_shape(self, part: torch.Size) -> torch.Size:
        """The shape of the whole weight."""
        sides = list(part)
        sides[self.dim] *= self.ranks
        return torch.Size(sides)

    def places(self, target: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The pieces of a tensor that is to hold the part, each with the place of its first element
        in the whole weight.
        """
        size = target.shape[self.dim] // self.pieces
        for number in range(self.pieces):
            start = [0] * target.dim()
            start[self.dim] = (number * self.ranks + self.rank) * size
            yield tuple(start), target.narrow(self.dim, number * size, size)

    def copy_from(self, whole: Tensor, target: Tensor) -> None:
        """Copies the part of a whole weight into a tensor of the part's shape."""
        for start, piece in self.places(target):
            ends = map(int.__add__, start, piece.shape)
            piece.copy_(whole[tuple(map(slice, start, ends))])


@dataclass(frozen=True)
class Rank:
    """One of the processes that share a model. Rank 0 has the scheduler and the tokenizer."""

    number: int = 0
    count: int = 1

    def part_of(self, name: str) -> WeightPart | None:
        """The part of a transformer's parameter; None: all of it.

        Args:
            name: as in the state dict.
        """
        split = _SPLIT.get(name.removesuffix(".weight").rpartition(".")[2])
        if self.count == 1 or split is None:
            return None
        dim, pieces = split
        return WeightPart(dim, pieces, self.number, self.count)


ALONE = Rank()
