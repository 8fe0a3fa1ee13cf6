"""A record that a picture's file cannot hold is refused before the drawing; one that fits is
written whole.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from autoregressive.cli.drawing import Settings, resolve_settings, save_results
from autoregressive.cli.flags import build_parser
from autoregressive.errors import UserError
from autoregressive.output.images import JSON_KEY, PICTURE_FORMATS, check_record_fits, save_picture
from autoregressive.weights.finding import FoundWeights

LONGEST_NAME = "\u00fc" * 127  # of a file: 254 bytes, each letter six characters of JSON
COMMAND = [
    "--gpt-model",
    "GPT-demo",
    "--random-weights",
    "--device",
    "cpu",
    "--seed",
    str(2**63 - 1),
]


def settings_of(images: int, path: Path) -> Settings:
    """As for a command that is to draw so many dogs."""
    arguments = [*COMMAND, "--output", str(path), "--class-labels", *["dog"] * images]
    return resolve_settings(build_parser("", "").parse_args(arguments))


def fits(path: Path, images: int, name: str) -> bool:
    try:
        check_record_fits("--output", path, [0] * images, [name] * images)
    except UserError:
        return False
    return True


def json_in(path: Path) -> object:
    with Image.open(path) as image:
        image.load()
        if image.format == "PNG":
            return json.loads(image.text[JSON_KEY])  # type: ignore[attr-defined]
        return json.loads(image.getexif()[0x010E])[JSON_KEY]


def test_what_pillow_takes_is_what_is_written_down(tmp_path: Path) -> None:
    """Fails if JPEG's largest record is not the one that Pillow writes and reads."""
    most = PICTURE_FORMATS[".jpg"].largest_record
    assert most is not None
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    record: dict[str, object] = {"x": ""}
    record["x"] = "x" * (most - len(json.dumps({JSON_KEY: record})))
    save_picture(tmp_path / "x.jpg", picture, "", record)
    assert json_in(tmp_path / "x.jpg") == record
    with pytest.raises(ValueError, match="too long"):
        save_picture(tmp_path / "x.jpg", picture, "", record | {"x": f"{record['x']}x"})


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_other_formats_hold_a_long_record(tmp_path: Path, suffix: str) -> None:
    """Fails if the message advises a format that has no room either."""
    labels, path = [123] * 100_000, tmp_path / f"x{suffix}"
    check_record_fits("--output", path, labels, ["dog"] * len(labels))
    record: dict[str, object] = {"labels": labels}
    save_picture(path, torch.zeros(3, 8, 8, dtype=torch.uint8), "", record)
    assert json_in(path) == record


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG"])
def test_a_record_that_does_not_fit_is_refused_before_the_drawing(
    tmp_path: Path, suffix: str
) -> None:
    """Fails if the pictures are drawn, and lost to a traceback."""
    labels = list(range(10_000))
    with pytest.raises(
        UserError, match=r"^--output .*: .*10000 images.*use \.png or \.webp, or draw fewer$"
    ):
        check_record_fits("--output", tmp_path / f"x{suffix}", labels, ["dog"] * len(labels))


def test_a_command_looks_at_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the settings are taken although the record of so many images does not fit."""
    monkeypatch.setattr(
        "autoregressive.cli.drawing.check_grid_fits", lambda *arguments, **options: None
    )
    with pytest.raises(UserError, match=r"^output "):
        settings_of(10_000, tmp_path / "x.jpg")
    settings_of(10_000, tmp_path / "x.webp")


def test_a_record_that_passes_the_check_can_be_written(tmp_path: Path) -> None:
    """Fails if what a record holds besides its classes is more than the check allows for."""
    settings = settings_of(1, tmp_path / "x.jpg")
    path = tmp_path / "x.jpg"
    fitting = max(
        images for images in range(0, 10_000, 50) if fits(path, images, settings.model.classes[0])
    )
    labels = [0] * fitting
    weights = tmp_path / LONGEST_NAME
    settings = replace(settings, labels=tuple(labels))
    pixels = torch.zeros(len(labels), 3, 1, 1)
    found = FoundWeights(weights, weights)
    save_results(settings, found, torch.zeros(1, 1), pixels, (1.0, 1.0), loop="paged")
    record = json_in(path)
    assert isinstance(record, dict)
    assert record["labels"] == labels
    assert record["weights"] == LONGEST_NAME
