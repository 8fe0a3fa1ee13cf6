"""The notebook for Kaggle and Colab, without the machinery of notebooks: its cells are Python."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from source_tree import ROOT

from autoregressive.serve.web.server_flags import read_arguments

NOTEBOOK = ROOT / "notebooks/kaggle_colab.ipynb"


def cells() -> dict[str, str]:
    """The code of each cell, by the cell's id, in their order."""
    notebook: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in code:  # what was run is not kept
        assert (cell["execution_count"], cell["outputs"]) == (None, [])
    return {cell["id"]: "".join(cell["source"]) for cell in code}


def run(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,  # on a busy machine
    )


def test_the_notebook_runs_on_a_cpu(tmp_path: Path) -> None:
    """Fails if a cell does not run, the service draws nothing, or goes on after the last cell."""
    done = run(tmp_path, "\n".join(cells().values()), CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (0, "")
    ready, measured, ended = done.stdout.splitlines()
    assert ready.startswith("--gpt-model GPT-demo --device cpu --attention-backend torch: ready at")
    assert measured.startswith("2 images of 128 px in ")
    assert ended == "the service has ended with status 0"
    with Image.open(tmp_path / "images.png") as sheet:
        assert sheet.size == (3 * 128, 128)
        assert len(set(sheet.convert("RGB").tobytes())) > 50


def test_what_it_starts_on_two_gpus(tmp_path: Path) -> None:
    """Fails if the flags for T4s are none, or an engine a GPU is not asked for. Torch has a
    stand-in, and the service one that prints its flags.
    """
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    @staticmethod\n    def device_count():\n        return 2\n"
    )
    start = cells()["start"].replace("autoregressive.serve.api_server", "stand_in")
    (tmp_path / "stand_in.py").write_text("import sys; print(*sys.argv[1:]); sys.exit(1)\n")
    code = "\n".join([cells()["settings"], cells()["install"], start])
    done = run(tmp_path, code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    found = read_arguments(done.stderr.split(), {})
    assert (found.gpt_model, found.data_parallel_size, found.precision) == ("GPT-B", 2, "fp16")
    assert (found.attention_backend, found.download) == ("torch", True)


def test_a_machine_without_the_package_is_told_what_to_do(tmp_path: Path) -> None:
    """Fails if the first mistake that one can make ends in a traceback."""
    hidden = "import importlib.util; importlib.util.find_spec = lambda name: None"
    done = run(tmp_path, "\n".join([cells()["settings"], hidden, cells()["install"]]))
    assert done.returncode == 1
    assert done.stderr == "write the repository's URL into REPOSITORY, in the first cell\n"
