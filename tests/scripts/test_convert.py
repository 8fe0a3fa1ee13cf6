"""The conversion to safetensors: the same weights under plain names, written whole or not
at all.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import convert_checkpoint
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoregressive.weights.checkpoint import CheckpointError, open_checkpoint
from autoregressive.weights.conversion import convert as convert_weights

ROOT = Path(__file__).resolve().parents[2]


def convert(
    *arguments: object, file_limit_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/convert_checkpoint.py", *map(str, arguments)]
    if file_limit_bytes is not None:
        command = [
            "bash",
            "-c",
            'ulimit -f "$0"; trap "" XFSZ; exec "$@"',
            str(file_limit_bytes // 1024),
            *command,
        ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def drawn(factor: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"norm.weight": (5,), "output.weight": (7, 5), "scale": (), "odd.weight": (3, 1, 2)}
    return {
        name: torch.randn(shape, generator=generator) * factor for name, shape in shapes.items()
    }


def write(kind: str, folder: Path) -> Path:
    weights, path = drawn(), folder / "in.pt"
    if kind == "flat with prefixes":
        torch.save({f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}, path)
    elif kind == "training":
        torch.save(
            {"model": weights, "ema": drawn(2), "args": argparse.Namespace(lr=1), "optimizer": {}},
            path,
        )
    elif kind == "views of one storage":
        buffer = torch.cat([tensor.reshape(-1) for tensor in weights.values()])
        sizes = [tensor.numel() for tensor in weights.values()]
        views = [
            part.view(like.shape)
            for part, like in zip(buffer.split(sizes), weights.values(), strict=True)
        ]
        torch.save(
            {"model": {**dict(zip(weights, views, strict=True)), "freqs_cis": torch.zeros(3)}}, path
        )
    elif kind == "transposed":
        turned = {**weights, "output.weight": weights["output.weight"].T.contiguous().T}
        assert not turned["output.weight"].is_contiguous()
        torch.save(turned, path)
    elif kind == "safetensors":
        save_file(weights, path)
    elif kind == "consolidated":
        torch.save(weights, folder / "consolidated.pth")
        return folder
    else:
        dcp.save({"model": weights, "steps": 3}, checkpoint_id=folder / "sharded", no_dist=True)
        return folder / "sharded"
    return path


# Saving without a process group, as here, is warned about.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KINDS = [
    "flat with prefixes", "training", "views of one storage", "transposed", "safetensors",
    "consolidated", "sharded",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_the_same_weights_under_plain_names(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, output = write(kind, tmp_path), tmp_path / "out.safetensors"
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", str(source), str(output)])
    convert_checkpoint.main()
    assert capsys.readouterr().err == ""
    converted = load_file(output)
    assert converted.keys() == drawn().keys()
    for name, tensor in drawn().items():
        assert converted[name].dtype == torch.float32
        assert torch.equal(converted[name], tensor), name
    with safe_open(output, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_averaged_weights_and_another_dtype(tmp_path: Path) -> None:
    done = convert(
        write("training", tmp_path), tmp_path / "out.safetensors", "--ema", "--dtype", "bfloat16"
    )
    assert done.returncode == 0, done.stderr
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, drawn(2)[name].bfloat16())


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    source, output = write("training", tmp_path), tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    done = convert(source, output)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert output.read_bytes() == b"precious"
    assert convert(source, output, "--force").returncode == 0
    assert load_file(output).keys() == drawn().keys()


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    torch.save({"output.weight": torch.zeros(100_000)}, tmp_path / "in.pt")
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    done = convert(tmp_path / "in.pt", output, "--force", file_limit_bytes=65536)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert output.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out.safetensors"]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("out.pt", "must end in .safetensors"),
        ("missing/out.safetensors", "make it first, or choose another"),
        ("long" * 100 + ".safetensors", "File name too long"),
        (os.fsdecode(b"\xff.safetensors"), "is not UTF-8"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(
    output: str, told: str, tmp_path: Path
) -> None:
    done = convert(write("training", tmp_path), tmp_path / output)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert os.listdir(tmp_path) == ["in.pt"]


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    source = write("training", tmp_path)
    os.truncate(source, 500)
    done = convert(source, tmp_path / "out.safetensors")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["in.pt"]


def test_an_impossible_input_is_one_line(tmp_path: Path) -> None:
    done = convert(tmp_path / ("long" * 100), tmp_path / "out.safetensors")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "File name too long" in done.stderr


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (torch.float8_e5m2, "give --dtype, or use another file"),
        (torch.complex64, "written here; use another file"),
    ],
)
def test_advice_about_a_dtype_helps(tmp_path: Path, kind: torch.dtype, told: str) -> None:
    """Fails if --dtype is advised for numbers that it does not convert."""
    torch.save({"a": torch.zeros(3, dtype=kind)}, tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match=told):
        convert_weights(open_checkpoint(tmp_path / "in.pt"), tmp_path / "out.safetensors", None)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_closed_stderr_does_not_cost_the_file(tmp_path: Path) -> None:
    """Fails if the progress bar, which nobody can see, ends the command."""
    torch.save(drawn(), tmp_path / "in.pt")
    typed = [
        sys.executable,
        "scripts/convert_checkpoint.py",
        str(tmp_path / "in.pt"),
        str(tmp_path / "out.safetensors"),
    ]
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" "$@" 2>&-', *typed], cwd=ROOT, stdout=subprocess.PIPE, timeout=60
    )
    assert done.returncode == 0
    assert load_file(tmp_path / "out.safetensors").keys() == drawn().keys()
