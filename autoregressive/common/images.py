"""Pictures on disk: the grid, captions, and a PNG that says how it was made.

Pixels are [images, 3, height, width] in -1..1, as the tokenizer's decoder gives them. A file is whole or is not there.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from autoregressive.common.files import write_whole

IMAGES_PER_ROW = 4
JSON_KEY = "llamagen"  # of the PNG's text; "parameters" has the same for people
_CAPTION_SHARE = 10  # a caption's letters are this fraction of the picture's width, but stay readable
_SMALLEST_LETTERS = 10  # pixels


def picture_grid(pixels: Tensor, captions: Sequence[str] | None = None) -> Tensor:
    """All images on one picture, four a row with two black pixels between them, as LlamaGen lays them out.

    Args:
        pixels: [images, 3, height, width] in -1..1; what lies outside is clipped.
        captions: one under each image.

    Returns:
        uint8 [3, height of the grid, width of the grid] on the CPU
    """
    cells = pixels.float().cpu()
    if captions is not None:
        strips = torch.stack([_caption_strip(text, cells.shape[-1]) for text in captions])
        cells = torch.cat([cells, strips], dim=2)
    grid = make_grid(cells, nrow=IMAGES_PER_ROW, normalize=True, value_range=(-1, 1))
    return (grid * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut and ended by three dots if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _caption_strip(text: str, width: int) -> Tensor:
    """White letters on black: float32 [3, strip height, width] in -1..1."""
    letters = max(_SMALLEST_LETTERS, width // _CAPTION_SHARE)
    font = ImageFont.load_default(size=letters)
    strip = Image.new("L", (width, letters * 3 // 2))
    centre = (width / 2, strip.height / 2)
    ImageDraw.Draw(strip).text(centre, shortened(text, font, width - 4), fill=255, font=font, anchor="mm")
    grey = torch.from_numpy(np.array(strip, dtype=np.float32)) / 127.5 - 1
    return grey.expand(3, -1, -1)


def save_png(path: Path, picture: Tensor, parameters: str, record: dict[str, object]) -> None:
    """Writes a picture with its parameters inside.

    Args:
        path: replaced if it exists.
        picture: uint8 [3, height, width] on the CPU
        parameters: for people, in the text key `parameters`.
        record: the same for programs, as JSON in the text key `JSON_KEY`.

    Raises:
        UserError: the file cannot be written.
    """
    text = png_text(parameters, record)
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    write_whole(path, lambda file: image.save(file, format="PNG", pnginfo=text))


def png_text(parameters: str, record: dict[str, object]) -> PngInfo:
    """How a picture was made, as `save_png` writes it inside."""
    text = PngInfo()
    text.add_text("parameters", parameters)
    text.add_text(JSON_KEY, json.dumps(record))
    return text


def save_codes(path: Path, codes: Tensor) -> None:
    """Writes codes as an int32 NumPy array [images, tokens]; raises `UserError` if the file cannot be written."""
    array = codes.to("cpu", torch.int32).numpy()
    write_whole(path, lambda file: np.save(file, array))


def individual_file(folder: Path, image: int, label: int, class_name: str, *, trained: bool) -> Path:
    """The file of one image: its place in the batch, class id and name, and "untrained" where the picture is noise."""
    words = re.sub(r"[^a-z0-9]+", "_", class_name.lower()).strip("_")
    return folder / f"{image:04d}_{label}_{words}{'' if trained else '_untrained'}.png"
