"""Runs tests/interpreted, the kernels in Triton's interpreter, in processes that have it switched on: two at a time."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SHARES = {  # each about as long as the other
    "gpt_b": ["test_gpt_b.py"],
    "rest": sorted(path.name for path in (TESTS / "interpreted").glob("test_*.py") if path.name != "test_gpt_b.py"),
}

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels already")


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All shares, started at once."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = {}
    for name, files in SHARES.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/interpreted/{file}" for file in files)]
        started[name] = subprocess.Popen(
            command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield started
    for process in started.values():
        process.kill()  # without effect on one that has ended
        process.wait()


@pytest.mark.parametrize("share", SHARES)
def test_the_kernels_in_the_interpreter(share: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    """Fails, with their output, if a test of tests/interpreted fails, or none is found."""
    output, _ = processes[share].communicate()
    if processes[share].returncode != 0:
        pytest.fail(f"exit status {processes[share].returncode}\n{output}", pytrace=False)
