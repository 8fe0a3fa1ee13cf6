"""What a command answers before torch is imported."""

import subprocess
import sys
import time

import pytest
from source_tree import ROOT

COMMANDS = {
    "plain": "autoregressive.sample.sample_c2i",
    "engine": "autoregressive.serve.sample_c2i",
    "service": "autoregressive.serve.api_server",
    "bulk": "autoregressive.sample.sample_c2i_ddp",
    "batch": "autoregressive.serve.run_batch",
}
MISTAKES = ("--cfgscale=1", "--grid=seed=x")
ANSWERED = [(name, flag) for name in COMMANDS for flag in ("--help", "--version", "--cfgscale=1")]
ANSWERED += [("plain", "--grid=seed=x"), ("engine", "--grid=seed=x")]
ANSWERED += [("plain", "--list-classes=fox"), ("engine", "--list-classes=fox")]


@pytest.mark.parametrize(("command", "flag"), ANSWERED)
def test_an_answer_at_once_imports_no_torch(command: str, flag: str) -> None:
    """Fails if --help, --version, --list-classes or a typo waits for libraries."""
    code = (
        "import sys\n"
        f"from {COMMANDS[command]} import main\n"
        "try:\n"
        f"    main(['--gpt-model=GPT-demo', '{flag}'])\n"
        "except (SystemExit, ValueError):\n"
        "    pass\n"
        "sys.exit(3 if {'torch', 'triton', 'fastapi'} & set(sys.modules) else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or flag in MISTAKES


def seconds_of(*command: str) -> float:
    """How long a process takes, at best."""
    times = []
    for _ in range(3):
        begun = time.monotonic()
        subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=False)
        times.append(time.monotonic() - begun)
    return min(times)


@pytest.mark.timing
def test_help_takes_half_of_what_torch_takes() -> None:
    """Fails if a command is slow to say which flags it has."""
    torch = seconds_of("-c", "import torch")
    for name in COMMANDS.values():
        assert seconds_of(f"{name.replace('.', '/')}.py", "--help") < torch / 2


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("plain", "--cfgscale=1", "--cfg-scale"),
        ("engine", "--max-num-seq=8", "--max-num-seqs"),
        ("service", "--prot=80", "--port"),
        ("engine", "--gpt-model=gpt-xl", "GPT-XL"),
        ("engine", "--vq-model=VQ16", "VQ-16"),
    ],
)
def test_near_misses_are_suggested(command: str, typed: str, meant: str) -> None:
    """Fails if a typo is told without the flag or model that is meant."""
    script = f"{COMMANDS[command].replace('.', '/')}.py"
    done = subprocess.run(
        [sys.executable, script, typed], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"did you mean {meant}?" in done.stderr
    assert done.stderr.count("\n") == 1
