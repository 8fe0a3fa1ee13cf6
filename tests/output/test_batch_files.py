"""The files of a batch: what is a request, what is an answer, and what a killed process or a full
disk leaves.
"""

import contextlib
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from system_calls import ERRORS, Killed, SystemCalls, calls_of, counted
from test_short_writes import room_for

from autoregressive.errors import UserError
from autoregressive.serve.batch_files import (
    AnswerFile,
    BatchError,
    check_requests,
    read_requests,
)

BODY = b'{"data":[{"b64_json":"QUJD"}]}'


def request(custom_id: str, **fields: Any) -> dict[str, Any]:
    """A line that is a request, or not quite."""
    body = {"prompt": "fox"}
    whole = {"custom_id": custom_id, "method": "POST", "url": "/v1/images/generations"}
    return {**whole, "body": body} | fields


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Three requests."""
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(request(name)) + "\n" for name in "abc"))
    return path


def opened(requests: Path) -> AnswerFile:
    """The answers beside the requests."""
    return AnswerFile(requests.with_name("answers.jsonl"), requests, check_requests(requests))


def answer_all(requests: Path) -> None:
    """Gives the answers that are missing."""
    answers = opened(requests)
    with contextlib.closing(answers):
        for each in read_requests(requests):
            if each.custom_id not in answers.answered:
                answers.answer(each.custom_id, 200, "req_1", BODY)


def answered(requests: Path) -> list[str]:
    """Whose answers are in the file, all of whose lines must be whole."""
    text = requests.with_name("answers.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line)["custom_id"] for line in text.splitlines()]


def test_lines_are_those_of_openais_format(requests: Path) -> None:
    """Fails if a field of an answer is missing, or has another name or type than OpenAI's."""
    answers = opened(requests)
    answers.answer("a", 200, "req_1", BODY)
    answers.refuse("b", BatchError("invalid_url", "no"))
    answers.close()
    first, second = map(json.loads, answers.path.read_text().splitlines())
    assert re.fullmatch("batch_req_[0-9a-f]{24}", first.pop("id"))
    response = {"status_code": 200, "request_id": "req_1", "body": json.loads(BODY)}
    assert first == {"custom_id": "a", "response": response, "error": None}
    second.pop("id")
    error = {"code": "invalid_url", "message": "no"}
    assert second == {"custom_id": "b", "response": None, "error": error}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"method": "GET"}, "invalid_method"),
        ({"url": "/v1/chat/completions"}, "invalid_url"),
        ({"url": None}, "invalid_url"),
        ({"seed": 7}, "unknown_field"),
    ],
)
def test_a_line_that_is_no_request_to_the_route_has_an_error(
    requests: Path, fields: dict[str, Any], code: str
) -> None:
    """Fails if such a line passes, or stops the others."""
    requests.write_text(json.dumps(request("a", **fields)))
    (read,) = read_requests(requests)
    assert read.error is not None
    assert read.error.code == code


def test_a_line_without_a_body_has_an_error(requests: Path) -> None:
    """Fails if the service would be asked for nothing."""
    line = request("a")
    del line["body"]
    requests.write_text(json.dumps(line))
    assert [read.error and read.error.code for read in read_requests(requests)] == ["missing_value"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{", "line 2 is not JSON"),
        (b"\xff", "line 2 is not UTF-8"),
        (b'{"custom_id": NaN}', "line 2 is not JSON: JSON has no NaN"),
        (b'{"custom_id": "x", "custom_id": "y"}', "line 2 has custom_id twice"),
        (b"[" * 100_000, "line 2 is nested too deeply"),
        (b"[1]", "line 2 must be a JSON object"),
        (b'{"method": "POST"}', "line 2 has no custom_id"),
        (b'{"custom_id": 7}', "line 2 has a custom_id that is no text"),
        (b'{"custom_id": ""}', "line 2 has no custom_id"),
        (b'{"custom_id": "a"}', "line 2 has the custom_id 'a' of line 1; give each"),
    ],
)
def test_a_line_that_no_answer_could_belong_to_is_refused(
    requests: Path, line: bytes, told: str
) -> None:
    """Fails if the message does not name the line, or the work would begin."""
    requests.write_bytes(json.dumps(request("a")).encode() + b"\n" + line + b"\n")
    with refused(re.escape(f"{requests}: {told}")):
        check_requests(requests)


def test_blank_lines_and_a_missing_last_line_feed_are_no_mistake(requests: Path) -> None:
    """Fails if they are refused, or a request is lost by them."""
    requests.write_text("\n" + json.dumps(request("a")) + "\n \r\n" + json.dumps(request("b")))
    assert list(check_requests(requests)) == ["a", "b"]


def test_files_without_requests_are_refused(tmp_path: Path) -> None:
    """Fails if an empty or missing file, or a folder, counts as work that is done."""
    (tmp_path / "empty").write_text("\n")
    for name, told in (
        ("empty", "there are no requests"),
        ("none", "cannot read"),
        (".", "cannot"),
    ):
        with refused(told):
            check_requests(tmp_path / name)


