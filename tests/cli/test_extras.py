"""The commands and `Pipeline` where only the core packages are installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

# Stands in for an environment without the packages of all extras.
SITE = """\
import sys

MISSING = {
    "fastapi", "fastapi_offline", "h11", "httpx2", "huggingface_hub", "prometheus_client",
    "pydantic", "socksio", "starlette", "torch_fidelity", "tqdm", "uvicorn", "yaml",
}


class Present:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in MISSING
        return None if missing else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Present(finder) for finder in sys.meta_path]
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command of the repository's, in a folder, without the extras' packages."""
    (folder / "sitecustomize.py").write_text(SITE)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("room", ["sample", "serve"])
def test_commands_draw_with_the_core_packages_alone(tmp_path: Path, room: str) -> None:
    """Fails if a package of an extra is imported where it is not needed."""
    script = str(ROOT / "autoregressive" / room / "sample_c2i.py")
    typed = "--gpt-model GPT-demo --device cpu --class-labels fox --cfg-scale 1"
    done = run(tmp_path, script, *typed.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "sample_c2i.png").stat().st_size > 1000


def test_the_pipeline_draws_with_the_core_packages_alone(tmp_path: Path) -> None:
    """Fails if a package of an extra is imported where it is not needed."""
    code = (
        "from autoregressive import Pipeline\n"
        "from autoregressive.serve import EngineConfig\n"
        "engine = EngineConfig(max_num_seqs=2)\n"
        "pipe = Pipeline.from_pretrained('GPT-demo', device='cpu', engine=engine)\n"
        "pipe('fox', cfg_scale=1.0, progress=True).images[0].save('fox.png')\n"
    )
    done = run(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "a progress bar needs tqdm: pip install 'llamagen-serve[progress]'\n"
    assert (tmp_path / "fox.png").is_file()


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ((str(ROOT / "scripts/download_models.py"), "GPT-B"), "download"),
        ((str(ROOT / "autoregressive/serve/api_server.py"), "--help"), "serve"),
        (("-c", "from autoregressive.serve.api_server import command; command()"), "serve"),
        (("-c", "from autoregressive.serve.run_batch import command; command()"), "serve"),
        (
            (
                str(ROOT / "autoregressive/serve/sample_c2i.py"),
                *("--gpt-model", "GPT-B", "--download", "--pretrained-dir", "."),
            ),
            "download",
        ),
    ],
)
def test_what_needs_an_extra_says_which(
    tmp_path: Path, command: tuple[str, ...], extra: str
) -> None:
    """Fails if a missing package is a traceback, or the line does not say what to install."""
    done = run(tmp_path, *command)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"is not installed: pip install 'llamagen-serve[{extra}]'" in done.stderr
