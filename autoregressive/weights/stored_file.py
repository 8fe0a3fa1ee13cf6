"""Reading tensors out of files, without mapping them.

A mapped file that becomes shorter kills the process that touches it. One that is read becomes an
error.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoregressive.weights.weight_source import CheckpointError

_MOST_DIMENSIONS = 8  # weights have five at most
_LARGEST_SIDE = 2**48
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
        """Exactly so many bytes from there."""
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
        """So many elements, one behind the other."""
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
