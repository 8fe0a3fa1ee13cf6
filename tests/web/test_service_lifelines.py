"""Each process of the service, in each phase, is stopped and killed: probes say so within two
seconds.

A stopped process is what a hung one looks like from outside. The services are fakes that are forked
from one process, so that forty of them fit into a minute.
"""

import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from fake_service import Service, running_service
from test_service_promises import send

pytestmark = pytest.mark.timing
NOTICED_SECONDS = 2.0
_AT_ONCE = 10  # services
_PHASES = ("loading", "idle", "drawing", "draining")


@dataclass(frozen=True)
class Case:
    """What is done to which process of which service, and when."""

    fronts: int
    process: str
    phase: str
    number: signal.Signals

    def __str__(self) -> str:
        return f"{self.fronts} of HTTP, {self.process}, {self.phase}, {self.number.name}"


CASES = [
    Case(fronts, process, phase, number)
    for fronts, processes in ((1, ("dispatcher", "engine")), (2, ("dispatcher", "engine", "front")))
    for process, phase, number in itertools.product(
        processes, _PHASES, (signal.SIGSTOP, signal.SIGKILL)
    )
]


@dataclass(frozen=True)
class Outcome:
    """What probes said afterwards."""

    last_200: (
        float  # seconds from the signal until the last probe that was answered by 200 was sent
    )
    # what a drawing gets at once meanwhile; None: nobody may be there to answer
    drawing: int | None
    recovered: bool  # a stopped process that goes on is well again
    log: str


def enter(phase: str, service: Service) -> "socket.socket | None":
    """Brings a service to a phase; the connection of the client that waits for a drawing, which
    takes six seconds or more.
    """
    if phase == "loading":
        return None
    service.wait_until_ready()
    if phase == "idle":
        return None
    service.faults.set("step_seconds", "0.1")
    client = send(service)
    service.wait_for(lambda: service.gauges()["num_requests_running"] == 1, 20)
    if phase == "draining":
        service.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda: service.client.get("/ready").status_code == 503, 5)
        assert service.client.get("/health").status_code == 200
    return client


def status(service: Service, path: str, timeout: float = 0.3) -> int:
    """On a connection of its own, so that any process that answers HTTP may get it; 0: there is no
    answer.
    """
    try:
        return httpx2.get(service.url + path, timeout=timeout).status_code
    except httpx2.TransportError:
        return 0


def drawing_status(service: Service, timeout: float = 1.0) -> int:
    """On a connection of its own; 0: there is no answer."""
    url = f"{service.url}/v1/images/generations"
    try:
        return httpx2.post(url, json={"prompt": "cat"}, timeout=timeout).status_code
    except httpx2.TransportError:
        return 0


def walk(case: Case, folder: Path) -> Outcome:
    # One that is killed must not be ready meanwhile; one that is stopped would be ready soon, if it
    # were not stopped.
    (folder / "slow_start").write_text("30" if case.number == signal.SIGKILL else "1")
    if case.phase != "loading":
        (folder / "slow_start").unlink()
    flags = ("--max-num-seqs", "4", "--step-timeout", "20", "--api-server-count", str(case.fronts))
    with running_service(folder, *flags, ready=False) as service:
        client = enter(case.phase, service)
        service.wait_for(
            lambda: len(service.children) == (1 if case.fronts == 1 else 1 + case.fronts), 10
        )
        pid = {
            "dispatcher": service.process.pid,
            "engine": service.children[0],
            "front": service.children[-1],
        }[case.process]
        # What is stopped while it loads does not get ready.
        path = "/ready" if case.phase == "loading" and case.number == signal.SIGSTOP else "/health"
        os.kill(pid, case.number)
        begun = time.monotonic()
        last = 0.0
        while (sent := time.monotonic() - begun) < NOTICED_SECONDS + 0.8:
            if status(service, path) == 200:
                last = sent
            time.sleep(0.03)
        drawing = None
        answers = case.process == "engine" or (case.process == "dispatcher" and case.fronts > 1)
        if case.number == signal.SIGSTOP and answers:
            drawing = drawing_status(service)
        recovered = True
        if case.number == signal.SIGSTOP and case.phase in ("loading", "idle"):
            os.kill(pid, signal.SIGCONT)
            deadline = time.monotonic() + 20
            while not (
                recovered := status(service, "/ready", 2) == 200 == status(service, "/health", 2)
            ):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        elif case.number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
        if client is not None:
            client.close()
        return Outcome(last, drawing, recovered, service.log)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, "Future[Outcome]"]]:
    """Of all cases that were asked for; some run at a time."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [
        spec.params["case"]
        for spec in specs
        if spec is not None and isinstance(spec.params.get("case"), Case)
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        # The folders are made in this thread: pytest makes the first one's parent without a lock.
        yield {case: pool.submit(walk, case, tmp_path_factory.mktemp("service")) for case in cases}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_process_that_stops_or_dies_shows(
    outcomes: dict[Case, "Future[Outcome]"], case: Case
) -> None:
    """Fails if a probe says that all is well when a process has not run for two seconds, or when it
    runs again, that it is not.

    A drawing that is asked for meanwhile gets 503 at once.
    """
    outcome = outcomes[case].result(120)
    assert outcome.last_200 <= NOTICED_SECONDS, outcome.log
    assert outcome.drawing in (None, 503), outcome.log
    assert outcome.recovered, outcome.log
