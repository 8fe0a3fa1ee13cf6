"""A batch from end to end, with an engine that costs nothing: its answers are the service's, and it
goes on after whatever ends it.
"""

import contextlib
import json
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bench_overhead import start_in_a_thread
from fake_service import CLASS_NAMES, Faults, fake_model, make_engine, running_service
from refusals import refused
from test_short_writes import room_for

from autoregressive.errors import UserError
from autoregressive.serve import batch_job
from autoregressive.serve.batch_files import BatchRequest, read_requests
from autoregressive.serve.run_batch import build_batch_parser
from autoregressive.serve.web.app import start_dispatcher
from autoregressive.serve.web.schema import ServedModel
from autoregressive.serve.web.server_settings import ServerSettings
from autoregressive.serve.worker.worker import MakeEngine, StartProcess, start_process

ROWS = 4
GOOD: list[dict[str, Any]] = [
    {"prompt": "cat", "seed": 1},
    {"prompt": "dog", "seed": 2, "n": 10, "cfg_scale": 1},
    {"class_label": 3, "seed": 2**63 - 1, "temperature": 0.5, "top_k": 7, "top_p": 0.5},
    {"prompt": "eel", "seed": 3, "output_format": "webp", "n": 2, "user": "x"},
]
BAD: list[object] = [
    {"prompt": "unicorn"},
    {"prompt": "cat", "n": 11},
    {"prompt": "cat", "cfg": 2},
    {"prompt": "cat", "model": "gpt-image-1"},
    {"prompt": "cat", "partial_images": 2},
    {"prompt": "x" * 2**20},
    {"prompt": "\ud800"},
    {"prompt": json.loads("[" * 500 + "]" * 500)},
    {},
    [],
    None,
]


