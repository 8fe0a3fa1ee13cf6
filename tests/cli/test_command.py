"""The plain command end to end: what it prints, writes and refuses. The demo architecture on the
CPU.
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from autoregressive.errors import UserError
from autoregressive.models.gpt import GPT_models
from autoregressive.output.images import JSON_KEY
from autoregressive.sample import naive, sample_c2i
from tokenizer.tokenizer_image.vq_model import VQ_models

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "autoregressive/sample/sample_c2i.py"


def draw(*typed: str) -> None:
    """Runs the command in this process on the CPU, without weights unless the flags say
    otherwise.
    """
    sample_c2i.main(
        ["--gpt-model", "GPT-demo", "--device", "cpu", "--pretrained-dir", "pretrained", *typed]
    )


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
    """Fails if the command needs a PYTHONPATH, a terminal or weights, or hides that there were
    none.
    """
    typed = [
        "--gpt-model",
        "GPT-demo",
        "--random-weights",
        "--device",
        "cpu",
        "--class-labels",
        "otter",
        "62",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1"
    }
    files = [
        "--output",
        str(tmp_path / "x.png"),
        "--save-codes",
        str(tmp_path / "codes.npy"),
        "--captions",
    ]
    files += ["--save-individual", str(tmp_path / "each")]
    done = subprocess.run(
        [sys.executable, COMMAND, *typed, *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
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


@pytest.mark.usefixtures("small_demo")
def test_same_seed_same_picture_other_seed_other_tokens(work: Path) -> None:
    """Fails if a picture cannot be made again, or the seed does nothing."""
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        draw(
            "--class-labels",
            "3",
            "--cfg-scale",
            "1",
            "--seed",
            seed,
            "--output",
            f"{name}.png",
            "--save-codes",
            f"{name}.npy",
        )
    codes = {name: np.load(f"{name}.npy") for name in "abc"}
    assert np.array_equal(codes["a"], codes["b"])
    assert np.array_equal(pixels_of(work / "a.png"), pixels_of(work / "b.png"))
    assert not np.array_equal(codes["a"], codes["c"])
    assert record_of(work / "c.png")["seed"] == 8


@pytest.mark.usefixtures("small_demo")
def test_the_default_file_says_whether_the_weights_are_trained(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if noise is saved under the name of a picture, or trained weights are reported as
    missing.
    """
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
    assert (record["weights"], record["tokenizer_weights"]) == (
        "demo_gpt.safetensors",
        "demo_vq.safetensors",
    )


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("damaged", ["gpt", "vq"])
def test_weights_that_give_nan_end_in_an_error_that_says_so(work: Path, damaged: str) -> None:
    """Fails if NaN becomes a black picture, or replaces a good one."""
    (work / "x.png").write_bytes(b"old")
    gpt = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64).state_dict()
    vq = VQ_models["VQ-demo"]().state_dict()
    {"gpt": gpt["norm.weight"], "vq": vq["decoder.conv_out.bias"]}[damaged].fill_(torch.nan)
    save_file(gpt, "gpt.safetensors")
    save_file(vq, "vq.safetensors")
    flags = [
        "--gpt-ckpt",
        "gpt.safetensors",
        "--vq-ckpt",
        "vq.safetensors",
        "--class-labels",
        "0",
        "--cfg-scale",
        "1",
    ]
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
def test_a_mistake_leaves_the_existing_picture(
    work: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str]
) -> None:
    """Fails if sampling starts in spite of a mistake, or the picture of the run before is lost."""
    (work / "x.png").write_bytes(b"old")

    def sampled(*_: object, **__: object) -> None:
        pytest.fail("sampling began")

    monkeypatch.setattr(naive, "generate", sampled)
    with pytest.raises(UserError):
        draw("--output", "x.png", *typed)
    assert (work / "x.png").read_bytes() == b"old"
    assert os.listdir(work) == ["x.png"]


