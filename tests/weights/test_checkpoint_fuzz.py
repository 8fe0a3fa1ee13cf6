"""Damaged checkpoints and configurations, as many as time allows: each loads or ends in one short
line, within time and memory.

    CHECKPOINT_FUZZ_SECONDS=3600 pytest -m soak tests/weights/test_checkpoint_fuzz.py -s

Each process of `checkpoint_fuzzer.py` tries a thousand cases, so that a crash or a hang is told by
its folder.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from checkpoint_fuzzer import KINDS, run

# Torch warns about saving without a process group.
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:.*TypedStorage"
)

ROOT = Path(__file__).resolve().parents[2]
SECONDS = float(os.environ.get("CHECKPOINT_FUZZ_SECONDS", "120"))
FIRST_SEED = int(os.environ.get("CHECKPOINT_FUZZ_SEED", "0"))
CASES = 1000  # of a process
# waits for ever; one that computes for ever ends by its limit, whatever else the machine does
_PROCESS_SECONDS = 3600


def fuzz(kind: str, seed: int, cases: int, folder: Path) -> dict[str, int]:
    """One process's outcomes; after a failure its folder is there, with the case in it."""
    command = [
        sys.executable,
        "tests/helpers/checkpoint_fuzzer.py",
        kind,
        str(seed),
        str(cases),
        str(folder),
    ]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=_PROCESS_SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{kind}, seed {seed}: hangs at {folder / 'case'}")
    assert done.returncode == 0, (
        f"{kind}, seed {seed}: status {done.returncode} at {folder / 'case'}: {done.stderr[-2000:]}"
    )
    shutil.rmtree(folder)
    outcomes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


def test_a_few_damaged_files_of_each_kind(tmp_path: Path) -> None:
    """Fails if a simple damage is no one-line error, or if the fuzzer damages nothing. One process,
    for they start slowly.
    """
    for kind in KINDS:
        assert run(kind, 0, 25, tmp_path / kind)["refused"] > 0, kind


@pytest.mark.soak
def test_damaged_files_for_as_long_as_time_allows(tmp_path: Path) -> None:
    """Fails if a damaged file crashes or hangs a process, fills memory, or ends in anything but one
    short line.
    """
    end, seed, totals = (
        time.monotonic() + SECONDS,
        FIRST_SEED,
        {kind: Counter[str]() for kind in KINDS},
    )
    worst = Counter[str]()
    while time.monotonic() < end:
        for kind in KINDS:
            outcomes = fuzz(kind, seed, CASES, tmp_path / f"{kind}-{seed}")
            for figure in ("slowest_ms", "largest_kib"):
                worst[figure] = max(worst[figure], outcomes.pop(figure))
            totals[kind].update(outcomes)
        seed += 1
    for kind, counts in totals.items():
        print(
            f"{kind:<20} {counts.total():>7} cases, {counts['refused']:>7} refused, "
            f"{counts['loaded']:>7} loaded"
        )
    print(
        f"{sum(counts.total() for counts in totals.values())} cases in {SECONDS:g} s; worst: "
        f"{dict(worst)}"
    )
    assert all(counts["refused"] for counts in totals.values())