class Batch:
    """The files of a batch, and what stands in for its engine."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.faults = Faults(folder)
        self.requests, self.answers = folder / "requests.jsonl", folder / "answers.jsonl"
        self._patch = patch
        self.start_with(start_in_a_thread)

    def start_with(self, start: StartProcess) -> None:
        """From now on engines start so."""
        patched = partial(start_dispatcher, start=start)
        self._patch.setattr(batch_job, "start_dispatcher", patched)

    def ask(self, *bodies: object) -> None:
        """These are the requests, numbered from 0."""
        fixed = {"method": "POST", "url": "/v1/images/generations"}
        lines = [
            {"custom_id": str(number), **fixed, "body": body} for number, body in enumerate(bodies)
        ]
        self.requests.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def arguments(self, *flags: str) -> Namespace:
        """What is typed."""
        files = [str(self.requests), str(self.answers)]
        model = ["--gpt-model", "GPT-demo", "--device", "cpu", "--max-num-seqs", str(ROWS)]
        parsed: Namespace = build_batch_parser().parse_args([*files, *model, *flags])
        return parsed

    def run(self, *flags: str) -> int:
        """Runs the command."""
        return batch_job.run(self.arguments(*flags))

    @property
    def lines(self) -> dict[str, dict[str, Any]]:
        """The answers, by custom_id."""
        content = self.answers.read_text()
        assert content.endswith("\n")
        found = [json.loads(line) for line in content.splitlines()]
        assert len({line["custom_id"] for line in found}) == len(found), "answered twice"
        return {line["custom_id"]: line for line in found}


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """A batch whose engine is a thread."""

    def prepare(settings: ServerSettings) -> tuple[ServedModel, Any]:
        recipe: MakeEngine = partial(make_engine, config=settings.engine, folder=tmp_path)
        return fake_model("fake"), lambda index: recipe

    monkeypatch.setattr(batch_job, "prepare", prepare)
    return Batch(tmp_path, monkeypatch)


@contextlib.contextmanager
def interrupted_after(batch: Batch, answers: int) -> Iterator[None]:
    """Ctrl-C comes when there are so many answers."""

    def interrupt() -> None:
        while not batch.answers.exists() or batch.answers.read_bytes().count(b"\n") < answers:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    yield
    thread.join(10)


def test_answers_are_those_of_the_service(batch: Batch, tmp_path: Path) -> None:
    """Fails if a file's pixels, a record, a field or an error is not what HTTP gives for the same
    body.
    """
    bodies = [*GOOD, *BAD]
    batch.ask(*bodies)
    assert batch.run() == 0
    folder = tmp_path / "service"
    folder.mkdir()
    with running_service(folder, "--max-num-seqs", str(ROWS)) as service:
        for name, body in enumerate(bodies):
            expected = service.client.post(
                "/v1/images/generations",
                content=json.dumps(body),
                headers={"Content-Type": "application/json"},
            )
            line = batch.lines[str(name)]
            assert line["error"] is None
            assert line["response"]["request_id"].startswith("req_")
            assert line["response"]["status_code"] == expected.status_code, body
            answer, wanted = line["response"]["body"], expected.json()
            assert isinstance(answer.pop("created", 0), int)
            wanted.pop("created", 0)
            assert answer == wanted, body
            assert expected.status_code == 200 or name >= len(GOOD)


@pytest.mark.parametrize(
    ("field", "wanted", "possible"),
    [("stream", True, False), ("response_format", "url", "b64_json")],
)
def test_what_a_file_cannot_hold_is_refused_in_the_services_way(
    batch: Batch, field: str, wanted: object, possible: object
) -> None:
    """Fails if a line would have to hold events, or the address of an image that nobody keeps."""
    batch.ask({"prompt": "cat", field: wanted}, {"prompt": "cat", field: possible})
    assert batch.run() == 0
    refusal, answer = batch.lines["0"]["response"], batch.lines["1"]["response"]
    assert (refusal["status_code"], answer["status_code"]) == (400, 200)
    assert refusal["body"]["error"]["param"] == field
    assert refusal["body"]["error"]["code"] == "invalid_value"
    assert "an answer in a file" in refusal["body"]["error"]["message"]


def test_a_seed_is_in_the_answer(batch: Batch) -> None:
    """Fails if images that were drawn without a seed cannot be drawn again."""
    batch.ask({"prompt": "cat"}, {"prompt": "cat"})
    assert batch.run() == 0
    first, second = (batch.lines[name]["response"]["body"] for name in "01")
    assert first["seed"] != second["seed"]
    batch.answers.unlink()
    batch.ask({"prompt": "cat", "seed": first["seed"]})
    assert batch.run() == 0
    assert batch.lines["0"]["response"]["body"]["data"] == first["data"]


def test_a_second_run_answers_what_has_no_answer(
    batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an answer is lost, given twice or given anew."""
    batch.ask(*GOOD)
    assert batch.run() == 0
    whole = batch.answers.read_bytes()
    first = whole[: whole.index(b"\n") + 1]
    batch.answers.write_bytes(first + whole[len(first) :][:1000])
    assert batch.run() == 0
    assert batch.answers.read_bytes().startswith(first)
    assert len(batch.lines) == len(GOOD)
    before = batch.answers.read_bytes()
    capsys.readouterr()
    assert batch.run() == 0
    assert "all 4 requests have an answer" in capsys.readouterr().out
    assert batch.answers.read_bytes() == before


