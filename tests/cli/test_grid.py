"""--grid end to end: its pictures are those that the command draws alone, and its files say how."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from safetensors.torch import save_file

from autoregressive.cli import drawing
from autoregressive.models.gpt import GPT_models
from autoregressive.output.images import JSON_KEY
from autoregressive.sample import sample_c2i as plain
from autoregressive.serve import sample_c2i as engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine_flags import MOST_ROWS
from autoregressive.weights.published import DEMO_GPT, DEMO_VQ
from tokenizer.tokenizer_image.vq_model import VQ_models

FLAGS = ["--gpt-model", "GPT-demo", "--device", "cpu"]
BOTH = pytest.mark.parametrize("main", [plain.main, engine.main], ids=["plain", "engine"])
Main = Callable[[list[str]], None]


def record_of(path: Path) -> dict[str, object]:
    """The record inside a PNG."""
    with Image.open(path) as image:
        loaded: dict[str, object] = json.loads(image.info[JSON_KEY])
    return loaded


def pixels_of(path: Path) -> np.ndarray:
    """uint8 [height, width, 3]"""
    with Image.open(path) as image:
        return np.asarray(image)


def check_picture(main: Main, work: Path, index: int, *settings: str) -> None:
    """Draws one picture alone, and compares it with one of the grid in `work`."""
    files = ["--output", f"{index}.png", "--save-codes", f"{index}.npy"]
    main([*FLAGS, *settings, *files, "--save-individual", str(index)])
    [one] = (work / str(index)).iterdir()
    [of_grid] = (work / "each").glob(f"{index:04d}_*.png")
    assert np.array_equal(np.load("all.npy")[index], np.load(f"{index}.npy")[0])
    assert np.array_equal(pixels_of(of_grid), pixels_of(one))
    assert record_of(of_grid) == record_of(one)


def test_each_picture_is_the_one_that_is_drawn_alone(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a picture of the grid depends on the others, has another's settings, stands
    elsewhere, or its file does not tell how it was made; with the demo model's own weights.
    """
    files = ["--output", "all.png", "--save-codes", "all.npy", "--save-individual", "each"]
    axes = ["guidance=1,4", "seed=7..9"]
    engine.main([*FLAGS, "--class-labels", "owl", "--top-k", "500", *files, "--grid", *axes])
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    assert lines[2:4] == [
        "image is saved to all.png",
        "it has 6 pictures of owl: guidance 1, 4 from left to right; seed 7, 8, 9 from top to "
        "bottom",
    ]
    assert re.match(r"\d+ tokens/s", lines[4])
    for index, guidance, seed in ((1, "4", "7"), (4, "1", "9")):
        typed = ["--class-labels", "owl", "--top-k", "500"]
        check_picture(engine.main, work, index, *typed, "--cfg-scale", guidance, "--seed", seed)

    whole = pixels_of(work / "all.png")
    top, left = whole.shape[0] - 3 * 130, whole.shape[1] - 2 * 130
    for index, path in enumerate(sorted((work / "each").iterdir())):
        row, column = top + index // 2 * 130, left + index % 2 * 130
        assert np.array_equal(whole[row : row + 128, column : column + 128], pixels_of(path))
    assert record_of(work / "all.png")["axes"] == [{"cfg_scale": [1.0, 4.0]}, {"seed": [7, 8, 9]}]


