"""Text that stdout or stderr cannot encode costs nothing: it is written with backslashes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_picture_formats import record_in

from autoregressive.cli.drawing import resolve_settings
from autoregressive.cli.flags import build_parser
from autoregressive.output.images import save_picture
from autoregressive.output.records import generation_record, readable
from autoregressive.weights.finding import FoundWeights

ROOT = Path(__file__).resolve().parents[2]
ASCII = {
    "PATH": os.environ["PATH"],
    "PYTHONIOENCODING": "ascii",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
}


def run(*command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A command of the project that has ended, its output as bytes."""
    path, *typed = command
    return subprocess.run(
        [sys.executable, str(ROOT / path), *typed],
        cwd=folder,
        env=ASCII | variables,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["ü.png", "模型.webp", "\udcff.png"])
def test_a_saved_picture_is_a_success_whatever_its_name(tmp_path: Path, name: str) -> None:
    """Fails if the line that says where the picture is ends the command; the last name is no text
    at all.
    """
    typed = [
        "--gpt-model",
        "GPT-demo",
        "--device",
        "cpu",
        "--cfg-scale",
        "1",
        "--class-labels",
        "fox",
        "--output",
        name,
    ]
    done = run("autoregressive/serve/sample_c2i.py", *typed, folder=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    assert b"image is saved to " + name.encode("ascii", "backslashreplace") in done.stdout
    assert [path.name for path in tmp_path.glob("*.*") if path.is_file()] == [name]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_weights_behind_a_link_may_have_any_name(tmp_path: Path, suffix: str) -> None:
    """Fails if the name in a picture's record costs the picture: the weights' own name is
    no text.
    """
    (tmp_path / os.fsdecode(b"\xff.safetensors")).write_bytes(b"")
    link = tmp_path / "link.safetensors"
    link.symlink_to(os.fsdecode(b"\xff.safetensors"))
    typed = ["--gpt-model", "GPT-demo", "--vq-ckpt", str(link), "--device", "cpu"]
    model = resolve_settings(build_parser("", "").parse_args(typed)).model
    record = generation_record(model, FoundWeights(None, link), "naive") | {
        "label": 0,
        "class_name": "x",
    }
    assert record["tokenizer_weights"] == r"\xff.safetensors"
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    save_picture(tmp_path / f"x{suffix}", picture, readable(record), record)
    assert record_in(tmp_path / f"x{suffix}") == record


def test_an_error_names_a_file_that_cannot_be_shown(tmp_path: Path) -> None:
    """Fails if a message about such a name is lost, or becomes a traceback."""
    done = run(
        "scripts/convert_checkpoint.py",
        "模型.pt",
        "out.safetensors",
        folder=tmp_path,
        HOME=str(tmp_path),
    )
    assert done.returncode == 2
    assert done.stderr.startswith(rb"convert_checkpoint.py: error: \u6a21\u578b.pt: ")
    assert done.stderr.count(b"\n") == 1


def test_help_with_a_folder_that_cannot_be_shown(tmp_path: Path) -> None:
    """Fails if argparse's own output, here a default with the user's home in it, is not written."""
    done = run(
        "scripts/download_models.py",
        "--folder",
        "ü",
        "--list",
        folder=tmp_path,
        HOME=str(tmp_path / "ü"),
    )
    assert done.returncode == 0, done.stderr.decode()
    assert rb"in \xfc" in done.stdout


def test_the_service_starts_under_a_name_that_cannot_be_shown(tmp_path: Path) -> None:
    """Fails if a model's name ends the service at its first line, at the line that says it is
    ready, or in its log.
    """
    command = [
        sys.executable,
        "autoregressive/serve/api_server.py",
        "--gpt-model",
        "GPT-demo",
        "--device",
        "cpu",
        "--port",
        "0",
    ]
    command += ["--served-model-name", "模型"]
    variables = ASCII | {"HOME": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as service:
        assert service.stdout is not None
        try:
            assert service.stdout.readline().startswith(rb"\u6a21\u578b is being loaded")
            assert service.stdout.readline().startswith(b"ready after ")
        finally:
            service.send_signal(signal.SIGTERM)
            _, errors = service.communicate()
    assert service.returncode == 0, errors.decode()


def test_the_configuration_file_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    """Fails if a name in --config is read in the encoding of the locale."""
    (tmp_path / "service.yaml").write_text("served-model-name: 模型\n", encoding="utf-8")
    code = (
        "from autoregressive.serve.web.server_flags import read_arguments\n"
        "print(ascii(read_arguments(['--config', 'service.yaml'], {}).served_model_name))"
    )
    variables = ASCII | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, check=False
    )
    assert done.stdout == rb"['\u6a21\u578b']" + b"\n", done.stderr.decode()
