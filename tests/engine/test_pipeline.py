"""The front door: classes in, pictures out."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from source_tree import ROOT

import autoregressive
from autoregressive import Pipeline
from autoregressive.errors import UserError
from autoregressive.serve import EngineConfig
from autoregressive.serve.results import GeneratedImage


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """The demo model on the CPU."""
    engine = EngineConfig(max_num_seqs=8, attention_backend="torch")
    return Pipeline.from_pretrained("GPT-demo", device="cpu", engine=engine)


@pytest.fixture
def undrawn(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The same with an engine that has all codes at once: they are 0."""

    def generate(labels: list[int], *_: object, **__: object) -> torch.Tensor:
        return torch.zeros(len(labels), 256, dtype=torch.int32)

    monkeypatch.setattr(pipe.engine, "generate", generate)
    return pipe


def test_each_image_can_be_drawn_again_by_its_seed(pipe: Pipeline, tmp_path: Path) -> None:
    """Fails if images of one call are alike, out of order, or not those of their seeds; or if the
    defaults, the numbers of images, or the engine differ from the command's.
    """
    from autoregressive.serve.sample_c2i import main

    result = pipe(["fox", 2], n=2, seed=7, progress=False)
    assert (result.labels, result.seeds) == ([7, 7, 2, 2], [7, 8, 9, 10])
    assert result.codes.shape == (4, 256)
    assert not torch.equal(result.codes[0], result.codes[1])
    again = pipe(result.labels[1], seed=result.seeds[1], progress=False)
    assert torch.equal(again.codes[0], result.codes[1])
    assert again.images[0].tobytes() == result.images[1].tobytes()
    output = tmp_path / "x.png"
    main(
        ["--gpt-model", "GPT-demo", "--class-labels", "fox", "--seed", "7", "--output", str(output)]
    )
    with Image.open(output) as drawn:
        assert result.images[0].tobytes() == drawn.tobytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_carry_their_parameters(undrawn: Pipeline, tmp_path: Path, suffix: str) -> None:
    """Fails if a saved picture does not say how it was made, whatever its format."""
    [image] = undrawn("fox", seed=7, cfg_scale=1.5, progress=False).images
    path = tmp_path / f"fox{suffix}"
    image.save(path)
    with Image.open(path) as saved:
        text = saved.info.get("llamagen") or json.dumps(
            json.loads(saved.getexif()[270])["llamagen"]
        )
    assert json.loads(text) == image.record
    assert (image.record["seed"], image.record["cfg_scale"]) == (7, 1.5)
    assert image.record["class_name"] == "fox"


def test_pillows_other_ways_to_save_work(undrawn: Pipeline, tmp_path: Path) -> None:
    """Fails if the record gets in the way of Pillow's other uses."""
    [image] = undrawn("fox", seed=7, progress=False).images
    assert isinstance(image, GeneratedImage)
    stream = io.BytesIO()
    image.save(stream, format="png")
    assert b"llamagen" in stream.getvalue()
    image.save(tmp_path / "fox.bmp")
    assert image.resize((32, 32)).size == (32, 32)


def test_a_notebook_shows_the_grid(undrawn: Pipeline) -> None:
    """Fails if a result is shown as text, or the grid lacks an image."""
    result = undrawn("fox", n=5, seed=1, progress=False)
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        assert shown.size == result.grid.size
        assert shown.width == 4 * 130 + 2
        assert shown.height > 2 * 130
    assert (len(result), result[4]) == (5, result.images[4])
    assert "tensor" not in repr(result)


