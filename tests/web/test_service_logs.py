"""The log: JSON whatever breaks, and nobody waits for it to be read."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_service import running_service

from autoregressive.serve import logs
from autoregressive.serve.logs import LineWriter


def read_lines(descriptor: int, count: int) -> list[bytes]:
    """So many lines of a pipe."""
    data = b""
    while data.count(b"\n") < count:
        data += os.read(descriptor, 2**16)
    return data.splitlines()


def test_lines_that_nobody_reads_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a writer waits, keeps lines without end, or does not say later how many
    are missing.
    """
    monkeypatch.setattr(logs, "_WAITING_BYTES", 10_000)
    source, sink = os.pipe()
    writer = LineWriter(sink, lambda count: b"%d dropped\n" % count)
    line = b"x" * 999 + b"\n"
    begun = time.monotonic()
    for _ in range(200):
        writer.put(line)
        time.sleep(0.0005)
    assert not writer.drain(0.1)
    assert time.monotonic() - begun < 5
    dropped = writer.dropped
    assert 100 < dropped < 190
    lines = read_lines(source, 200 - dropped + 1)
    # a busy machine may drop some before the pipe is full, and says so earlier
    told = [line.split() for line in lines if not line.startswith(b"x")]
    assert {words[1] for words in told} == {b"dropped"}
    assert sum(int(words[0]) for words in told) == dropped
    writer.put(b"last\n")
    assert read_lines(source, 1) == [b"last"]
    assert writer.drain(5)
    os.close(source)
    writer.put(line)  # nobody can read it any more
    assert writer.drain(5)
    assert writer.dropped == dropped + 1
    os.close(sink)


def test_a_pipe_that_others_made_non_blocking_loses_nothing() -> None:
    """Fails if a full pipe passes for a broken one."""
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    writer = LineWriter(sink)
    sent = [b"%d " % number * 1000 + b"\n" for number in range(100)]
    for line in sent:
        writer.put(line)
    assert b"\n".join([*read_lines(source, 100), b""]) == b"".join(sent)
    assert writer.dropped == 0
    os.close(source)
    os.close(sink)


BREAKS = {
    "a warning": "warnings.warn('w-a-r-n')",
    "a print": "print('w-a-r-n', file=sys.stderr)",
    "a library that is no Python": "os.write(2, b'no end of line: w-a-r-n')",
    "another program": "os.system('echo w-a-r-n >&2')",
    "a thread": "threading.Thread(target=fail).start(); time.sleep(0.2)",
    "a finalizer": "Finalized()",
    "another logger": "logging.getLogger('some.library').warning('w-a-r-n')",
    "uvicorn": "logging.getLogger('uvicorn.error').error('w-a-r-n')",
    "a log call that is wrong": "logging.getLogger('llamagen').info('w-a-r-n %d', 'no number')",
    "a callback of the event loop": "asyncio.run(call_back())",
    "a task that nobody awaits": "asyncio.run(forget())",
    "a deep fault": "faulthandler.dump_traceback(file=2); print('w-a-r-n', file=sys.stderr)",
}
SCRIPT = """
import asyncio, faulthandler, gc, logging, os, sys, threading, time, warnings
from autoregressive.serve.logs import service_logs

def fail():
    raise RuntimeError("w-a-r-n")

class Finalized:
    def __del__(self):
        fail()

async def call_back():
    asyncio.get_running_loop().call_soon(fail)
    await asyncio.sleep(0.05)

async def forget():
    async def task(): fail()
    asyncio.create_task(task())
    await asyncio.sleep(0.05)
    gc.collect()

with service_logs("info") as logs:
    logs.announce("for people")
    BREAK
print("plain", file=sys.stderr)
END
"""


def run_script(what: str, end: str = "") -> tuple[int, str, list[str]]:
    """Status, stdout, and the lines of stderr."""
    script = textwrap.dedent(SCRIPT).replace("BREAK", what).replace("END", end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.mark.parametrize("what", BREAKS)
def test_what_breaks_in_the_services_process_is_json(what: str) -> None:
    """Fails if a line is no JSON object, or what was said is lost; afterwards, messages are for
    people.
    """
    status, stdout, lines = run_script(BREAKS[what])
    assert (status, stdout) == (0, "for people\n")
    assert lines[-1] == "plain"
    assert len(lines) > 1
    parsed = [json.loads(line) for line in lines[:-1]]
    assert all(set(line) >= {"time", "level", "logger", "message"} for line in parsed)
    assert any("w-a-r-n" in line["message"] + line.get("exception", "") for line in parsed)


def test_the_last_words_of_the_services_process_are_json() -> None:
    """Fails if an uncaught exception ends in a plain traceback."""
    status, _, lines = run_script("pass", end="fail()")
    assert status == 1
    assert len(lines) == 2  # in either order: what is printed takes the longer way, through a pipe
    (last,) = (json.loads(line) for line in lines if line != "plain")
    assert "w-a-r-n" in last["exception"]


@pytest.mark.parametrize(
    ("fault", "said"), [("raise", "a fault of no known kind"), ("segfault", "Segmentation fault")]
)
def test_the_last_words_of_an_engine_are_json(tmp_path: Path, fault: str, said: str) -> None:
    """Fails if an engine's traceback, or what the system says of a fault, is no JSON."""
    with running_service(tmp_path, "--api-server-count", "2") as service:
        service.faults.set(fault)
        assert service.draw().status_code == 503
        assert service.process.wait(30) == 1
        lines: list[dict[str, Any]] = [json.loads(line) for line in service.log.splitlines()]
    assert any(said in line["message"] + line.get("exception", "") for line in lines)
    assert any("an engine's process has died" in line["message"] for line in lines)


@pytest.mark.timing
def test_a_service_whose_log_nobody_reads_serves_and_ends(tmp_path: Path) -> None:
    """Fails if the service, or its end, waits for a full pipe."""
    os.mkfifo(tmp_path / "stderr")
    # it is open, and that is all
    reader = os.open(tmp_path / "stderr", os.O_RDONLY | os.O_NONBLOCK)
    with running_service(tmp_path) as service:
        path = f"/{'x' * 190}"
        for _ in range(300):  # lines of half a KiB each; the pipe holds 64 KiB
            service.client.get(path)
        begun = time.monotonic()
        assert httpx2.get(f"{service.url}/health", timeout=5).status_code == 200
        assert service.draw().status_code == 200
        assert service.gauges()["log_lines_dropped_total"] == 0  # 4 MiB may wait
        assert time.monotonic() - begun < 5
        assert service.terminate(10) == 0
    os.set_blocking(reader, True)
    lines = b""
    while chunk := os.read(reader, 2**16):
        lines += chunk
    os.close(reader)
    assert 2**16 - 4096 <= len(lines) <= 2**16 + 4096
