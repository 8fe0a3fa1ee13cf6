"""A table of pictures as one picture, with captions above its columns and beside its rows.

Every caption is whole: the letters become smaller, and then the table wider, until it fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from autoregressive.errors import SettingName
from autoregressive.models.axes import GridAxes
from autoregressive.output.images import (
    PADDING,
    Font,
    as_bytes,
    caption_font,
    check_grid_fits,
    check_size_fits,
    letter_size,
    picture_grid,
)


def axes_picture(pixels: Tensor, axes: GridAxes) -> Tensor:
    """The pictures of a grid as one: a table, or four a row where there is one axis.

    Args:
        pixels: [images, 3, side, side] in -1..1, row by row.

    Returns:
        uint8 [3, height, width] on the CPU
    """
    if axes.rows is None:
        return picture_grid(pixels, axes.columns.captions)
    table = PictureTable(pixels.shape[-1], axes.columns.captions, axes.rows.captions)
    return table.filled(as_bytes(pixels))


def check_axes_fit(setting: str | SettingName, path: Path, side: int, axes: GridAxes) -> None:
    """Finds out before any long work whether the file's format holds so large a grid.

    Args:
        setting, path: as of `check_grid_fits`.
        side: pixels of an image's side.

    Raises:
        UserError: it does not.
    """
    if axes.rows is None:
        check_grid_fits(setting, path, axes.pictures, side, captions=True)
        return
    table = PictureTable(side, axes.columns.captions, axes.rows.captions)
    check_size_fits(setting, path, axes.pictures, table.height, table.width)


@dataclass(frozen=True)
class PictureTable:
    """Where pictures and captions stand."""

    side: int  # pixels of a picture's side
    columns: Sequence[str]  # captions
    rows: Sequence[str]

    @cached_property
    def _font(self) -> Font:
        return caption_font((*self.columns, *self.rows), self.side)

    def _widest(self, captions: Sequence[str]) -> int:
        return int(max(map(self._font.getlength, captions))) + 1

    @cached_property
    def _margin(self) -> int:
        """Pixels on both sides of a row's caption."""
        return letter_size(self.side) // 2

    @cached_property
    def _left(self) -> int:
        """Pixels to the left of the first column."""
        return self._widest(self.rows) + 2 * self._margin

    @cached_property
    def _top(self) -> int:
        """Pixels above the first row."""
        return letter_size(self.side) * 2

    @cached_property
    def _pitch(self) -> int:
        """Pixels from one column to the next."""
        return max(self.side, self._widest(self.columns) + self._margin) + PADDING

    @property
    def height(self) -> int:
        """Pixels of the whole table."""
        return self._top + len(self.rows) * (self.side + PADDING)

    @property
    def width(self) -> int:
        """Pixels of the whole table."""
        return self._left + len(self.columns) * self._pitch

    def filled(self, pictures: Tensor) -> Tensor:
        """The table with its pictures, row by row: uint8 [images, 3, side, side], on the CPU ->
        uint8 [3, height, width]
        """
        paper = Image.new("L", (self.width, self.height))
        pen = ImageDraw.Draw(paper)
        lefts = [self._left + column * self._pitch for column in range(len(self.columns))]
        tops = [self._top + row * (self.side + PADDING) for row in range(len(self.rows))]
        for left, text in zip(lefts, self.columns, strict=True):
            middle = (left + (self._pitch - PADDING) / 2, self._top / 2)
            pen.text(middle, text, fill=255, font=self._font, anchor="mm")
        for top, text in zip(tops, self.rows, strict=True):
            end = (self._left - self._margin, top + self.side / 2)
            pen.text(end, text, fill=255, font=self._font, anchor="rm")
        table = torch.from_numpy(np.array(paper)).repeat(3, 1, 1)
        indent = (self._pitch - PADDING - self.side) // 2
        corners = [(top, left + indent) for top in tops for left in lefts]
        for picture, (top, left) in zip(pictures, corners, strict=True):
            table[:, top : top + self.side, left : left + self.side] = picture
        return table
