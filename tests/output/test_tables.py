"""A grid with axes as one picture: its pictures whole and in order, its captions beside them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from refusals import refused

from autoregressive.models.axes import GridAxes
from autoregressive.models.classes import IMAGENET
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.output.images import as_bytes, picture_grid, save_picture
from autoregressive.output.records import axes_record, image_record, readable
from autoregressive.output.tables import PictureTable, axes_picture, check_axes_fit

LONGEST = max(IMAGENET.names, key=len)
SEEDS = [f"seed {2**63 - 1 - step}" for step in range(3)]


def random_pictures(count: int, side: int) -> torch.Tensor:
    """Pictures without a black pixel: uint8 [count, 3, side, side]"""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def split_table(
    table: PictureTable, whole: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The pictures of a table, found by the black between them; the paper above; the paper to the
    left.
    """
    rows, columns = len(table.rows), len(table.columns)
    pitch = table.side + 2
    top = whole.shape[1] - rows * pitch
    left = table._left
    across = (whole.shape[2] - left) // columns
    indent = (across - pitch) // 2
    pictures = [
        whole[
            :,
            top + row * pitch : top + row * pitch + table.side,
            left + column * across + indent : left + column * across + indent + table.side,
        ]
        for row in range(rows)
        for column in range(columns)
    ]
    return pictures, whole[0, :top], whole[0, top:, :left]


@pytest.mark.parametrize("side", [32, 128, 384])
@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        (["guidance 1", "guidance 2"], ["seed 1", "seed 2", "seed 10"]),
        (SEEDS, [LONGEST, "alp"]),
        ([LONGEST, LONGEST, LONGEST], SEEDS),
        (["x"], ["y"]),
    ],
)
def test_pictures_and_captions_stand_clear_of_each_other(
    side: int, columns: list[str], rows: list[str]
) -> None:
    """Fails if a picture is covered or out of order, or a caption is missing, cut by an edge, or
    runs into its neighbour.
    """
    table = PictureTable(side, columns, rows)
    drawn = random_pictures(len(columns) * len(rows), side)
    whole = table.filled(drawn)
    assert whole.shape == (3, table.height, table.width)
    pictures, above, beside = split_table(table, whole)
    for picture, expected in zip(pictures, drawn, strict=True):
        assert torch.equal(picture, expected)

    assert not above[[0, -1]].any()
    assert not above[:, : table._left].any()
    for heading in above[:, table._left :].split(table._pitch, dim=1):
        inked = heading.any(dim=0).nonzero().flatten()
        assert len(inked)
        assert inked[0] > 0
        assert inked[-1] < table._pitch - 2
    assert not beside[:, [0, -1]].any()
    for label in beside.split(side + 2):
        assert label.any()
        assert not label[[0, -1]].any()


def test_letters_shrink_before_the_table_grows() -> None:
    """Fails if a long name makes a table of large pictures wide, or letters too small to read."""
    assert PictureTable(256, [LONGEST], ["seed 1"])._pitch < 256 + 30
    sizes = [
        PictureTable(side, [text], ["seed 1"])._font.getbbox("seed")[3]
        for side, text in ((256, "fox"), (256, LONGEST), (32, LONGEST), (32, "fox"))
    ]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3]


def test_one_axis_stands_four_a_row() -> None:
    """Fails if sixteen seeds become a strip of sixteen pictures, or stand without captions."""
    axes = GridAxes.parse(["seed=1..5"], IMAGENET)
    pixels = torch.zeros(5, 3, 64, 64)
    assert torch.equal(axes_picture(pixels, axes), picture_grid(pixels, axes.columns.captions))


def test_two_axes_stand_in_a_table() -> None:
    """Fails if the first axis does not go from left to right."""
    axes = GridAxes.parse(["guidance=1,2,3", "seed=1,2"], IMAGENET)
    pixels = torch.rand(6, 3, 64, 64)
    table = PictureTable(64, axes.columns.captions, ("seed 1", "seed 2"))
    assert torch.equal(axes_picture(pixels, axes), table.filled(as_bytes(pixels)))


def test_a_table_that_the_format_does_not_hold_is_refused_before_the_work() -> None:
    """Fails if a long row of pictures is drawn and then cannot be written."""
    wide, high = (
        GridAxes.parse(texts, IMAGENET)
        for texts in (["seed=1..100", "guidance=2"], ["guidance=2", "seed=1..100"])
    )
    for axes, direction in ((wide, "wide"), (high, "high")):
        check_axes_fit("--output", Path("x.png"), 384, axes)
        with refused(match=f"pixels {direction}, and such a file holds 16383"):
            check_axes_fit("--output", Path("x.webp"), 384, axes)
    check_axes_fit("--output", Path("x.webp"), 384, GridAxes.parse(["seed=1..100"], IMAGENET))


COMMON: dict[str, object] = {"model": "GPT-B", "trained": True}


@pytest.mark.parametrize(
    "texts", [["guidance=1,2", "seed=5..7"], ["class=0,7", "top-k=9"], ["seed=3", "class=1,2"]]
)
def test_the_record_of_a_grid_has_that_of_each_picture(texts: list[str]) -> None:
    """Fails if a picture of the grid cannot be drawn again from the grid's file."""
    axes, params = GridAxes.parse(texts, IMAGENET), SamplingParams(temperature=0.5)
    record = axes_record(COMMON, params, axes, label=4, class_name=IMAGENET[4])
    whole = json.loads(json.dumps(record))
    across, down = whole.pop("axes")
    width = len(axes.columns.values)
    for index, (label, own) in enumerate(axes.cells(4, params)):
        varied = {key: values[index % width] for key, values in across.items()}
        varied |= {key: values[index // width] for key, values in down.items()}
        assert not varied.keys() & whole.keys()
        expected = image_record(COMMON, own, label=label, class_name=IMAGENET[label])
        assert whole | varied == expected


def test_people_read_which_settings_vary() -> None:
    """Fails if the text of a grid's file lacks its classes or its values."""
    params = SamplingParams()
    axes = GridAxes.parse(["class=207,360", "guidance=1.5,4"], IMAGENET)
    text = readable(axes_record(COMMON, params, axes, label=4, class_name=IMAGENET[4]))
    assert text.splitlines()[0] == "golden retriever (207), otter (360)"
    assert "cfg scale: 1.5 | 4.0" in text
    axes = GridAxes.parse(["seed=1,2"], IMAGENET)
    text = readable(axes_record(COMMON, params, axes, label=207, class_name="golden retriever"))
    assert text.splitlines()[0] == "golden retriever (207)"
    assert "seed: 1 | 2" in text


def test_the_largest_record_fits_into_a_jpeg(tmp_path: Path) -> None:
    """Fails if a grid of many classes is drawn, and its record then has no room in the file."""
    longest = sorted(range(1000), key=lambda label: len(IMAGENET[label]))[-256:]
    axes = GridAxes.of([("class", longest)], IMAGENET)
    record = axes_record(COMMON, SamplingParams(), axes, label=0, class_name="")
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    save_picture(tmp_path / "x.jpg", picture, "", record)
    with Image.open(tmp_path / "x.jpg") as image:
        assert json.loads(image.getexif()[270])["llamagen"]["axes"][0]["label"] == longest
