"""Images and statistics in .npz files, read without unpickling anything.

Images are read as a stream, so that 9.8 GB of them never are in memory at once.
"""

import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from autoregressive.errors import UserError, either, one_line
from autoregressive.evaluation.frechet import Gaussian

IMAGES = "arr_0"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# RuntimeError: encrypted, or a compression that zipfile does not know. numpy reads headers with
# Python's parser, which gives the last three.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError,
    SyntaxError, tokenize.TokenError, TypeError,
)  # fmt: skip
_MOST_FEATURES = 2**14  # a covariance of so many takes 2 GiB
_SUM_ERROR = 1e-6  # of a covariance's symmetry, relative to its largest variance


@dataclass(frozen=True)
class ImageArray:
    """The array `arr_0` of a file: uint8 [count, height, width, 3]."""

    path: Path
    count: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As numpy has it."""
        return (self.count, self.height, self.width, 3)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images in order, at most `size` at a time: uint8 [n, height, width, 3].

        Raises:
            UserError: the file is damaged.
        """
        with _member(self.path, IMAGES) as file:
            _read_header(self.path, file)
            for begin in range(0, self.count, size):
                batch = np.empty((min(size, self.count - begin), *self.shape[1:]), np.uint8)
                _fill(file, batch)
                yield batch


def _fill(file: IO[bytes], batch: np.ndarray) -> None:
    """Reads a whole array, or raises EOFError."""
    rest = batch.data.cast("B")
    while rest:
        content = file.read(len(rest))
        if not content:
            raise EOFError("the data end too early")
        rest[: len(content)] = content
        rest = rest[len(content) :]


def open_images(path: Path) -> ImageArray | None:
    """The images of a file, or None if it has none; their pixels are not read yet.

    Raises:
        UserError: this is no .npz file, it is damaged, or its `arr_0` is anything but images.
    """
    if IMAGES not in array_names(path):
        return None
    with _member(path, IMAGES) as file:
        shape, in_fortran_order, dtype = _read_header(path, file)
        told = f"{path}: {IMAGES} is {dtype} {list(shape)}"
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise UserError(f"{told}, and must be uint8 [images, height, width, 3]")
        if in_fortran_order:
            raise UserError(f"{told} in Fortran order; save numpy.ascontiguousarray of it")
        images = ImageArray(path, shape[0], shape[1], shape[2])
        there = _member_bytes(path, IMAGES) - file.tell()
    promised = images.count * images.height * images.width * 3
    if there != promised:
        raise UserError(
            f"{told} and takes {promised} bytes, but {there} are there; write or download the file "
            "again"
        )
    return images


def read_gaussian(path: Path, mean: str, covariance: str) -> Gaussian | None:
    """Statistics that stand in a file under these two names; None if it has neither.

    Raises:
        UserError: one of the two is missing, damaged, or cannot be what its name says.
    """
    found = {mean, covariance} & array_names(path)
    if not found:
        return None
    if len(found) == 1:
        raise UserError(f"{path}: has {found.pop()}, and must have both {mean} and {covariance}")
    means, covariances = _read_floats(path, mean, 1), _read_floats(path, covariance, 2)
    if covariances.shape != (len(means), len(means)):
        raise UserError(
            f"{path}: {covariance} is {list(covariances.shape)}, and must be a square of the "
            f"{len(means)} values of {mean}"
        )
    tolerance = _SUM_ERROR * float(np.abs(np.diagonal(covariances)).max())
    if not np.allclose(covariances, covariances.T, rtol=0, atol=tolerance):
        raise UserError(f"{path}: {covariance} is not symmetric, so it is no covariance")
    return Gaussian(torch.from_numpy(means), torch.from_numpy(covariances))


def _read_floats(path: Path, name: str, dimensions: int) -> np.ndarray:
    """A small array of finite numbers, as float64."""
    with _member(path, name) as file:
        shape, _, dtype = _read_header(path, file)
        if dtype.kind != "f" or len(shape) != dimensions or not 1 <= min(shape) <= max(shape):
            raise UserError(
                f"{path}: {name} is {dtype} {list(shape)}, and must be floats of {dimensions} "
                f"dimension{'s' * (dimensions > 1)}"
            )
        if max(shape) > _MOST_FEATURES:
            raise UserError(f"{path}: {name} is {list(shape)}; {_MOST_FEATURES} features at most")
    with _member(path, name) as file:
        read = np.lib.format.read_array(file)
    if not np.isfinite(read).all():
        raise UserError(f"{path}: {name} has values that are not finite")
    return np.ascontiguousarray(read, dtype=np.float64)


def array_names(path: Path) -> set[str]:
    """The names of the arrays in a file.

    Raises:
        UserError: this is no .npz file.
    """
    with _opened(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


def _member_bytes(path: Path, name: str) -> int:
    with _opened(path) as archive:
        return archive.getinfo(f"{name}.npy").file_size


@contextmanager
def _member(path: Path, name: str) -> Iterator[IO[bytes]]:
    """An array of the file, for reading; what shows while it is read that it is damaged is told as
    a `UserError`.
    """
    with _opened(path) as archive, archive.open(f"{name}.npy") as file:
        yield file


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise UserError(
            f"{path}: not an .npz file, or damaged ({one_line(str(error))}); write or download it "
            "again"
        ) from error


def _read_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """An array's shape, whether it is in Fortran order, and its type."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        known = either([".".join(map(str, each)) for each in _HEADERS])
        raise UserError(f"{path}: an array in .npy format {version}, and {known} can be read")
    return _HEADERS[version](file)