def test_few_requests_are_read_ahead_and_the_rows_are_full(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a long file would be held in memory, or requests run one after the other."""
    read, most = 0, 0

    def counted_requests(path: Path) -> Iterator[BatchRequest]:
        nonlocal read, most
        for request in read_requests(path):
            yield request
            read += 1
            done = batch.answers.read_bytes().count(b"\n")
            most = max(most, read - done)

    monkeypatch.setattr(batch_job, "read_requests", counted_requests)
    batch.ask(*({"prompt": name, "cfg_scale": 1} for name in CLASS_NAMES * 15))
    assert batch.run() == 0
    assert len(batch.lines) == 150
    assert ROWS < most <= ROWS + batch_job._SPARE_IMAGES


def test_what_the_service_would_try_again_is_tried_again(batch: Batch) -> None:
    """Fails if memory that ran out once is the answer to a request."""
    batch.faults.set("out_of_memory")
    batch.ask({"prompt": "cat", "seed": 1}, {"prompt": "dog", "seed": 1})
    assert batch.run() == 0
    assert [line["response"]["status_code"] for line in batch.lines.values()] == [200, 200]


def test_a_request_that_fails_by_itself_has_its_answer(
    batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if one failure ends the batch, or the closing lines count it as images."""
    batch.faults.set("nan", "1")
    batch.ask({"prompt": "cat", "seed": 1}, {"prompt": "dog", "seed": 2, "n": 3})
    assert batch.run() == 0
    failed = batch.lines["0"]["response"]
    assert (failed["status_code"], failed["body"]["error"]["code"]) == (500, "non_finite")
    assert batch.lines["1"]["response"]["status_code"] == 200
    told = capsys.readouterr().out
    assert told.startswith("3 images of 2 requests in ")
    assert " images/s: " in told
    assert told.endswith("\nrequests without images: 1; their answers say why\n")


def test_ctrl_c_keeps_whole_answers_and_says_how_to_go_on(
    batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an interruption takes long, leaves a part of a line, answers that it stops, or the
    next run does not go on.
    """
    batch.faults.set("step_seconds", "0.03")
    # more than run at once, so that it has not ended before it is interrupted
    batch.ask(*({"prompt": name, "seed": seed} for seed in range(3) for name in CLASS_NAMES))
    begun = time.monotonic()
    with interrupted_after(batch, 2), pytest.raises(KeyboardInterrupt):
        batch.run()
    assert time.monotonic() - begun < 10
    kept = batch.lines
    assert 2 <= len(kept) < 30
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"{len(kept)} of 30 requests have an answer in {batch.answers}: run ")
    batch.faults.clear("step_seconds")
    assert batch.run() == 0
    assert len(batch.lines) == 30
    assert all(line["response"]["status_code"] == 200 for line in batch.lines.values())
    assert kept.items() <= batch.lines.items()


def test_a_full_disk_is_one_line_and_costs_no_answer(batch: Batch) -> None:
    """Fails if a full disk is a traceback, leaves a part of a line, or the batch cannot go on."""
    batch.ask(*GOOD, *GOOD)
    assert batch.run() == 0
    size = batch.answers.stat().st_size
    batch.answers.unlink()
    with room_for(size // 2), refused("cannot write .*answers.jsonl: File too large; it has "):
        batch.run()
    kept = batch.lines
    assert 0 < len(kept) < 8
    assert batch.run() == 0
    assert len(batch.lines) == 8
    assert kept.items() <= batch.lines.items()


def test_an_engine_that_dies_ends_the_batch(
    batch: Batch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fails if the loss of the engine becomes the answer to requests, or the status is not 1."""
    batch.start_with(start_process)
    batch.ask(*GOOD)
    batch.faults.set("die")
    assert batch.run() == 1
    assert not batch.answers.exists()
    told = capfd.readouterr().err.splitlines()
    assert told[-2].startswith("0 of 4 requests have an answer in ")
    assert told[-1].endswith("error: an engine's process has died")
    batch.faults.clear("die")
    batch.start_with(start_in_a_thread)
    assert batch.run() == 0
    assert len(batch.lines) == 4


def test_an_engine_that_cannot_be_built_is_one_line(batch: Batch) -> None:
    """Fails if the start's error is not told as the service tells it, or leaves a file."""
    batch.start_with(start_process)
    batch.ask(*GOOD)
    batch.faults.set("unable", "no such weights")
    with refused("^no such weights$"):
        batch.run()
    assert not batch.answers.exists()


def test_rows_are_as_many_as_the_images_need(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a short batch makes an engine of many rows, or a long one of few."""
    rows: list[int] = []

    def prepare(settings: ServerSettings) -> None:
        rows.append(settings.engine.max_num_seqs)
        raise UserError("enough is known")

    monkeypatch.setattr(batch_job, "prepare", prepare)
    for images in (1, 10, 400):
        batch.ask(*[{"prompt": "cat", "n": min(images, 10)}] * -(-images // 10))
        arguments = batch.arguments()
        arguments.max_num_seqs = None
        with refused("enough is known"):
            batch_job.run(arguments)
        assert not batch.answers.exists()
    assert rows == [2, 20, 512]