@BOTH
@pytest.mark.usefixtures("small_demo")
def test_both_commands_draw_grids_of_classes(work: Path, main: Main) -> None:
    """Fails if the plain loop draws a grid's pictures in one batch, whose generator they would
    share; or the classes of an axis do not reach the files.
    """
    (work / "pretrained").mkdir()  # --random-weights would depend on the seed
    gpt = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64)
    gpt.init_weights()
    save_file(gpt.state_dict(), f"pretrained/{DEMO_GPT}")
    save_file(VQ_models["VQ-demo"]().state_dict(), f"pretrained/{DEMO_VQ}")
    typed = ["--pretrained-dir", "pretrained", "--temperature", "0.7"]
    files = ["--output", "all.png", "--save-codes", "all.npy", "--save-individual", "each"]
    main([*FLAGS, *typed, *files, "--grid", "seed=1,2", "--grid", "class=fox,soccer ball"])
    assert sorted(path.name for path in (work / "each").iterdir()) == [
        "0000_7_fox.png",
        "0001_7_fox.png",
        "0002_62_soccer_ball.png",
        "0003_62_soccer_ball.png",
    ]
    check_picture(main, work, 3, *typed, "--class-labels", "62", "--seed", "2")


@BOTH
@pytest.mark.usefixtures("small_demo")
def test_one_axis_alone_takes_the_first_class(
    work: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a grid without a class is refused, draws all eight, or says nothing of the class."""
    main([*FLAGS, "--random-weights", "--output", "x.jpg", "--grid", "temperature=0.5,1"])
    assert "it has 2 pictures of dog: temperature 0.5, 1\n" in capsys.readouterr().out
    with Image.open(work / "x.jpg") as image:
        assert image.width == 2 + 2 * 130
        record = json.loads(image.getexif()[270])[JSON_KEY]
    assert (record["label"], record["axes"]) == (0, [{"temperature": [0.5, 1.0]}])


@BOTH
@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--grid guidnce=1", "--grid guidnce: there is no such axis: did you mean guidance?"),
        ("--grid guidance=1001", "--grid guidance 1001: must be 0 to 1000"),
        ("--grid seed=1,2 --seed 3", "--grid seed: --seed is given, too: leave one of the two out"),
        ("--grid guidance=1,2 --cfg-scale 3", "--grid guidance: --cfg-scale is given, too"),
        ("--grid class=0,1 --class-labels 3", "--grid class: --class-labels is given, too"),
        (
            "--grid seed=1,2 --class-labels fox 3",
            "--class-labels: a grid draws one class; give several as an axis, such as --grid "
            "class=fox,3",
        ),
        ("--grid seed=1 --grid seed=2", "--grid seed: this axis is there twice"),
        ("--grid class=64", "class 64: ids go from 0 to 63 (see --list-classes)"),
        ("--grid seed=1..257", "--grid: it has at most 256 pictures, and these are 257"),
        ("--grid seed=1..200 guidance=2 --output x.webp", "pixels wide, and such a file holds"),
    ],
)
def test_a_mistake_is_found_before_loading(
    work: Path, monkeypatch: pytest.MonkeyPatch, main: Main, typed: str, told: str
) -> None:
    """Fails if anything is loaded in spite of a mistake, or the picture before is lost."""
    (work / "x.webp").write_bytes(b"old")

    def loaded(*_: object, **__: object) -> None:
        pytest.fail("weights were looked for")

    monkeypatch.setattr(drawing, "find_weights", loaded)
    with refused(match=re.escape(told)):
        main([*FLAGS, *typed.split()])
    assert (work / "x.webp").read_bytes() == b"old"
    assert os.listdir(work) == ["x.webp"]


def test_the_engine_has_rows_for_all_pictures(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if pictures wait for each other though there is room, or guidance of the axis is
    overlooked where the model's own default has none, or the other way round.
    """
    seen: list[int] = []

    def pipeline(model: object, found: object, config: EngineConfig) -> None:
        seen.append(config.max_num_seqs)
        raise InterruptedError

    monkeypatch.setattr("autoregressive.serve.pipeline.Pipeline", pipeline)
    for axes in (["guidance=1,2", "seed=1..3"], ["guidance=2", "seed=1..3"], ["seed=1..256"]):
        with pytest.raises(InterruptedError):
            engine.main([*FLAGS, "--grid", *axes])
    assert seen == [9, 6, MOST_ROWS]
    with refused(match="the request needs 2 rows"):
        engine.main([*FLAGS, "--grid", "guidance=1,2", "--max-num-seqs", "1"])
