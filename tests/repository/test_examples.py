"""The examples of the documents run: Python, requests to the service, and the demo."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import DOCUMENTS, PYTHON, ROOT, SERVICE, examples, section
from fake_service import running_service
from PIL import Image

from autoregressive.output.images import JSON_KEY


def python_example(document: Path, heading: str) -> str:
    """The one Python example below a heading."""
    (code,) = examples(section(document, heading), "python")
    return code


def run_python(code: str) -> str:
    """Runs an example from the repository's root on one thread, and returns what it prints."""
    one_thread = "import torch\ntorch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-c", one_thread + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_with_llamagens_import_paths_draws_an_image(tmp_path: Path) -> None:
    """Fails if an import path of LlamaGen is gone, or the example saves anything but two images."""
    code = python_example(PYTHON, "## LlamaGen's import paths")
    run_python(code.replace('"dog_and_fox.png"', repr(str(tmp_path / "x.png"))))
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (262, 132)


def test_the_pipelines_example_saves_a_fox(tmp_path: Path) -> None:
    """Fails if the first example that a user copies does not run."""
    code = python_example(PYTHON, "## Pipeline")
    run_python(code.replace('"fox.png"', repr(str(tmp_path / "fox.png"))))
    with Image.open(tmp_path / "fox.png") as image:
        assert json.loads(image.info[JSON_KEY])["seed"] == 7


def test_the_example_that_compares_settings_saves_what_it_says(tmp_path: Path) -> None:
    """Fails if the example does not run, or an image is not of the settings that stand beside
    it.
    """
    code = python_example(PYTHON, "## Comparing settings")
    for name in ("grid", "owl"):
        code = code.replace(f'"{name}.png"', repr(str(tmp_path / f"{name}.png")))
    run_python(code)
    with Image.open(tmp_path / "owl.png") as image:
        record = json.loads(image.info[JSON_KEY])
        assert image.size == (128, 128)
    assert (record["seed"], record["cfg_scale"], record["temperature"]) == (8, 4, 0.9)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 3 * 130
        assert json.loads(image.info[JSON_KEY])["class_name"] == "owl"


def test_the_engines_example_runs() -> None:
    """Fails if the engine's example names something that is gone, or does not come to an end."""
    code = python_example(PYTHON, "## The engine")
    # The weights fit any number of tokens, and 16 are sampled quickly.
    small = code.replace("block_size=256", "block_size=16")
    assert small != code
    lines = run_python(f"{small}\nprint(pixels.shape)").splitlines()
    # `generate` made requests 0 and 1.
    assert any(line.startswith("2 finished") for line in lines)
    assert any(line.startswith(("3 finished", "3 cancelled")) for line in lines)
    assert lines[-1] == "torch.Size([2, 3, 32, 32])"


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example is of curl")
def test_the_services_examples_save_images(tmp_path: Path) -> None:
    """Fails if a request of OpenAI's client or of curl, as service.md has it, saves no image."""
    requests = section(SERVICE, "## Requests")
    (of_client,), (of_curl,) = examples(requests, "python"), examples(requests, "sh")
    commands = ([sys.executable, "-c", of_client], ["bash", "-c", f"set -o pipefail\n{of_curl}"])
    with running_service(tmp_path) as service:
        for command in commands:
            command[2] = command[2].replace("http://127.0.0.1:8000", service.url)
            command[2] = command[2].replace("python -c", f"{sys.executable} -c")
            done = subprocess.run(
                command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
            )
            assert done.returncode == 0, done.stderr
            with Image.open(tmp_path / "fox.png") as image:
                assert image.format == "PNG"
            (tmp_path / "fox.png").unlink()


def test_every_python_example_is_python() -> None:
    """Fails if an example that no test runs has a mistake of syntax."""
    codes = [code for document in DOCUMENTS for code in examples(document.read_text(), "python")]
    assert len(codes) >= 5
    for code in codes:
        ast.parse(code)


def test_make_demo_draws_the_readmes_image_with_the_engine(tmp_path: Path) -> None:
    """Fails if the demo's command ends in an error, is not the engine's, or draws anything but what
    the README shows.
    """
    (line,) = re.findall(
        r"^\t\$\(VENV\)/bin/python (.* --output demo.png)$",
        (ROOT / "Makefile").read_text(),
        flags=re.MULTILINE,
    )
    command = [
        sys.executable,
        *shlex.split(line),
        "--output",
        str(tmp_path / "x.png"),
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (
        Image.open(tmp_path / "x.png") as drawn,
        Image.open(ROOT / "docs" / "images" / "demo.png") as shown,
    ):
        assert drawn.size == shown.size
        made, promised = (json.loads(image.text[JSON_KEY]) for image in (drawn, shown))  # type: ignore[attr-defined]
    # cpu and cuda builds of one version
    assert made.pop("torch").split("+")[0] == promised.pop("torch").split("+")[0]
    assert made == promised
    assert made["loop"] == "paged"
