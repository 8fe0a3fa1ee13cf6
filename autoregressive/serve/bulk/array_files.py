"""Arrays as files: .npy, and the npz file of all images, as ADM's evaluator reads it. NumPy's own
functions do not tell that a disk is full.
"""

import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoregressive.errors import UserError
from autoregressive.files import write_whole

_SAMPLES = "arr_0.npy"  # the entry of the npz file


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Writes a .npy file, of records too. Raises `UserError` as `write_parts`."""
    write_parts(path, array.shape, array.dtype, [array])


def write_parts(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Iterable[NDArray[Any]]
) -> None:
    """Writes a .npy file of parts that follow each other, of which one is in memory at a time.

    Raises:
        UserError: the folder or the disk does not take the file.
    """

    def write(file: Path) -> None:
        with file.open("wb") as stream:
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for part in parts:
                stream.write(np.ascontiguousarray(part).view(np.uint8).data)

    write_whole(path, write)


def write_samples(
    path: Path, shape: tuple[int, int, int, int], pictures: Iterable[NDArray[np.uint8]]
) -> None:
    """Writes one array, `arr_0`, of which only a part is in memory at a time. The same pictures
    give the same bytes.

    Args:
        shape: of the array: [images, height, width, 3].
        pictures: its parts, one after the other.

    Raises:
        UserError: the folder or the disk does not take the file.
    """

    def write(file: Path) -> None:
        entry = zipfile.ZipInfo(_SAMPLES)  # of 1980, whenever it is written
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(entry, "w", force_zip64=True) as array,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for part in pictures:
                array.write(np.ascontiguousarray(part).data)

    write_whole(path, write)


def read_samples(path: Path, at_once: int) -> Iterator[NDArray[np.uint8]]:
    """The pictures of a file that `write_samples` has written, in their order, so many at a time:
    uint8 [some, height, width, 3].

    Raises:
        UserError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_SAMPLES) as array:
            np.lib.format.read_magic(array)
            (images, *shape), _, _ = np.lib.format.read_array_header_1_0(array)
            for begin in range(0, images, at_once):
                some = (min(at_once, images - begin), *shape)
                yield np.frombuffer(array.read(math.prod(some)), np.uint8).reshape(some)
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged; remove it, and the job is drawn again") from error
