"""Fake services that take a tenth of a second to start: they are forked from a process that has
imported everything.

Each process of tests has one such process, the forge, from its first service on. `python
tests/helpers/forked_services.py` reads a line of JSON for each service, and answers with its
process id.
"""

import atexit
import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import fake_service
from fake_service import FAULTS, Faults, Service, ServiceProcess

from autoregressive.cli.command import run_command
from autoregressive.serve.signals import SignalWatch
from autoregressive.serve.web import fronts
from autoregressive.serve.worker import process, worker

_START_SECONDS = 120.0


class ForkedChild:
    """A `ChildProcess` that was forked."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self, timeout: float = 60) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.01)
        return status


def fork_child(
    run: Callable[..., None], name: str, *sockets: socket.socket
) -> tuple[ForkedChild, socket.socket]:
    """As `start_child`, without a new interpreter."""
    ours, theirs = process.connect()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            close_all_but(0, 1, 2, theirs.fileno(), *(one.fileno() for one in sockets))
            process.live(name, parent, lambda: run(theirs, *sockets))
        finally:
            os._exit(1)
    theirs.close()
    return ForkedChild(pid), ours


def close_all_but(*kept: int) -> None:
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def fork_service(asked: dict[str, Any]) -> None:
    """Starts a service, in a process of its parent's that says its process id and writes down its
    status.
    """
    folder = Path(asked["folder"])
    if os.fork() > 0:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid > 0:
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        (folder / "status").write_text(str(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    status = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            # The stream of before takes a pipe for the file that it was made for, and asks where it
            # is in it.
            setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
        close_all_but(0, 1, 2)
        if asked["start_new_session"]:
            os.setsid()
        if asked["open_files"] is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (asked["open_files"],) * 2)
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv = ["fake_service.py", "--port", "0", *asked["flags"]]
        run_command(lambda: fake_service.main(SignalWatch()))
    except SystemExit as end:
        status = cast(int, end.code)
    finally:
        atexit._run_exitfuncs()
        os._exit(status)


class Forge:
    """The process that services are forked from, seen from outside."""

    def __init__(self) -> None:
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=variables
        )
        self._lock = threading.Lock()

    def _ask(self, line: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            assert select.select([self._process.stdout], [], [], _START_SECONDS)[0], (
                "the forge does not answer"
            )
            return self._process.stdout.readline()

    @contextmanager
    def service(
        self,
        folder: Path,
        *flags: str,
        environment: Mapping[str, str] = MappingProxyType({}),
        start_new_session: bool = False,
        open_files: int | None = None,
        verify: ssl.SSLContext | bool = True,
    ) -> Iterator[Service]:
        """A service that has begun to load; killed at the end."""
        asked = {
            "flags": flags,
            "folder": str(folder),
            "environment": _variables() | {FAULTS: str(folder), **environment},
            "start_new_session": start_new_session,
            "open_files": open_files,
        }
        for name in ("stdout", "stderr", "status"):  # of a service that ran in this folder before
            if (folder / name).is_file():
                (folder / name).unlink()
        running, log = ServiceProcess(int(self._ask(asked)), folder / "status"), folder / "stderr"
        try:
            deadline = time.monotonic() + _START_SECONDS
            while "served at" not in (
                said := (folder / "stdout").read_text() if (folder / "stdout").exists() else ""
            ):
                status = running.poll()
                assert status is None, f"did not start, status {status}: {log.read_text()}"
                assert time.monotonic() < deadline, "the service does not start"
                time.sleep(0.02)
            url = said.splitlines()[0].split()[-1]
            service = Service(running, url, Faults(folder), log, verify)
            yield service
            service.client.close()
        finally:
            running.kill()
            running.wait()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


_FIRST = threading.Lock()


def forge() -> Forge:
    """The forge of this process, which ends with it."""
    with _FIRST:
        return _forge()


@cache
def _forge() -> Forge:
    made = Forge()
    atexit.register(made.close)
    return made


def main() -> None:
    """Forks a service for each line of stdin."""
    worker.start_child = cast(Any, fork_child)
    fronts.start_child = cast(Any, fork_child)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets those that have ended
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite may run under `nohup`
    gc.collect()
    gc.freeze()  # or each fork's first collection would copy all memory
    for line in sys.stdin:
        fork_service(json.loads(line))


def _variables() -> dict[str, str]:
    """The environment. pytest may change it meanwhile, in another thread."""
    pairs = ((name, os.environ.get(name)) for name in list(os.environ))
    return {name: value for name, value in pairs if value is not None}


if __name__ == "__main__":
    main()