def test_without_a_seed_each_call_differs(undrawn: Pipeline) -> None:
    """Fails if a user who gives no seed gets the same image for ever."""
    assert undrawn("fox", progress=False).seeds != undrawn("fox", progress=False).seeds


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"classes": "foxx"}, "class 'foxx' is unknown; the closest are fox (7)"),
        ({"classes": 64}, "class 64: ids go from 0 to 63"),
        ({"classes": True}, "class True: must be a name or a whole number"),
        ({"classes": b"fox"}, "class b'fox': must be a name or a whole number"),
        ({"classes": []}, "give one or more"),
        ({"classes": "fox", "n": 0}, "n 0: must be 1 to"),
        ({"classes": "fox", "top_p": 2.0}, "top_p 2.0: must be above 0 and at most 1"),
        ({"classes": "fox", "seed": -1}, "seed -1: must be 0 to 2**63 - 1"),
    ],
)
def test_a_mistake_is_a_value_error(
    pipe: Pipeline, arguments: dict[str, object], told: str
) -> None:
    """Fails if a call that cannot be meant draws, or its error does not say what to do."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        pipe(**arguments, progress=False)  # type: ignore[arg-type]
    assert told in str(caught.value)
    assert "--" not in str(caught.value)


def test_a_grid_draws_each_pair_as_a_call_would(pipe: Pipeline) -> None:
    """Fails if an image of a grid is not the one that its settings draw alone, rows and columns are
    exchanged, or a parameter beside the axes is lost.
    """
    grid = pipe.grid(
        {"guidance": (1, 2), "seed": range(7, 9)}, "fox", temperature=0.9, progress=False
    )
    alone = pipe("fox", seed=8, cfg_scale=2, temperature=0.9, progress=False)
    assert torch.equal(grid.codes[3], alone.codes[0])
    assert grid.rows[1][1].tobytes() == alone.images[0].tobytes()
    assert grid.rows[1][1].record == alone.images[0].record
    seen = [[(one.record["seed"], one.record["cfg_scale"]) for one in row] for row in grid.rows]
    assert seen == [[(7, 1.0), (7, 2.0)], [(8, 1.0), (8, 2.0)]]
    assert (grid.seeds, grid.labels) == ([7, 7, 8, 8], [7] * 4)


def test_a_grid_is_an_image_that_says_how_it_was_made(undrawn: Pipeline, tmp_path: Path) -> None:
    """Fails if the image of the whole lacks a picture, its captions or its record."""
    result = undrawn.grid({"class": ["fox", "owl", 0], "top_k": [9, 99]}, progress=False)
    assert (result.labels, len(result.rows), len(result.rows[0])) == ([7, 17, 0] * 2, 2, 3)
    assert result.grid.width > 3 * 130
    assert result.grid.height > 2 * 130
    result.grid.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as saved:
        record = json.loads(saved.info["llamagen"])
        assert saved.info["parameters"].startswith("fox (7), owl (17), dog (0)\n")
    assert record == result.record
    named = {"label": [7, 17, 0], "class_name": ["fox", "owl", "dog"]}
    assert record["axes"] == [named, {"top_k": [9, 99]}]
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        assert shown.size == result.grid.size


def test_a_grids_images_are_decoded_alone(
    undrawn: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a GPU, whose sums depend on the number of images, decodes an image of a grid in
    other company than the same image that is drawn alone.
    """
    sizes: list[int] = []

    def decode(codes: torch.Tensor) -> torch.Tensor:
        sizes.append(len(codes))
        return torch.zeros(len(codes), 3, 128, 128)

    monkeypatch.setattr(undrawn.engine.decoder, "decode", decode)
    undrawn.grid({"seed": [1, 2, 3]}, progress=False)
    assert sizes == [1, 1, 1]


