"""The command as people run it: the demo model answers requests, and is killed meanwhile."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rank_service import other_ranks
from test_service_whole import ROOT, offline

COMMAND = ROOT / "autoregressive" / "serve" / "run_batch.py"
SEEDS = (3, 4)


def command(folder: Path) -> list[str]:
    """Two rows, so that requests run one after the other."""
    files = [str(folder / "requests.jsonl"), str(folder / "answers.jsonl")]
    flags = ["--gpt-model", "GPT-demo", "--device", "cpu", "--max-num-seqs", "2"]
    return [sys.executable, str(COMMAND), *files, *flags]


def write_requests(folder: Path) -> None:
    """A request for each seed."""
    fixed = {"method": "POST", "url": "/v1/images/generations"}
    lines = [
        {"custom_id": f"fox {seed}", **fixed, "body": {"prompt": "fox", "seed": seed}}
        for seed in SEEDS
    ]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))


def wait_for_an_answer(process: "subprocess.Popen[Any]", answers: Path) -> None:
    """Until the command has written a whole line."""
    deadline = time.monotonic() + 120
    while not (answers.exists() and b"\n" in answers.read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < deadline, "there is no answer"
        time.sleep(0.01)


def found_answers(answers: Path) -> dict[str, dict[str, Any]]:
    """The answers by their request, each of which has one."""
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert sorted(found) == [f"fox {seed}" for seed in SEEDS]
    assert len(lines) == len(SEEDS)
    return found


def picture(line: dict[str, Any]) -> np.ndarray:
    """The only image of an answer."""
    (data,) = line["response"]["body"]["data"]
    with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as image:
        return np.asarray(image).astype(int)


def test_a_killed_batch_goes_on_and_draws_what_the_service_draws(tmp_path: Path) -> None:
    """Fails if SIGKILL costs an answer, an answer is given twice, or pixels are not those that
    `test_service_whole` finds in the service's answers.
    """
    write_requests(tmp_path)
    answers = tmp_path / "answers.jsonl"
    with subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE) as process:
        wait_for_an_answer(process, answers)
        process.kill()
    kept = answers.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert kept.count(b"\n") < len(SEEDS)
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "GPT-demo is being loaded\n")
    left = len(SEEDS) - kept.count(b"\n")
    assert done.stdout.startswith(f"{left} images of {left} requests in ")
    assert answers.read_bytes().startswith(kept)
    found = found_answers(answers)
    for seed in SEEDS[-1:]:
        _, (expected,) = offline(7, seed, 1)
        drawn = picture(found[f"fox {seed}"])
        assert np.abs(drawn - expected.astype(int)).max() <= 1


def test_a_batch_goes_on_after_the_loss_of_a_rank(tmp_path: Path) -> None:
    """Fails if ranks that share the model draw other pictures than one process, or if the death of
    one hangs, costs an answer, or does not say how to go on.
    """
    write_requests(tmp_path)
    answers = tmp_path / "answers.jsonl"
    typed = [*command(tmp_path), "--tensor-parallel-size", "2"]
    with subprocess.Popen(typed, stderr=subprocess.PIPE, text=True) as process:
        wait_for_an_answer(process, answers)
        (rank,) = other_ranks(process.pid)
        os.kill(rank, signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    kept = answers.read_bytes()
    assert process.returncode == 1
    assert f"1 of 2 requests have an answer in {answers}: run the same command again" in told
    assert "Traceback" not in told
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "GPT-demo is being loaded\n")
    assert answers.read_bytes().startswith(kept)
    found = found_answers(answers)
    for seed in SEEDS:
        _, (expected,) = offline(7, seed, 1)
        assert np.abs(picture(found[f"fox {seed}"]) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("typed", [[], ["x.jsonl"], ["x.jsonl", "y.jsonl", "z.jsonl"]])
def test_two_files_are_named(typed: list[str]) -> None:
    """Fails if a forgotten file is a traceback."""
    done = subprocess.run(
        [sys.executable, str(COMMAND), *typed], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert ".jsonl" in done.stderr