def test_images_are_counted_as_far_as_a_body_says(requests: Path) -> None:
    """Fails if a wrong `n` could take any number of places, or none."""
    values = [3, 10, 0, -1, 11, "5", 2.0, 2.5, None, True, 10**30]
    lines = [request(str(index), body={"n": n}) for index, n in enumerate(values)]
    lines.append(request("list", body=[1]))
    requests.write_text("\n".join(map(json.dumps, lines)))
    assert list(check_requests(requests).values()) == [3, 10, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]


def test_a_torn_last_line_is_cut_and_the_others_are_kept(requests: Path) -> None:
    """Fails if a process that was killed at any byte of a line costs another line, or leaves a part
    of its own.
    """
    answer_all(requests)
    path = requests.with_name("answers.jsonl")
    whole = path.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:2])
    for size in range(len(kept), len(whole)):
        path.write_bytes(whole[:size])
        answers = opened(requests)
        assert answers.answered == {"a", "b"}
        answers.close()
        assert path.read_bytes() == kept
    answer_all(requests)
    assert path.read_bytes().startswith(kept)
    assert answered(requests) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"id": "1", "custom_id": "z", "response": null, "error": null}\n',
         "line 1 answers 'z', which is no request of "),
        (b'{"id": "1", "custom_id": ["a"], "response": null, "error": null}\n', "line 1 answers"),
        (b'{"custom_id": "a", "method": "POST"}\n', "line 1 is no answer"),
        (b"notes\n", "line 1 is no answer"),
        (b"notes", "line 1 is no answer"),
        (b'{"custom_id": "a"', "line 1 is no answer"),
        (b"\x00\x00\n", "line 1 is no answer"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused_and_stays(
    requests: Path, content: bytes, told: str
) -> None:
    """Fails if another batch's answers are added to, or a file of the user's is cut."""
    path = requests.with_name("answers.jsonl")
    path.write_bytes(content)
    with refused(re.escape(f"{path}: {told}")):
        opened(requests)
    assert path.read_bytes() == content


def test_the_requests_are_no_place_for_answers(requests: Path) -> None:
    """Fails if a file that is named twice loses its requests."""
    before = requests.read_bytes()
    with refused("these are the requests"):
        AnswerFile(requests, requests, {"a"})
    with refused("answers go into a file"):
        AnswerFile(Path(os.devnull), requests, {"a"})
    with refused("cannot write"):
        AnswerFile(requests.parent / "no" / "answers.jsonl", requests, {"a"})
    assert requests.read_bytes() == before


def test_one_process_writes_the_answers(requests: Path) -> None:
    """Fails if the same command, started twice, mixes its lines."""
    first = opened(requests)
    with refused("another process writes"):
        opened(requests)
    first.close()
    opened(requests).close()


def test_a_new_file_without_answers_does_not_stay(requests: Path) -> None:
    """Fails if a command that could not begin leaves an empty file, or takes away one that was
    there.
    """
    path = requests.with_name("answers.jsonl")
    opened(requests).close()
    assert not path.exists()
    path.touch()
    opened(requests).close()
    assert path.exists()


def test_a_full_disk_costs_no_answer(requests: Path) -> None:
    """Fails if the disk takes a part of a line and the file keeps it, or the message does not say
    what to do.
    """
    answer_all(requests)
    path = requests.with_name("answers.jsonl")
    size = path.stat().st_size
    for missing in (1, 7, 60, size // 2):
        path.unlink()
        with room_for(size - missing), refused("cannot write .*; it has . answers. Make room"):
            answer_all(requests)
        kept = answered(requests)
        assert kept == ["a", "b", "c"][: len(kept)]
        assert len(kept) == (2 if missing < size // 2 else 1)
        answer_all(requests)
        assert answered(requests) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "error", [*ERRORS, None], ids=lambda error: "killed" if error is None else os.strerror(error)
)
def test_answers_go_on_whichever_call_fails(requests: Path, error: int | None) -> None:
    """Fails if a call's failure, or death at it, loses a whole answer, leaves a part of one, or
    stops the next run.
    """
    path = requests.with_name("answers.jsonl")
    work = partial(answer_all, requests)
    made = calls_of(path, work)
    assert {"open", "fstat", "flock", "ftruncate", "write", "fsync"} <= set(made)
    for at in range(len(made)):
        path.unlink(missing_ok=True)
        expected: type[BaseException] = Killed if error is None else UserError
        with counted(SystemCalls(path, at, error)), contextlib.suppress(expected):
            work()
        before = answered(requests) if path.exists() else []
        assert len(before) >= made[:at].count("write"), f"lost by a failure of {made[at]}"
        work()
        assert answered(requests) == ["a", "b", "c"]