def test_a_grid_without_a_seed_has_one_for_all(undrawn: Pipeline) -> None:
    """Fails if what is compared differs by chance, too, or is the same in every call."""
    first, second = (undrawn.grid({"guidance": [1, 2, 4]}, progress=False) for _ in range(2))
    assert len(set(first.seeds)) == 1
    assert first.seeds != second.seeds
    assert first.labels == [0, 0, 0]
    assert first.rows == [first.images]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"axes": "guidance=1,2"}, "axes: must be a dict, such as {"),
        ({"axes": {}}, "grid: it has one axis or two, and these are 0"),
        ({"axes": {"guidnce": [1]}}, "there is no such axis: did you mean guidance?"),
        ({"axes": {"cfg_scale": [1], "guidance": [2]}}, "this axis is there twice"),
        ({"axes": {"seed": [1.5]}}, "grid seed 1.5: must be a whole number"),
        ({"axes": {"seed": [1]}, "seed": 2}, "grid seed: seed is given, too: leave one"),
        ({"axes": {"class": [1]}, "class_label": 2}, "grid class: class_label is given, too"),
        ({"axes": {"seed": [1]}, "class_label": ["fox", 2]}, "class_label: must be one; the axis"),
        ({"axes": {"seed": [1]}, "class_label": "foxx"}, "class 'foxx' is unknown"),
        ({"axes": {"seed": [1]}, "top_p": 0}, "top_p 0: must be above 0"),
        ({"axes": {"seed": range(10**12)}}, "grid: it has at most 256 pictures"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_a_value_error(
    pipe: Pipeline, arguments: dict[str, Any], told: str
) -> None:
    """Fails if such a grid is drawn, or its error speaks of flags."""
    with pytest.raises(UserError) as caught:
        pipe.grid(**arguments, progress=False)
    assert told in str(caught.value)
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("gpt-xl", {}, "did you mean GPT-XL?"),
        ("nonsense", {}, "use GPT-B"),
        (None, {}, "model None: must be a name or a path"),
        ("GPT-demo", {"engine": "fast"}, "engine fast: must be an EngineConfig"),
        ("missing.pt", {}, "there is no such file or folder"),
        ("GPT-XL", {}, "there are no trained weights for GPT-XL"),
        ("GPT-XL", {"devise": "cpu"}, "there is no option devise: did you mean device?"),
        ("GPT-demo", {"lookahead": 4}, "lookahead is a setting of the engine: give engine=Engine"),
        ("GPT-demo", {"image_size": 300}, "image_size 300: must be 128 for GPT-demo"),
        ("GPT-demo", {"device": "gpu"}, "device gpu: must be cpu, cuda or cuda:N"),
        (
            "GPT-demo",
            {"precision": "int3"},
            "precision int3: there is no such choice: use none",
        ),
    ],
)
def test_a_model_that_is_not_there_is_a_value_error(
    tmp_path: Path, model: Any, options: dict[str, Any], told: str
) -> None:
    """Fails if noise is drawn unasked, or an error speaks of flags."""
    with pytest.raises(UserError) as caught:
        Pipeline.from_pretrained(model, **({"pretrained_dir": tmp_path} | options))
    assert told in str(caught.value)
    assert "--" not in str(caught.value)


def test_a_checkpoint_is_loaded_by_its_path() -> None:
    """Fails if a path is taken for a name."""
    path = ROOT / "pretrained_models" / "demo_gpt.safetensors"
    engine = EngineConfig(max_num_seqs=2, attention_backend="torch")
    pipe = Pipeline.from_pretrained(path, device="cpu", engine=engine)
    assert pipe.model.gpt_model == "GPT-demo"
    assert len(pipe.classes) == 64


def test_lookahead_draws_the_same_images_in_fewer_passes(pipe: Pipeline) -> None:
    """Fails if the setting does not reach the engine, or changes what is drawn."""
    plain, ahead = (
        Pipeline.from_pretrained(
            "GPT-demo", device="cpu", engine=replace(pipe.config, lookahead=setting)
        )
        for setting in ("off", 8)
    )
    params = pipe.defaults.updated(seed=7)
    drawn = [one.draw([7], params, progress=False) for one in (plain, ahead)]
    assert torch.equal(*drawn)
    assert 0 < ahead.engine.totals.passes < 256
    assert ahead.engine.totals.accepted >= 256 - ahead.engine.totals.passes


def test_importing_the_package_imports_no_torch() -> None:
    """Fails if `import autoregressive` takes seconds."""
    code = "import sys, autoregressive, autoregressive.serve; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, check=False)
    assert done.returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'Pipelin'"):
        _ = autoregressive.Pipelin
