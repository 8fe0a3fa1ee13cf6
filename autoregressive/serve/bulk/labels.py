"""The class of each image of a bulk job."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoregressive.errors import SettingError, shortened
from autoregressive.serve.bulk.options import BALANCED, RANDOM

Labels = str | os.PathLike[str] | Sequence[int] | NDArray[Any]


def labels_name(labels: Labels) -> str:
    """How a job's settings call its labels, as of `make_labels`. Where a file lies is the user's
    own business.
    """
    if isinstance(labels, str) and labels in (RANDOM, BALANCED):
        return labels
    return "a file" if isinstance(labels, str | os.PathLike) else "given"


def make_labels(labels: Labels, images: int, num_classes: int, seed: int) -> NDArray[np.int64]:
    """The class of each image: int64 [images].

    Args:
        labels: the ids themselves. Or "random": independent and uniform, as LlamaGen draws them;
            image k has the same class in a job of any length. "balanced": the classes in turn.
            Else a file with one id for each image: .npy, or text with an id a line.

    Raises:
        SettingError: the file is damaged or does not fit the job.
    """
    if not isinstance(labels, str | os.PathLike):
        return _checked(shortened(str(labels), 40), np.asarray(labels), images, num_classes)
    if labels == RANDOM:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(num_classes, (images,), generator=generator).numpy()
    if labels == BALANCED:
        return np.arange(images) % num_classes
    return _checked(str(labels), _read_labels(Path(labels)), images, num_classes)


def _read_labels(path: Path) -> NDArray[Any]:
    """The array of a .npy file, or the numbers of a text with one a line.

    Raises:
        SettingError: the file is not there or damaged, or a line is no number.
    """
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return np.lib.format.read_array(file)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        told = f"there is no such file; give {RANDOM}, {BALANCED}, or a file with an id an image"
        raise SettingError("labels", path, told) from error
    except OSError as error:
        raise SettingError("labels", path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # no array, or no text
        raise SettingError("labels", path, "holds no ids: give one a line, or .npy") from error
    ids = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                ids.append(int(line))
            except ValueError as error:
                told = f"line {number} is {shortened(line, 40)!r}; give an id a line, such as 207"
                raise SettingError("labels", path, told) from error
    try:
        return np.array(ids, dtype=np.int64)
    except OverflowError as error:
        raise SettingError("labels", path, "an id has too many digits") from error


def _checked(name: str, found: NDArray[Any], images: int, num_classes: int) -> NDArray[np.int64]:
    told = f"give {images} ids, one for each image"
    if found.shape != (images,):
        there = f"{len(found)} ids" if found.ndim == 1 else f"an array of shape {found.shape}"
        raise SettingError("labels", name, f"holds {there}; {told}")
    if not np.issubdtype(found.dtype, np.integer):
        raise SettingError("labels", name, f"holds {found.dtype} and not whole numbers; {told}")
    wrong = np.flatnonzero((found < 0) | (found >= num_classes))
    if len(wrong):
        told = f"image {wrong[0]} has id {found[wrong[0]]}; ids are 0 to {num_classes - 1}"
        raise SettingError("labels", name, told)
    return found.astype(np.int64)
