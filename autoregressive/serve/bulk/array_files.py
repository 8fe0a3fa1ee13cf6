"""Arrays as files: .npy, and the npz file of all images, as ADM's evaluator reads it. NumPy's own
functions do not tell that a disk is full.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoregressive.files import write_whole


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
        entry = zipfile.ZipInfo("arr_0.npy")  # of 1980, whenever it is written
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(entry, "w", force_zip64=True) as array,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for part in pictures:
                array.write(np.ascontiguousarray(part).data)

    write_whole(path, write)
