"""Runs tests/kernels/interpreted: the kernels in Triton's interpreter, in their own processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = {path.name for path in (TESTS / "interpreted").glob("test_*.py")}
LONG = {"test_gpt_b.py", "test_engine_tokens.py", "test_split_tokens.py"}
SHARES = {**{name: [name] for name in sorted(LONG)}, "rest": sorted(FILES - LONG)}

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels already"
)


@pytest.mark.parametrize("share", SHARES)
def test_the_kernels_in_the_interpreter(share: str) -> None:
    """Fails, with their output, if a test of tests/kernels/interpreted fails, or none is found."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [f"tests/kernels/interpreted/{file}" for file in SHARES[share]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command,
        cwd=TESTS.parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout}", pytrace=False)
