"""The folder in which a job keeps its images as they come: files of some images each, which are
whole or not there. So an interrupted job loses what was not written yet, and nothing else.

A part is a .npy file of records (index, codes, pixels). Its name has the first index and the
number of its images, so that progress is known without opening it.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoregressive.errors import UserError
from autoregressive.files import remove_leftovers
from autoregressive.serve.bulk.array_files import write_array

_NAME = re.compile(r"(\d{8})-(\d+)\.npy")
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.part\.npy")
_PARTS_OPEN, _READ_AT_ONCE = 64, 64


@dataclass(frozen=True)
class Images:
    """Images that are done."""

    indices: Sequence[int]
    codes: NDArray[np.int32]  # [images, tokens]
    pictures: NDArray[np.uint8]  # [images, size, size, 3]


@dataclass(frozen=True)
class PartIndex:
    """Where images are."""

    files: list[Path]
    places: NDArray[np.int64]  # [images, 2]: number in `files` and row; -1 where there is none

    @property
    def missing(self) -> NDArray[np.int64]:
        """The images that are in no part."""
        return np.flatnonzero(self.places[:, 0] < 0)


class Parts:
    """The parts of a job's images. Ranks write different images and share nothing else.

    Args:
        tokens: of an image.
        size: pixels of a side.
    """

    def __init__(self, folder: Path, tokens: int, size: int) -> None:
        self.folder = folder
        self._dtype = np.dtype(
            [("index", "<i8"), ("codes", "<i4", (tokens,)), ("picture", "u1", (size, size, 3))]
        )

    def clean(self) -> None:
        """Makes the folder, and removes what killed processes were writing there.

        Raises:
            UserError: the folder cannot be made.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        remove_leftovers(self.folder, _UNFINISHED)

    def write(self, images: Images) -> None:
        """Keeps images, which must not be there yet.

        Raises:
            UserError: the folder or the disk does not take the file.
        """
        order = np.argsort(images.indices)
        records = np.empty(len(order), self._dtype)
        records["index"] = np.asarray(images.indices)[order]
        records["codes"], records["picture"] = images.codes[order], images.pictures[order]
        write_array(self.folder / f"{min(images.indices):08d}-{len(records)}.npy", records)

    def count(self) -> int:
        """How many images are kept, by the names of the files."""
        try:
            return sum(
                int(found[2]) for found in map(_NAME.fullmatch, os.listdir(self.folder)) if found
            )
        except FileNotFoundError:  # rank 0 has finished the job
            return 0

    def index(self, images: int) -> "PartIndex":
        """Where each of a job's images is.

        Raises:
            UserError: a file is no part of such a job.
        """
        files = self._files()
        places = np.full((images, 2), -1, dtype=np.int64)
        for number, file in enumerate(files):
            indices = self._open(file)["index"]
            if len(indices) and not 0 <= indices.min() <= indices.max() < images:
                raise UserError(f"{file} holds images of another job: remove it")
            places[indices, 0] = number
            places[indices, 1] = np.arange(len(indices))
        return PartIndex(files, places)

    def codes(self, index: "PartIndex") -> Iterator[NDArray[np.int32]]:
        """The codes of all images, in their order: int32 [some, tokens] at a time."""
        for records in self._read(index, ["index", "codes"]):
            yield records["codes"]

    def pictures(self, index: "PartIndex") -> Iterator[NDArray[np.uint8]]:
        """The pictures of all images, in their order: uint8 [some, size, size, 3] at a time."""
        for records in self._read(index, ["index", "picture"]):
            yield records["picture"]

    def _read(self, index: "PartIndex", fields: list[str]) -> Iterator[Any]:
        opened = lru_cache(maxsize=_PARTS_OPEN)(lambda number: self._open(index.files[number]))
        dtype = np.dtype([(name, self._dtype[name]) for name in fields])
        for begin in range(0, len(index.places), _READ_AT_ONCE):
            some = index.places[begin : begin + _READ_AT_ONCE]
            records = np.empty(len(some), dtype)
            for at, (number, row) in enumerate(some):
                for name in fields:
                    records[name][at] = opened(number)[name][row]
            if not np.array_equal(records["index"], np.arange(begin, begin + len(some))):
                raise UserError(f"{self.folder} was changed meanwhile: run the command again")
            yield records

    def _files(self) -> list[Path]:
        names = os.listdir(self.folder)
        return [self.folder / name for name in sorted(names) if _NAME.fullmatch(name)]

    def remove(self) -> None:
        """Removes the parts, and the folder if nothing else is in it."""
        with contextlib.suppress(OSError):
            for file in self._files():
                file.unlink()
            self.folder.rmdir()

    def _open(self, file: Path) -> Any:
        damaged = UserError(f"{file} is damaged: remove it, and its images are drawn again")
        try:
            records = np.lib.format.open_memmap(file, mode="r")
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error
        except ValueError as error:
            raise damaged from error
        if records.dtype != self._dtype or records.ndim != 1:
            raise damaged
        return records
