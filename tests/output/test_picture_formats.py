"""Pictures in every format that the commands write: the format follows the name, and the record is
inside.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.errors import UserError
from autoregressive.files import check_file
from autoregressive.output.images import (
    JSON_KEY,
    PICTURE_FORMATS,
    check_grid_fits,
    picture_grid,
    save_picture,
)
from autoregressive.sample import sample_c2i as naive
from autoregressive.serve import sample_c2i as fast

ROOT = Path(__file__).resolve().parents[2]
_DESCRIPTION = 0x010E
TWO_IMAGES = [
    "--class-labels",
    "0",
    "fox",
    "--device",
    "cpu",
    "--random-weights",
    "--gpt-model",
    "GPT-demo",
]


def record_in(path: Path) -> dict[str, object]:
    """The record that a picture's file holds."""
    with Image.open(path) as image:
        image.load()
        if image.format == "PNG":
            return json.loads(image.text[JSON_KEY])  # type: ignore[attr-defined]
        return json.loads(image.getexif()[_DESCRIPTION])[JSON_KEY]


@pytest.mark.parametrize("images", [1, 2, 4, 5, 9])
def test_the_grid_is_that_of_torchvision(images: int) -> None:
    """Fails if a pixel of the grid differs from what torchvision's make_grid, which LlamaGen uses,
    gives.
    """
    utils = pytest.importorskip("torchvision.utils", exc_type=ImportError)
    pixels = torch.randn(images, 3, 7, 5, generator=torch.Generator().manual_seed(images))
    expected = utils.make_grid(pixels, nrow=4, normalize=True, value_range=(-1, 1))
    expected = (expected * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    assert torch.equal(picture_grid(pixels), expected)


@pytest.mark.parametrize(
    ("suffix", "format_name"),
    [(".png", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP")],
)
def test_the_suffix_decides_the_format(tmp_path: Path, suffix: str, format_name: str) -> None:
    """Fails if a file is not what its name says, if its record is lost, or if its pixels are
    others.
    """
    record: dict[str, object] = {"model": "GPT-demo", "labels": [0, 1], "name": "Hündin 犬"}
    path = tmp_path / f"x{suffix}"
    save_picture(path, picture_grid(torch.full((1, 3, 32, 32), 0.5)), "for people", record)
    assert record_in(path) == record
    with Image.open(path) as image:
        assert image.format == format_name
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - 191).max() <= 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("command", [naive, fast])
def test_a_command_writes_the_format_that_the_output_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: object
) -> None:
    """Fails if --output x.webp gives another format, or single pictures another format than the
    grid.
    """
    monkeypatch.chdir(tmp_path)
    command.main([*TWO_IMAGES, "--output", "grid.webp", "--save-individual", "single"])  # type: ignore[attr-defined]
    single = sorted(path.name for path in (tmp_path / "single").iterdir())
    assert single == ["0000_0_dog_untrained.webp", "0001_7_fox_untrained.webp"]
    for path in (tmp_path / "grid.webp", *(tmp_path / "single").iterdir()):
        with Image.open(path) as image:
            assert image.format == "WEBP"
        assert record_in(path)["model"] == "GPT-demo"
    assert record_in(tmp_path / "grid.webp")["labels"] == [0, 7]


@pytest.mark.parametrize("name", ["x.gif", "x", "x.png.tmp"])
def test_another_suffix_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    """Fails if a format that is not written is found out only after the drawing, or not all formats
    are listed.
    """
    with pytest.raises(UserError, match=r"must end in \.png, \.jpg, \.jpeg or \.webp$"):
        check_file("--output", tmp_path / name, *PICTURE_FORMATS)


@pytest.mark.parametrize(
    ("suffix", "captions", "fitting"),
    [(".webp", False, 168), (".webp", True, 144), (".jpg", False, 676), (".jpg", True, 588)],
)
def test_a_grid_that_the_format_does_not_hold_is_refused_before_the_work(
    suffix: str, captions: bool, fitting: int
) -> None:
    """Fails if the encoder's limit shows only after the drawing; `fitting` images of 384 px fit."""
    check_grid_fits("--output", Path(f"x{suffix}"), fitting, 384, captions=captions)
    with pytest.raises(UserError, match=r"use \.png, or draw fewer"):
        check_grid_fits("--output", Path(f"x{suffix}"), fitting + 1, 384, captions=captions)
    check_grid_fits("--output", Path("x.png"), 10 * fitting, 384, captions=captions)


@pytest.mark.parametrize("suffix", PICTURE_FORMATS)
def test_the_largest_grid_of_a_format_is_written(tmp_path: Path, suffix: str) -> None:
    """Fails if a grid that passes the check ends in the encoder's error: as high as can be, with
    the longest record.
    """
    images = 0
    for images in range(4, 2400, 4):  # the smallest images that a model makes give the most of them
        try:
            check_grid_fits("--output", Path(f"x{suffix}"), images + 4, 128, captions=False)
        except UserError:
            break
    record: dict[str, object] = {
        "weights": "ü" * 127,
        "labels": [999_998] * images,
        "class_names": ["class 999998"] * images,
    }
    height = images // 4 * 130 + 2
    save_picture(tmp_path / f"x{suffix}", torch.zeros(3, height, 8, dtype=torch.uint8), "", record)
    assert record_in(tmp_path / f"x{suffix}") == record
