"""The naive command end to end: what it prints, writes and refuses. The demo architecture on the CPU."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from autoregressive.common.errors import UserError
from autoregressive.common.images import JSON_KEY
from autoregressive.models.gpt import GPT_models
from autoregressive.sample import sample_c2i
from tokenizer.tokenizer_image.vq_model import VQ_models

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "autoregressive/sample/sample_c2i.py"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; the process's switches are put back afterwards, for other tests need IEEE float32."""
    monkeypatch.chdir(tmp_path)
    switches = [
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "benchmark"),
    ]
    before = [getattr(owner, name) for owner, name in switches]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other make small steps 30 times slower
    yield tmp_path
    torch.set_num_threads(threads)
    for (owner, name), value in zip(switches, before, strict=True):
        setattr(owner, name, value)


def draw(*typed: str) -> None:
    """Runs the command in this process on the CPU, without weights unless the flags say otherwise."""
    sample_c2i.main(["--gpt-model", "GPT-demo", "--device", "cpu", "--pretrained-dir", "pretrained", *typed])


def record_of(path: Path) -> dict[str, object]:
    """What a picture says about itself."""
    with Image.open(path) as image:
        image.load()
        return json.loads(image.text[JSON_KEY])  # type: ignore[attr-defined]


def pixels_of(path: Path) -> np.ndarray:
    """uint8 [height, width, 3]"""
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_command_runs_as_typed_and_owns_up_to_noise(tmp_path: Path) -> None:
    """Fails if the command needs a PYTHONPATH, a terminal or weights, or hides that there were none."""
    typed = ["--gpt-model", "GPT-demo", "--random-weights", "--device", "cpu", "--class-labels", "otter", "62"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    files = ["--output", str(tmp_path / "x.png"), "--save-codes", str(tmp_path / "codes.npy"), "--captions"]
    files += ["--save-individual", str(tmp_path / "each")]
    done = subprocess.run(
        [sys.executable, COMMAND, *typed, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"gpt sampling takes about \d+\.\d\d seconds\.", lines[0])
    assert re.fullmatch(r"decoder takes about \d+\.\d\d seconds\.", lines[1])
    assert lines[2] == f"image is saved to {tmp_path / 'x.png'}"
    assert "noise" in done.stderr
    assert "\r" not in done.stderr  # no progress bar: this is no terminal
    assert len(lines) == 3

    height, width, _ = pixels_of(tmp_path / "x.png").shape
    assert width == 2 + 2 * 130
    assert height > 132  # captions
    record = record_of(tmp_path / "x.png")
    assert record["trained"] is False
    assert record["weights"] == record["tokenizer_weights"] == "untrained"
    assert (record["labels"], record["class_names"]) == ([1, 62], ["otter", "soccer ball"])
    with Image.open(tmp_path / "x.png") as image:
        assert "untrained" in image.text["parameters"]  # type: ignore[attr-defined]
    codes = np.load(tmp_path / "codes.npy")
    assert (codes.shape, codes.dtype) == ((2, 256), np.int32)
    assert codes.min() >= 0
    assert codes.max() < 1024
    each = sorted(path.name for path in (tmp_path / "each").iterdir())
    assert each == ["0000_1_otter_untrained.png", "0001_62_soccer_ball_untrained.png"]
    single = pixels_of(tmp_path / "each" / each[1])
    assert np.array_equal(single, pixels_of(tmp_path / "x.png")[2:130, 132:260])


def test_same_seed_same_picture_other_seed_other_tokens(work: Path) -> None:
    """Fails if a picture cannot be made again, or the seed does nothing."""
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        draw("--class-labels", "3", "--seed", seed, "--output", f"{name}.png", "--save-codes", f"{name}.npy")
    codes = {name: np.load(f"{name}.npy") for name in "abc"}
    assert np.array_equal(codes["a"], codes["b"])
    assert np.array_equal(pixels_of(work / "a.png"), pixels_of(work / "b.png"))
    assert not np.array_equal(codes["a"], codes["c"])
    assert record_of(work / "c.png")["seed"] == 8


def test_the_default_file_says_whether_the_weights_are_trained(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if noise is saved under the name of a picture, or trained weights are reported as missing."""
    draw("--class-labels", "0", "--cfg-scale", "1")
    assert sorted(path.name for path in work.iterdir()) == ["sample_c2i_untrained.png"]
    assert "UNTRAINED" in capsys.readouterr().err

    (work / "pretrained").mkdir()
    gpt = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64)
    gpt.init_weights()
    save_file(gpt.state_dict(), "pretrained/demo_gpt.safetensors")
    save_file(VQ_models["VQ-demo"]().state_dict(), "pretrained/demo_vq.safetensors")
    draw("--class-labels", "0", "--cfg-scale", "1")
    assert capsys.readouterr().err == ""
    record = record_of(work / "sample_c2i.png")
    assert record["trained"] is True
    assert (record["weights"], record["tokenizer_weights"]) == ("demo_gpt.safetensors", "demo_vq.safetensors")


@pytest.mark.parametrize("damaged", ["gpt", "vq"])
def test_weights_that_give_nan_end_in_an_error_that_says_so(work: Path, damaged: str) -> None:
    """Fails if NaN becomes a black picture, or replaces a good one."""
    (work / "x.png").write_bytes(b"old")
    gpt = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64).state_dict()
    vq = VQ_models["VQ-demo"]().state_dict()
    {"gpt": gpt["norm.weight"], "vq": vq["decoder.conv_out.bias"]}[damaged].fill_(torch.nan)
    save_file(gpt, "gpt.safetensors")
    save_file(vq, "vq.safetensors")
    flags = ["--gpt-ckpt", "gpt.safetensors", "--vq-ckpt", "vq.safetensors", "--class-labels", "0", "--cfg-scale", "1"]
    with pytest.raises(UserError, match="NaN"):
        draw(*flags, "--output", "x.png")
    assert (work / "x.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    "typed",
    [
        ["--class-labels", "unicorn"],
        ["--class-labels", "64"],
        ["--gpt-type", "t2i"],
        ["--image-size", "384"],
        ["--gpt-ckpt", "missing.pt"],
        ["--gpt-ckpt", "x.png"],
        ["--save-codes", "missing/codes.npy"],
        ["--temperature", "nan"],
    ],
)
def test_a_mistake_leaves_the_existing_picture(work: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str]) -> None:
    """Fails if sampling starts in spite of a mistake, or the picture of the run before is lost."""
    (work / "x.png").write_bytes(b"old")

    def sampled(*_: object, **__: object) -> None:
        pytest.fail("sampling began")

    monkeypatch.setattr(sample_c2i, "generate", sampled)
    with pytest.raises(UserError):
        draw("--output", "x.png", *typed)
    assert (work / "x.png").read_bytes() == b"old"
    assert os.listdir(work) == ["x.png"]


def test_a_mistake_is_one_line_with_status_2() -> None:
    """Fails if the user sees a traceback."""
    typed = ["--gpt-model", "GPT-B", "--class-labels", "golden retreiver"]
    done = subprocess.run([sys.executable, COMMAND, *typed], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "golden retriever (207)" in done.stderr


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't")])
def test_too_little_memory_is_one_line(work: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    """Fails if running out of memory ends in a traceback, or does not say what to do."""

    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(sample_c2i, "generate", exhausted)
    with pytest.raises(UserError, match="fewer than 8 pictures"):
        draw()
    assert os.listdir(work) == []


def test_other_failures_are_not_dressed_up(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a bug is reported as the user's mistake."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sample_c2i, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        draw()


def test_the_flags_reach_the_loop(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a sampling flag is parsed and then forgotten."""
    seen: dict[str, object] = {}

    def fake(model: object, labels: torch.Tensor, tokens: int, **rest: object) -> torch.Tensor:
        seen.update(rest, labels=labels.tolist(), tokens=tokens)
        return torch.zeros(len(labels), tokens, dtype=torch.int32)

    monkeypatch.setattr(sample_c2i, "generate", fake)
    expected = {"cfg_scale": 3.0, "cfg_interval": 5, "temperature": 0.5, "top_k": 9, "top_p": 0.25}
    flags = [word for name, value in expected.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    draw(*flags, "--class-labels", "fox", "1")
    seen.pop("on_token")
    assert seen == expected | {"labels": [7, 1], "tokens": 256}


def test_classes_are_listed_and_nothing_is_drawn(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if --list-classes draws, or shows nothing."""
    draw("--list-classes", "ion")
    assert capsys.readouterr().out.splitlines() == ["   9  lion"]
    assert os.listdir(work) == []
