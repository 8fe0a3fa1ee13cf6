"""Tensors in files: whole ones, and those whose pieces lie in several places, as
torch.distributed.checkpoint stores what several processes hold; and how it is told what is wrong
with a file.

Files are read, not mapped. A mapped file that becomes shorter kills the process that touches it;
one that is read becomes an error.
"""

import contextlib
import itertools
import math
import operator
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoregressive.errors import SettingName, UserError, shortened

_MOST_DIMENSIONS = 8  # weights have five at most
_LARGEST_SIDE = 2**48
_MOST_CELLS = 1_000_000  # between the cuts of all tensors of a checkpoint: a second or two
_PIECE_BYTES = 8 * 2**20  # read at a time, where numbers are converted or go to another device
_LONGEST_MESSAGE, _LONGEST_PATH = 500, 298

DAMAGED = "is damaged or cut short; download or copy it again"
HAS_PROBLEM = "is damaged ({}); download or copy it again"


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded.

    The message is one line of at most 500 characters, begins with the path, and says what to do.
    The reason is cut, for it can quote what a hostile file has. A long path is cut in its middle.

    Args:
        more: what follows the reason and a space, such as the names of settings; it is not cut.
    """

    def __init__(self, path: Path, reason: str, *more: str | SettingName) -> None:
        shown = str(path)
        if len(shown) > _LONGEST_PATH:
            half = (_LONGEST_PATH - 3) // 2
            shown = f"{shown[:half]}...{shown[-half:]}"
        end = (" ", *more) if more else ()
        room = _LONGEST_MESSAGE - len(shown) - 2 - len(str(UserError(*end)))
        super().__init__(f"{shown}: {shortened(reason, room)}", *end)


class BadContentError(Exception):
    """Content of a checkpoint that is not what it should be; the parts of the message say how.

    The nearest `reading` turns it into a `CheckpointError`, for it knows which file it is.
    """


def require(holds: bool, *parts: str | SettingName) -> None:
    """Raises `BadContentError` with that message unless the condition holds."""
    if not holds:
        raise BadContentError(*parts)


@contextlib.contextmanager
def reading(path: Path, problem: str = "{}", damage: str = DAMAGED) -> Iterator[None]:
    """Turns whatever is raised while content is read into a `CheckpointError` about the path.

    Args:
        problem: the message where a check has failed; {} stands for what the check has found.
        damage: the message where anything else has failed: damaged content can raise any error.
    """
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise  # a lack of memory is no damage
    except BadContentError as error:
        found, *more = error.args
        raise CheckpointError(path, problem.replace("{}", found), *more) from error
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read: {error.strerror or error}; check the path"
        ) from error
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):
            raise
        raise CheckpointError(path, damage.replace("{}", type(error).__name__)) from error


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
        with reading(path):
            found = os.stat(path)
            require(
                not stat.S_ISDIR(found.st_mode),
                "is a directory where a file is needed; copy it again",
            )
            # Reading from a pipe would wait for ever.
            require(stat.S_ISREG(found.st_mode), "is neither a file nor a directory; name one")
        self.size = found.st_size
        self._identity = _identity(found)

    def read(self, offset: int, size: int) -> bytes:
        """Reads exactly `size` bytes from `offset` on."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CheckpointError(self.path, "is cut short; download or copy it again")
        content = bytearray(size)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer with what is there."""
        self.read_lines(offset, len(buffer), len(buffer), buffer)

    def read_lines(self, offset: int, step: int, size: int, buffer: memoryview) -> None:
        """Fills the buffer with lines of `size` bytes, whose starts are `step` bytes apart, and
        reads nothing between them.
        """
        with reading(self.path), self.path.open("rb", buffering=0) as stream:
            require(
                _identity(os.fstat(stream.fileno())) == self._identity,
                "has changed while it was read; try again when it is complete",
            )
            for start in range(0, len(buffer), size or 1):
                stream.seek(offset)
                line = buffer[start : start + size]
                while line:
                    count = stream.readinto(line)
                    require(
                        bool(count),
                        "became shorter while it was read; download or copy it again",
                    )
                    line = line[count:]
                offset += step


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
            BadContentError: it takes more memory than there is.
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

    def read_box_into(self, start: tuple[int, ...], target: Tensor) -> None:
        """Copies the box of the target's shape that begins at an element; see `read_into`. Of a
        contiguous matrix no byte outside of the box is read.

        Args:
            start: an index for each dimension.
        """
        if target.shape == self.shape:
            self.read_into(target)
        elif target.numel() == 0:
            return
        elif self.stride is None and len(self.shape) == 2:
            self._read_lines(start, target)
        else:
            stride = self.stride or contiguous_stride(self.shape)
            whole = self._read_whole(reach(self.shape, stride)).as_strided(self.shape, stride)
            ends = map(int.__add__, start, target.shape)
            target.copy_(whole[tuple(map(slice, start, ends))])

    def _read_lines(self, start: tuple[int, ...], target: Tensor) -> None:
        """Copies a box of a contiguous matrix, several lines at a time."""
        itemsize, (lines, columns) = self.dtype.itemsize, target.shape
        step, size = self.shape[1] * itemsize, columns * itemsize
        offset = self.offset + start[0] * step + start[1] * itemsize
        count = max(1, min(lines, _PIECE_BYTES // size))
        piece = torch.empty(count, columns, dtype=self.dtype)
        for first in range(0, lines, count):
            wanted = target[first : first + count]
            read = _bytes_of(piece[: len(wanted)])
            if step == size:  # whole lines: one piece of the file
                self.file.read_into(offset + first * step, read)
            else:
                self.file.read_lines(offset + first * step, step, size, read)
            wanted.copy_(piece[: len(wanted)])

    def _read_whole(self, count: int) -> Tensor:
        """Reads so many elements that lie one behind the other."""
        try:
            whole = torch.empty(count, dtype=self.dtype)
        except (RuntimeError, MemoryError) as error:
            raise BadContentError(
                f"has a tensor that takes {count * self.dtype.itemsize:,} bytes of memory to read, "
                "more than there is; save it as .safetensors"
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
    steps = itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)
    return tuple(steps)[::-1][: len(shape)]


Choose = Callable[[Iterable[str]], dict[str, str]]  # names of tensors -> plain name -> name


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
    dtype: torch.dtype
    shape: torch.Size
    chunks: Sequence[Chunk]

    def read_into(self, target: Tensor) -> None:
        """Copies it into a tensor of its shape, on any device and of any dtype.

        Raises:
            BadContentError: a piece is not what it should be.
            CheckpointError: a file cannot be read.
        """
        self.read_box_into((0,) * target.dim(), target)

    def read_box_into(self, start: tuple[int, ...], target: Tensor) -> None:
        """Copies the box of the target's shape that begins at an element; see `read_into`. Chunks
        outside of the box are not looked at.
        """
        ends = tuple(map(int.__add__, start, target.shape))
        for chunk in self.chunks:
            first = tuple(map(max, chunk.offsets, start))
            end = tuple(map(min, chunk.ends, ends))
            if 0 in chunk.sizes or any(map(int.__ge__, first, end)):
                continue
            stored = chunk.find()
            require(
                tuple(stored.shape) == chunk.sizes and stored.dtype == self.dtype,
                f"the shards of {self.name} are damaged; copy the whole directory again",
            )
            in_target = map(slice, map(int.__sub__, first, start), map(int.__sub__, end, start))
            in_chunk = tuple(map(int.__sub__, first, chunk.offsets))
            stored.read_box_into(in_chunk, target[tuple(in_target)])


def check_coverage(tensors: Iterable[ChunkedTensor]) -> None:
    """Checks that each element of each tensor is in one chunk.

    The starts of a tensor's chunks cut it into cells. If the chunks cover it, each of them begins
    and ends at such cuts. The cells of all tensors together are bounded.

    Raises:
        BadContentError: an element is in no chunk or in several, or it would take too long to find
            out.
    """
    room = _MOST_CELLS
    for tensor in tensors:
        # An empty rank of an uneven split has a chunk without elements.
        chunks = [chunk for chunk in tensor.chunks if 0 not in chunk.sizes]
        cuts = _cuts(tensor, chunks)
        sides = [len(cut) - 1 for cut in cuts]
        room -= math.prod(sides)
        require(room >= 0, f"{tensor.name} is cut up in a way that takes too long to check")
        covered = np.zeros(sides, dtype=bool)
        told = f"parts of {tensor.name} are missing or overlap"
        for chunk in chunks:
            begins = [cut[start] for cut, start in zip(cuts, chunk.offsets, strict=True)]
            ends = [cut.get(end) for cut, end in zip(cuts, chunk.ends, strict=True)]
            cells = tuple(map(slice, begins, ends))
            require(None not in ends and not covered[cells].any(), told)
            covered[cells] = True
        require(bool(covered.all()), told)


def _cuts(tensor: ChunkedTensor, chunks: Sequence[Chunk]) -> list[dict[int, int]]:
    """Where chunks begin along each axis, and where it ends: position -> its number in order."""
    for chunk in chunks:
        require(
            len(chunk.offsets) == len(tensor.shape)
            and all(map(int.__le__, chunk.ends, tensor.shape)),
            f"a part of {tensor.name} lies outside of it",
        )
    cuts = []
    for axis, side in enumerate(tensor.shape):
        positions = sorted({0, side, *(chunk.offsets[axis] for chunk in chunks)})
        cuts.append({position: number for number, position in enumerate(positions)})
    return cuts
