"""Tensors in files: whole ones, and those whose pieces lie in several places, as
torch.distributed.checkpoint stores what several processes hold.

Files are read, not mapped. A mapped file that becomes shorter kills the process that touches it;
one that is read becomes an error.
"""

import itertools
import math
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoregressive.weights.weight_source import (
    CheckpointError,
    WeightSource,
    require,
    select_flattened,
)

_MOST_DIMENSIONS = 8  # weights have five at most
_LARGEST_SIDE = 2**48
_MOST_COMPARISONS = 500_000  # of pieces that form no grid, in one checkpoint: a second or two
_PIECE_BYTES = 8 * 2**20  # read at a time, where numbers are converted or go to another device


class StoredFile:
    """A file of a checkpoint. It is opened for each read, and must stay what it was.

    Attributes:
        size: bytes.

    Raises:
        CheckpointError: by each method, as by the constructor: the file cannot be read, has changed
            since, or is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = os.stat(path)
        except OSError as error:
            raise self._unreadable(error) from error
        if stat.S_ISDIR(found.st_mode):
            raise CheckpointError(path, "is a directory where a file is needed; copy it again")
        if not stat.S_ISREG(found.st_mode):  # reading from a pipe would wait for ever
            raise CheckpointError(path, "is neither a file nor a directory; name one")
        self.size = found.st_size
        self._identity = _identity(found)

    def read(self, offset: int, size: int) -> bytes:
        """Reads exactly `size` bytes from `offset` on."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CheckpointError(self.path, "is cut short; download or copy it again")
        content = bytearray(size)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    def read_into(self, offset: int, *buffers: memoryview) -> None:
        """Fills the buffers, one after the other, with what is there."""
        try:
            with self.path.open("rb", buffering=0) as stream:
                if _identity(os.fstat(stream.fileno())) != self._identity:
                    raise CheckpointError(
                        self.path, "has changed while it was read; try again when it is complete"
                    )
                stream.seek(offset)
                for buffer in buffers:
                    while buffer:
                        count = stream.readinto(buffer)
                        if not count:
                            raise CheckpointError(
                                self.path,
                                "became shorter while it was read; download or copy it again",
                            )
                        buffer = buffer[count:]
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(self.path, f"cannot be read: {error.strerror}; check the path")


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def visible_names(folder: Path, suffix: str) -> list[str]:
    """The files of a folder with that suffix, sorted.

    Hidden ones are left out: they are unfinished files of a killed process, or macOS's notes on the
    others (`._NAME`).
    """
    return sorted(file.name for file in folder.glob(f"*{suffix}") if not file.name.startswith("."))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file; inside of it, as has been checked."""

    file: StoredFile
    offset: int  # of its first element, bytes
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...] | None = None  # elements; None: contiguous

    def read_into(self, target: Tensor) -> None:
        """Copies it into a tensor of its shape, on any device and of any dtype.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if self.shape.numel() == 0:
            return
        if self.stride is not None:
            whole = self._read_whole(reach(self.shape, self.stride))
            target.copy_(whole.as_strided(self.shape, self.stride))
        elif not target.is_contiguous():
            target.copy_(self._read_whole(self.shape.numel()).view(self.shape))
        elif target.dtype == self.dtype and target.device.type == "cpu":
            self.file.read_into(self.offset, _bytes_of(target))
        else:
            self._read_in_pieces(target.view(-1))

    def _read_whole(self, count: int) -> Tensor:
        """Reads so many elements that lie one behind the other."""
        try:
            whole = torch.empty(count, dtype=self.dtype)
        except (RuntimeError, MemoryError) as error:
            told = (
                f"has a tensor that takes {count * self.dtype.itemsize:,} bytes of memory to read"
            )
            raise CheckpointError(
                self.file.path, f"{told}, more than there is; save it as .safetensors"
            ) from error
        self.file.read_into(self.offset, _bytes_of(whole))
        return whole

    def _read_in_pieces(self, target: Tensor) -> None:
        count = max(1, _PIECE_BYTES // self.dtype.itemsize)
        piece = torch.empty(min(count, target.numel()), dtype=self.dtype)
        for start in range(0, target.numel(), count):
            wanted = target[start : start + count]
            read = piece[: wanted.numel()]
            self.file.read_into(self.offset + start * self.dtype.itemsize, _bytes_of(read))
            wanted.copy_(read)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def is_shape(value: object) -> bool:
    """Whether it is a tuple or list of whole numbers that can be the sides of a tensor, or its
    strides.
    """
    if not isinstance(value, (tuple, list)) or len(value) > _MOST_DIMENSIONS:
        return False
    return all(type(side) is int and 0 <= side < _LARGEST_SIDE for side in value)


def reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last in memory."""
    if 0 in shape:
        return 0
    return 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor of this shape whose elements lie one behind the other."""
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))


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
        BadContentError: a weight is not covered by its chunks.
    """
    tensors: dict[str, ChunkedTensor] = {}
    coverage = CoverageCheck()
    for plain, stored in select_flattened(names, path, ema).items():
        tensors[plain] = tensor(stored)
        coverage.check(tensors[plain])
    return WeightSource(path, tensors)


class CoverageCheck:
    """Checks tensor after tensor; the comparisons of all of them together are bounded."""

    def __init__(self) -> None:
        self._comparisons = 0

    def check(self, tensor: ChunkedTensor) -> None:
        """The chunks are inside, of the tensor's volume together, and nowhere over each other: then
        they cover all of it.

        Raises:
            BadContentError: they do not, or it would take too long to find out.
        """
        # An empty rank of an uneven split has a chunk without elements.
        chunks = [chunk for chunk in tensor.chunks if math.prod(chunk.sizes)]
        for chunk in chunks:
            inside = len(chunk.offsets) == len(tensor.shape) and all(
                map(int.__le__, chunk.ends, tensor.shape)
            )
            require(inside, f"a part of {tensor.name} lies outside of it")
        volume = sum(math.prod(chunk.sizes) for chunk in chunks)
        require(volume == math.prod(tensor.shape), f"parts of {tensor.name} are missing or overlap")
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
            require(
                self._comparisons <= _MOST_COMPARISONS,
                f"{tensor.name} is cut up in a way that takes too long to check",
            )
            reaching = [other for other in reaching if other.ends[axis] > chunk.offsets[axis]]
            overlaps = any(_overlap(chunk, other) for other in reaching)
            require(not overlaps, f"parts of {tensor.name} overlap")
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
