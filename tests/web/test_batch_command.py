"""The command as people run it: the demo model answers requests, and is killed meanwhile."""

import base64
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_service_whole import ROOT, offline

COMMAND = ROOT / "autoregressive" / "serve" / "run_batch.py"
SEEDS = (3, 4)


def command(folder: Path) -> list[str]:
    """Two rows, so that requests run one after the other."""
    files = [str(folder / "requests.jsonl"), str(folder / "answers.jsonl")]
    flags = ["--gpt-model", "GPT-demo", "--device", "cpu", "--max-num-seqs", "2"]
    return [sys.executable, str(COMMAND), *files, *flags]


def picture(line: dict[str, Any]) -> np.ndarray:
    """The only image of an answer."""
    (data,) = line["response"]["body"]["data"]
    with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as image:
        return np.asarray(image).astype(int)


def test_a_killed_batch_goes_on_and_draws_what_the_service_draws(tmp_path: Path) -> None:
    """Fails if SIGKILL costs an answer, an answer is given twice, or pixels are not those that
    `test_service_whole` finds in the service's answers.
    """
    fixed = {"method": "POST", "url": "/v1/images/generations"}
    lines = [
        {"custom_id": f"fox {seed}", **fixed, "body": {"prompt": "fox", "seed": seed}}
        for seed in SEEDS
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answers = tmp_path / "answers.jsonl"
    with subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (answers.exists() and b"\n" in answers.read_bytes()):
            assert process.poll() is None
            assert time.monotonic() < deadline, "there is no answer"
            time.sleep(0.01)
        process.kill()
    kept = answers.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert kept.count(b"\n") < len(SEEDS)
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "GPT-demo is being loaded\n")
    left = len(SEEDS) - kept.count(b"\n")
    assert done.stdout.startswith(f"{left} images of {left} requests in ")
    assert answers.read_bytes().startswith(kept)
    found = {line["custom_id"]: line for line in map(json.loads, answers.read_text().splitlines())}
    assert sorted(found) == [f"fox {seed}" for seed in SEEDS]
    assert answers.read_text().count("\n") == len(SEEDS)
    for seed in SEEDS[-1:]:
        _, (expected,) = offline(7, seed, 1)
        drawn = picture(found[f"fox {seed}"])
        assert np.abs(drawn - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("typed", [[], ["x.jsonl"], ["x.jsonl", "y.jsonl", "z.jsonl"]])
def test_two_files_are_named(typed: list[str]) -> None:
    """Fails if a forgotten file is a traceback."""
    done = subprocess.run(
        [sys.executable, str(COMMAND), *typed], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert ".jsonl" in done.stderr