def test_a_mistake_is_one_line_with_status_2() -> None:
    """Fails if the user sees a traceback."""
    typed = ["--gpt-model", "GPT-B", "--class-labels", "golden retreiver"]
    done = subprocess.run(
        [sys.executable, COMMAND, *typed], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "golden retriever (207)" in done.stderr


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't")],
)
def test_too_little_memory_is_one_line(
    work: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    """Fails if running out of memory ends in a traceback, or does not say what to do."""

    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(naive, "generate", exhausted)
    with pytest.raises(UserError, match="fewer than 8 pictures"):
        draw()
    assert os.listdir(work) == []


def test_other_failures_are_not_dressed_up(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a bug is reported as the user's mistake."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(naive, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        draw()


def test_the_flags_reach_the_loop(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a sampling flag is parsed and then forgotten."""
    seen: dict[str, object] = {}

    def fake(model: object, labels: torch.Tensor, tokens: int, **rest: object) -> torch.Tensor:
        seen.update(rest, labels=labels.tolist(), tokens=tokens)
        return torch.zeros(len(labels), tokens, dtype=torch.int32)

    monkeypatch.setattr(naive, "generate", fake)
    expected = {"cfg_scale": 3.0, "cfg_interval": 5, "temperature": 0.5, "top_k": 9, "top_p": 0.25}
    flags = [
        word
        for name, value in expected.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    draw(*flags, "--class-labels", "fox", "1")
    seen.pop("on_token")
    assert seen.pop("sample_logits") is True
    assert seen == expected | {"labels": [7, 1], "tokens": 256}


def test_classes_are_listed_and_nothing_is_drawn(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if --list-classes draws, or shows nothing."""
    draw("--list-classes", "ion")
    assert capsys.readouterr().out.splitlines() == ["   9  lion"]
    assert os.listdir(work) == []


def test_a_reader_that_left_does_not_cost_the_picture(tmp_path: Path) -> None:
    """Fails if the command prints before it saves, so that `| head` or a closed window loses the
    work.
    """
    words = [
        sys.executable,
        "-u",
        COMMAND,
        "--gpt-model",
        "GPT-demo",
        "--random-weights",
        "--device",
        "cpu",
    ]
    words += ["--class-labels", "0", "--cfg-scale", "1", "--output", str(tmp_path / "x.png")]
    line = f"set -o pipefail; {shlex.join(words)} | true"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert pixels_of(tmp_path / "x.png").shape == (128, 128, 3)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.usefixtures("small_demo")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_stdout_that_is_full_does_not_cost_the_picture(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a line that cannot be printed loses the work."""
    with open("/dev/full", "wb", buffering=0) as full:
        stdout = io.TextIOWrapper(full, write_through=True)
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(OSError, match="No space left"):
            draw("--class-labels", "0", "--cfg-scale", "1", "--output", "x.png")
        stdout.detach()
    assert pixels_of(work / "x.png").shape == (128, 128, 3)


@pytest.mark.usefixtures("small_demo")
def test_without_stderr_nothing_is_said(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a closed stderr ends the command, or sends its warnings to stdout."""
    monkeypatch.setattr(sys, "stderr", None)
    draw("--class-labels", "0", "--cfg-scale", "1", "--output", "x.png")
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert pixels_of(work / "x.png").shape == (128, 128, 3)


BRIEF_COMMAND = """
from autoregressive.cli.command import run_command
from autoregressive.errors import UserError, tell
def main():
    tell("a note")
    print("a line")
    {end}
run_command(main)
"""


@pytest.mark.parametrize(
    ("end", "streams", "status", "out", "errors"),
    [
        ("pass", "", 0, "a line\n", ["a note"]),
        ("pass", "| true", 141, "", ["a note"]),
        ("pass", "> /dev/full", 2, "", ["a note", "-c: error: [Errno 28] No space left on device"]),
        ("pass", ">&-", 0, "", ["a note"]),
        ("pass", "2>&-", 0, "a line\n", []),
        ("pass", "2> /dev/full", 0, "a line\n", []),
        ("raise UserError('mend this')", "", 2, "a line\n", ["a note", "-c: error: mend this"]),
        ("raise UserError('mend this')", "2>&-", 2, "a line\n", []),
        (
            "open('missing')",
            "",
            2,
            "a line\n",
            ["a note", "-c: error: [Errno 2] No such file or directory: 'missing'"],
        ),
        ("raise KeyboardInterrupt", "", 130, "a line\n", ["a note", "", "-c: interrupted"]),
    ],
)
@pytest.mark.parametrize("flag", ["-u", "-B"])  # -B changes nothing here: stdout is buffered
def test_every_end_has_its_status_and_at_most_one_line(
    end: str, streams: str, status: int, out: str, errors: list[str], flag: str
) -> None:
    """Fails if an end shows a traceback, a false status, or a promise that is not true of every
    command.
    """
    sleep = "sleep 0.3; " if streams == "| true" else ""  # until the reader has left
    program = shlex.join([sys.executable, flag, "-c", BRIEF_COMMAND.format(end=end)])
    line = f"unset PYTHONUNBUFFERED; set -o pipefail; {{ {sleep}{program}; }} {streams}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (status, out, errors)


@pytest.mark.usefixtures("small_demo")
def test_the_record_says_all_that_the_picture_depends_on(work: Path) -> None:
    """Fails if the picture cannot be made again from its record, or every single one carries the
    whole batch's labels.
    """
    draw(
        "--class-labels",
        "0",
        "7",
        "--cfg-scale",
        "1",
        "--num-classes",
        "9",
        "--output",
        "x.png",
        "--save-individual",
        "each",
    )
    whole = record_of(work / "x.png")
    sizes = {
        "loop": "naive",
        "ema": False,
        "codebook_size": 1024,
        "codebook_embed_dim": 8,
        "num_classes": 9,
        "downsample_size": 8,
    }
    assert sizes.items() <= whole.items()
    assert whole["labels"] == [0, 7]
    record = record_of(work / "each" / "0001_7_class_7_untrained.png")
    assert sizes.items() <= record.items()
    single = {"images": 2, "image": 1, "label": 7, "class_name": "class 7"}
    assert single.items() <= record.items()
    assert not {"labels", "class_names"} & record.keys()
    with Image.open(work / "each" / "0001_7_class_7_untrained.png") as image:
        assert "class 7 (7)" in image.text["parameters"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("script", [COMMAND, "autoregressive/serve/sample_c2i.py"])
def test_a_terminal_sees_a_bar_even_one_that_states_no_size(tmp_path: Path, script: str) -> None:
    """tqdm alone draws nothing on a terminal of 0 columns, such as one made by a remote shell."""
    terminal, end = os.openpty()
    command = [
        sys.executable,
        script,
        "--device",
        "cpu",
        "--class-labels",
        "fox",
        "--output",
        str(tmp_path / "x.png"),
    ]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")
    }
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=end, env=environment
    ) as process:
        os.close(end)
        shown = ""
        with contextlib.suppress(OSError):  # how the end of a terminal's output is read
            while part := os.read(terminal, 4096):
                shown += part.decode(errors="replace")
    os.close(terminal)
    assert process.returncode == 0
    assert re.search(r"sampling: +\d+%.*/256 \[.*tokens/s", shown)
