"""Pictures as files: the grid, captions, and the record of how a picture was made.

Pixels are [images, 3, height, width] in -1..1, as the tokenizer's decoder gives them. A file is
whole or is not there.
"""

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from autoregressive.errors import SettingName, UserError
from autoregressive.files import write_whole

IMAGES_PER_ROW = 4
PADDING = 2  # black pixels between the images of a grid, and around it
JSON_KEY = "llamagen"  # of the record; a PNG's text "parameters" has the same for people
_SMALLEST_LETTERS = 10  # pixels; smaller ones cannot be read
QUALITY = 90  # of JPEG and WebP
_OTHER_RECORD_BYTES = 4096  # more than a record has beside the classes, file names included

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class PictureFormat:
    """A kind of picture file."""

    name: str  # Pillow's
    largest_side: int  # pixels that the encoder takes
    largest_record: int | None = None  # bytes of JSON; None: no limit


_JPEG = PictureFormat("JPEG", 65500, 65499)  # a JPEG has one segment of 64 KiB for EXIF
PICTURE_FORMATS = {  # by the suffix of the file's name
    ".png": PictureFormat("PNG", 2**31 - 1),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": PictureFormat("WEBP", 16383),
}


def picture_grid(pixels: Tensor, captions: Sequence[str] | None = None) -> Tensor:
    """All images on one picture, four a row with two black pixels between them, as LlamaGen lays
    them out.

    Args:
        pixels: [images, 3, height, width] in -1..1; what lies outside is clipped.
        captions: one under each image.

    Returns:
        uint8 [3, height of the grid, width of the grid] on the CPU
    """
    cells = pixels.float().cpu()
    if captions is not None:
        font = caption_font(captions, cells.shape[-1] - 4)
        strips = torch.stack([_caption_strip(text, cells.shape[-1], font) for text in captions])
        cells = torch.cat([cells, strips], dim=2)
    cells = as_bytes(cells)
    if len(cells) == 1:
        return cells[0]
    height, width = cells.shape[2:]
    grid = torch.zeros(3, *_grid_size(len(cells), height, width), dtype=torch.uint8)
    for index, cell in enumerate(cells):
        top = PADDING + index // IMAGES_PER_ROW * (height + PADDING)
        left = PADDING + index % IMAGES_PER_ROW * (width + PADDING)
        grid[:, top : top + height, left : left + width] = cell
    return grid


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels in -1..1 -> uint8 of the same shape, on the CPU. What lies outside is clipped."""
    levels = pixels.float().cpu().clamp(-1, 1).add(1).div(2).mul(255)
    return levels.add(0.5).to(torch.uint8)


def as_image(picture: Tensor) -> Image.Image:
    """uint8 [3, height, width] on the CPU -> an image of Pillow's."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def _grid_size(cells: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a grid of several cells of that size."""
    rows, columns = math.ceil(cells / IMAGES_PER_ROW), min(cells, IMAGES_PER_ROW)
    return rows * (height + PADDING) + PADDING, columns * (width + PADDING) + PADDING


def check_grid_fits(
    setting: str | SettingName, path: Path, images: int, side: int, *, captions: bool
) -> None:
    """Finds out before any long work whether the file's format holds so large a grid.

    Args:
        setting: what names the file, for the message: a setting, or an argument of a command.
        path: its suffix is one of `PICTURE_FORMATS`.
        images: how many images the grid has.
        side: pixels of an image's side.

    Raises:
        UserError: it does not.
    """
    height, width = _grid_size(images, side + (_strip_height(side) if captions else 0), side)
    check_size_fits(setting, path, images, height, width)


def check_size_fits(
    setting: str | SettingName, path: Path, images: int, height: int, width: int
) -> None:
    """Finds out whether the file's format holds a grid of that height and width.

    Args:
        setting, path, images: as of `check_grid_fits`.

    Raises:
        UserError: it does not.
    """
    most = PICTURE_FORMATS[path.suffix.lower()].largest_side
    for pixels, direction in ((height, "high"), (width, "wide")):
        if pixels > most:
            raise UserError(
                setting,
                f" {path}: a grid of {images} images is {pixels} pixels {direction}, and such a "
                f"file holds {most}: use .png, or draw fewer",
            )


