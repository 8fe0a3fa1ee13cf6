"""Tensors whose pieces lie in several places, as torch.distributed.checkpoint stores what several
processes hold.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoregressive.weights.stored_file import StoredTensor
from autoregressive.weights.weight_source import (
    CheckpointError,
    WeightSource,
    select_flattened,
    source_of,
)

_MOST_COMPARISONS = 500_000  # of pieces that form no grid, in one checkpoint: a second or two


class BadChunksError(Exception):
    """Pieces that are missing, lie outside or overlap; the message says which weight's."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor: where it begins in the whole, and how it is found when it is wanted."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    find: Callable[[], StoredTensor]

    @property
    def ends(self) -> tuple[int, ...]:
        """Where it ends in the whole."""
        return tuple(map(int.__add__, self.offsets, self.sizes))


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor that its chunks cover, as has been checked."""

    name: str
    path: Path  # for messages
    dtype: torch.dtype
    shape: torch.Size
    chunks: Sequence[Chunk]

    def read_into(self, target: Tensor) -> None:
        """Copies it into a tensor of its shape, on any device and of any dtype.

        Raises:
            CheckpointError: a file cannot be read, or a piece is not what it should be.
        """
        for chunk in self.chunks:
            if math.prod(chunk.sizes) == 0:
                continue
            stored = chunk.find()
            if tuple(stored.shape) != chunk.sizes or stored.dtype != self.dtype:
                raise CheckpointError(
                    self.path,
                    f"the shards of {self.name} are damaged; copy the whole directory again",
                )
            stored.read_into(target[tuple(map(slice, chunk.offsets, chunk.ends))])


def chunked_source(
    path: Path, names: Iterable[str], tensor: Callable[[str], ChunkedTensor], ema: bool
) -> WeightSource:
    """The weights among the named tensors; the others are not looked at.

    Raises:
        CheckpointError: `ema` is not there, or two names become the same one.
        BadChunksError: a weight is not covered by its chunks.
    """
    tensors: dict[str, ChunkedTensor] = {}
    coverage = CoverageCheck()
    for plain, stored in select_flattened(names, path, ema).items():
        tensors[plain] = tensor(stored)
        coverage.check(tensors[plain])
    return source_of(path, tensors, is_fsdp=True)


class CoverageCheck:
    """Checks tensor after tensor; the comparisons of all of them together are bounded."""

    def __init__(self) -> None:
        self._comparisons = 0

    def check(self, tensor: ChunkedTensor) -> None:
        """The chunks are inside, of the tensor's volume together, and nowhere over each other: then
        they cover all of it.

        Raises:
            BadChunksError: they do not, or it would take too long to find out.
        """
        # An empty rank of an uneven split has a chunk without elements.
        chunks = [chunk for chunk in tensor.chunks if math.prod(chunk.sizes)]
        for chunk in chunks:
            if len(chunk.offsets) != len(tensor.shape) or any(
                map(int.__gt__, chunk.ends, tensor.shape)
            ):
                raise BadChunksError(f"a part of {tensor.name} lies outside of it")
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(tensor.shape):
            raise BadChunksError(f"parts of {tensor.name} are missing or overlap")
        if not _is_grid(chunks, tensor.shape):
            self._compare(tensor, chunks)

    def _compare(self, tensor: ChunkedTensor, chunks: Sequence[Chunk]) -> None:
        # Along the axis that is cut most, few parts reach beyond the start of the next: only those
        # are compared with it.
        axis = max(
            range(len(tensor.shape)),
            key=lambda axis: len({chunk.offsets[axis] for chunk in chunks}),
        )
        reaching: list[Chunk] = []
        for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
            self._comparisons += len(reaching)
            if self._comparisons > _MOST_COMPARISONS:
                raise BadChunksError(
                    f"{tensor.name} is cut up in a way that takes too long to check"
                )
            reaching = [other for other in reaching if other.ends[axis] > chunk.offsets[axis]]
            if any(_overlap(chunk, other) for other in reaching):
                raise BadChunksError(f"parts of {tensor.name} overlap")
            reaching.append(chunk)


def _is_grid(chunks: Sequence[Chunk], shape: torch.Size) -> bool:
    """Whether the tensor is cut along each axis at the same places everywhere, as meshes of
    processes do.
    """
    if len(chunks) < 2:
        return True
    next_cut = []
    for axis, side in enumerate(shape):
        cuts = sorted({chunk.offsets[axis] for chunk in chunks})
        next_cut.append(dict(itertools.pairwise([*cuts, side])))
    if len({str(chunk.offsets) for chunk in chunks}) != len(chunks) or math.prod(
        map(len, next_cut)
    ) != len(chunks):
        return False
    return all(
        cuts[chunk.offsets[axis]] == chunk.ends[axis]
        for axis, cuts in enumerate(next_cut)
        for chunk in chunks
    )


def _overlap(one: Chunk, other: Chunk) -> bool:
    starts = map(max, one.offsets, other.offsets)
    return all(
        start < end for start, end in zip(starts, map(min, one.ends, other.ends), strict=True)
    )
