"""Makes picture files in memory, with the record of how each was made."""

import io

import numpy as np
from PIL import Image

from autoregressive.output.images import QUALITY, record_options
from autoregressive.output.records import readable
from autoregressive.serve.web.schema import OutputFormat

_PNG_LEVEL = 3  # a third of the time of the library's default, files a few per cent larger
_PREVIEW_QUALITY = 75
_RECORD_BYTES = 16 * 2**10  # more than what is written into a file beside the pixels


def encode_picture(
    pixels: bytes,
    size: int,
    output_format: OutputFormat,
    quality: int | None,
    record: dict[str, object],
) -> bytes:
    """Makes a picture's file.

    Args:
        pixels: uint8 [size, size, 3]
        quality: of jpeg and webp, 0 to 100; None: 90.
        record: how it was made, as of `generation_record` with its class: see `record_options` for
            where.
    """
    picture, file = _picture(pixels, size), io.BytesIO()
    options = record_options(output_format.upper(), readable(record), record)
    if output_format == "png":
        options["compress_level"] = _PNG_LEVEL
    else:
        options["quality"] = QUALITY if quality is None else quality
    picture.save(file, format=output_format.upper(), **options)
    return file.getvalue()


def largest_picture_bytes(size: int) -> int:
    """The largest size of a picture's file: a PNG whose pixels cannot be compressed.

    Args:
        size: pixels of a side.
    """
    return 3 * size * size + _RECORD_BYTES


def encode_preview(pixels: bytes, size: int, output_format: OutputFormat) -> bytes:
    """Makes a preview's file, small and quickly."""
    picture, file = _picture(pixels, size), io.BytesIO()
    options = {"compress_level": 1} if output_format == "png" else {"quality": _PREVIEW_QUALITY}
    if output_format == "webp":
        options["method"] = 0
    picture.save(file, format=output_format.upper(), **options)
    return file.getvalue()


def _picture(pixels: bytes, size: int) -> Image.Image:
    return Image.fromarray(np.frombuffer(pixels, dtype=np.uint8).reshape(size, size, 3))