def check_record_fits(
    setting: str | SettingName, path: Path, labels: Sequence[int], names: Sequence[str]
) -> None:
    """Finds out before any long work whether the file's format holds the record of such a grid.

    Args:
        setting, path: as of `check_grid_fits`.
        labels, names: the classes of the grid's images.

    Raises:
        UserError: it does not.
    """
    most = PICTURE_FORMATS[path.suffix.lower()].largest_record
    classes = json.dumps({"labels": list(labels), "class_names": list(names)})
    if most is not None and len(classes) + _OTHER_RECORD_BYTES > most:
        raise UserError(
            setting,
            f" {path}: such a file has no room for the classes of {len(labels)} images: "
            "use .png or .webp, or draw fewer",
        )


def fitted_text(text: str, font: Font, width: float) -> str:
    """The text, cut and ended by three dots if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def caption_font(captions: Sequence[str], width: int) -> Font:
    """The font of captions that stand together. Its letters are a tenth as high as a picture is
    wide, or smaller where a caption is wider than that many pixels, but can be read.
    """
    for size in range(letter_size(width), _SMALLEST_LETTERS, -1):
        font = ImageFont.load_default(size)
        if max(map(font.getlength, captions)) <= width:
            return font
    return ImageFont.load_default(_SMALLEST_LETTERS)


def letter_size(width: int) -> int:
    """Pixels of the letters beside pictures of that width."""
    return max(_SMALLEST_LETTERS, width // 10)


def _caption_strip(text: str, width: int, font: Font) -> Tensor:
    """White letters on black: float32 [3, strip height, width] in -1..1."""
    strip = Image.new("L", (width, _strip_height(width)))
    ImageDraw.Draw(strip).text(
        (width / 2, strip.height / 2),
        fitted_text(text, font, width - 4),
        fill=255,
        font=font,
        anchor="mm",
    )
    grey = torch.from_numpy(np.array(strip, dtype=np.float32)) / 127.5 - 1
    return grey.expand(3, -1, -1)


def _strip_height(width: int) -> int:
    return letter_size(width) * 3 // 2


def save_picture(path: Path, picture: Tensor, parameters: str, record: dict[str, object]) -> None:
    """Writes a picture with its record inside.

    Args:
        path: replaced if it exists; its suffix is one of `PICTURE_FORMATS` and decides the format.
        picture: uint8 [3, height, width] on the CPU
        parameters, record: as `record_options`.

    Raises:
        UserError: the file cannot be written.
    """
    name = PICTURE_FORMATS[path.suffix.lower()].name
    options = record_options(name, parameters, record)
    if name != "PNG":
        options["quality"] = QUALITY
    image = as_image(picture)
    _write_encoded(path, lambda file: image.save(file, format=name, **options))


def record_options(format_name: str, parameters: str, record: dict[str, object]) -> dict[str, Any]:
    """The options of Pillow's `Image.save` that put the record of how a picture was made into its
    file.

    Args:
        format_name: Pillow's name of the format.
        parameters: the record for people. Only PNG holds it, as the text `parameters`.
        record: the record for programs, as JSON: PNG's text `JSON_KEY`; for the other formats
            {`JSON_KEY`: record} in EXIF's ImageDescription.
    """
    if format_name == "PNG":
        text = PngInfo()
        text.add_text("parameters", parameters)
        text.add_text(JSON_KEY, json.dumps(record))
        return {"pnginfo": text}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps({JSON_KEY: record})
    return {"exif": exif}


def save_codes(path: Path, codes: Tensor) -> None:
    """Writes codes as an int32 NumPy array [images, tokens]; raises `UserError` if the file cannot
    be written.
    """
    _write_encoded(path, lambda file: np.save(file, codes.to("cpu", torch.int32).numpy()))


def _write_encoded(path: Path, encode: Callable[[io.BytesIO], object]) -> None:
    """Writes what `encode` gives. It encodes into memory, because libraries that write a file
    themselves lose errors: on a full disk, Pillow's JPEG encoder and NumPy leave a file without its
    end and report success.
    """
    content = io.BytesIO()
    encode(content)
    write_whole(path, lambda file: file.write_bytes(content.getbuffer()))


def individual_file(
    folder: Path, image: int, label: int, class_name: str, *, trained: bool, suffix: str
) -> Path:
    """The file of one image: its place in the batch, class id and name, and "untrained" where the
    picture is noise.
    """
    words = re.sub(r"[^a-z0-9]+", "_", class_name.lower()).strip("_")
    return folder / f"{image:04d}_{label}_{words}{'' if trained else '_untrained'}{suffix}"
