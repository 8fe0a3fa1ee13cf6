"""What a call of `Pipeline` gives: images that know how they were made."""

import io
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoregressive.models.axes import GridAxes
from autoregressive.output.images import (
    PICTURE_FORMATS,
    QUALITY,
    as_image,
    picture_grid,
    record_options,
)
from autoregressive.output.records import readable
from autoregressive.output.tables import axes_picture


class GeneratedImage(Image.Image):
    """A picture with the parameters that it was made with, which go into its files too."""

    def __init__(self, image: Image.Image, record: dict[str, object]) -> None:
        super().__init__()
        self.__dict__.update(image.__dict__)
        self.info = {"record": record}

    @property
    def record(self) -> dict[str, object]:
        """How it was made, ready for JSON."""
        return self.info["record"]

    def copy(self) -> "GeneratedImage":
        """A picture of its own with the same record."""
        return GeneratedImage(super().copy(), self.record)

    __copy__ = copy

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Saves as `PIL.Image.Image.save` does; a PNG, JPEG or WebP file has the record inside."""
        names = {suffix: kind.name for suffix, kind in PICTURE_FORMATS.items()}
        suffix = Path(fp).suffix.lower() if isinstance(fp, str | os.PathLike) else ""
        name = (format or names.get(suffix, "")).upper()
        if name in names.values():
            options = record_options(name, readable(self.record), self.record)
            if name != "PNG":
                options["quality"] = QUALITY
            params = options | params
        super().save(fp, format, **params)


@dataclass(frozen=True)
class Result:
    """The images of one call, those of one class side by side. A notebook shows them as a grid."""

    images: list[GeneratedImage]
    codes: Tensor = field(repr=False)  # int32 [images, tokens] on the CPU
    labels: list[int]  # the class of each image
    seeds: list[int]  # of each image: with it alone, the image is drawn again

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> GeneratedImage:
        return self.images[index]

    @cached_property
    def grid(self) -> Image.Image:
        """All images on one picture, four a row, with the names of their classes."""
        names = [str(one.record["class_name"]) for one in self.images]
        return as_image(picture_grid(self._pixels, names))

    @property
    def _pixels(self) -> Tensor:
        """float32 [images, 3, height, width] in -1..1"""
        levels = torch.stack([torch.from_numpy(np.array(one)) for one in self.images])
        return levels.permute(0, 3, 1, 2).float() / 127.5 - 1

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.grid.save(content, format="PNG")
        return content.getvalue()


@dataclass(frozen=True)
class GridResult(Result):
    """The images of a grid with axes, row by row: those of one value of the rows' axis side by
    side.
    """

    axes: GridAxes
    record: dict[str, object] = field(repr=False)  # how all images were made, ready for JSON

    @property
    def rows(self) -> list[list[GeneratedImage]]:
        """The images by row and column. With one axis there is one row."""
        across = len(self.axes.columns.values)
        return [self.images[at : at + across] for at in range(0, len(self.images), across)]

    @cached_property
    def grid(self) -> GeneratedImage:
        """All images as one, with captions on the axes: a table, or four a row where there is one
        axis. A file of it tells how each image was made.
        """
        return GeneratedImage(as_image(axes_picture(self._pixels, self.axes)), self.record)
