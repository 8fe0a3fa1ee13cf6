"""The README and the engine's page are true: their Python examples run, their flags and files
exist.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

from autoregressive.cli.flags import build_parser
from autoregressive.output.images import JSON_KEY
from autoregressive.serve.sample_c2i import build_engine_parser

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_draws_a_picture(tmp_path: Path) -> None:
    """The first thing that a reader copies must work, from the repository's root."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code = code.replace('"dog_and_fox.png"', repr(str(tmp_path / "x.png")))
    one_thread = "import torch\ntorch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-c", one_thread + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (262, 132)


def test_make_demo_draws_the_readmes_picture_with_the_engine(tmp_path: Path) -> None:
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


def test_the_engines_example_runs() -> None:
    """Fails if the engine's own example names something that is gone, or does not come to
    an end.
    """
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "engine.md").read_text(), flags=re.DOTALL
    )
    # the weights fit any number of tokens: 16 are quick to draw
    small = code.replace("block_size=256", "block_size=16")
    assert small != code
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import torch\ntorch.set_num_threads(1)\n{small}\nprint(pixels.shape)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # requests 0 and 1 were of `generate`
    assert any(line.startswith("2 finished") for line in lines)
    assert any(line.startswith(("3 finished", "3 cancelled")) for line in lines)
    assert lines[-1] == "torch.Size([2, 3, 32, 32])"


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """All long flags but --help."""
    return {
        text
        for action in parser._actions
        for text in action.option_strings
        if text.startswith("--")
    } - {"--help"}


def flags_in(table: str) -> set[str]:
    """What the first column of a README's table names."""
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `--")]
    return {flag for row in rows for flag in re.findall(r"--[a-z-]+", row)}


def test_every_flag_is_in_its_table_and_every_row_is_a_flag() -> None:
    """A flag that was added, renamed or removed must not leave the README behind."""
    both, engines = (
        README.split("### Of both commands")[1]
        .split("## From Python")[0]
        .split("### Of the engine's command")
    )
    naive = flags_of(build_parser("purpose", "command.py"))
    assert flags_in(both) == naive
    assert flags_in(engines) == flags_of(build_engine_parser()) - naive | {
        "--precision",
        "--compile",
    }


def test_every_file_that_the_docs_name_exists() -> None:
    """A link or command that leads nowhere."""
    for document in [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "pretrained_models" / "README.md",
    ]:
        text = document.read_text()
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
            assert (document.parent / link).exists(), (document, link)
        for script in re.findall(r"python ((?:scripts|autoregressive)/[\w/]+\.py)", text):
            assert (ROOT / script).exists(), (document, script)
