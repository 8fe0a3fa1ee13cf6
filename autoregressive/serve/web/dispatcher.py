"""Decides which requests are accepted and which engine draws them, talks with the engines'
processes, and settles what becomes of requests when the service ends or an engine is lost.
"""

import asyncio
import contextlib
import itertools
import math
import signal
import socket
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median_high

from typing_extensions import override

from autoregressive.errors import UserError
from autoregressive.serve.engine.engine_config import SchedulingPolicy
from autoregressive.serve.web.api_errors import ApiError, not_ready
from autoregressive.serve.web.app_state import RequestBroker
from autoregressive.serve.web.clients import WaitingPlaces
from autoregressive.serve.web.metrics import Metrics
from autoregressive.serve.web.timeouts import Timeouts
from autoregressive.serve.worker.messages import (
    KINDS,
    Cancel,
    Ended,
    EngineRequest,
    Event,
    Heartbeat,
    Image,
    LoopStats,
    Preparing,
    Preview,
    Progress,
    Ready,
    RequestEvent,
    ServedRequest,
    Started,
    StartFailed,
    Stop,
)
from autoregressive.serve.worker.process import ChildProcess
from autoregressive.serve.worker.transport import SILENT_SECONDS, TICK_SECONDS, AwakeClock, Channel

_LEAVE_SECONDS = 3.0  # for engines' processes to leave their loops; then they are killed
_LET_GO_SECONDS = 3.0  # for an engine to end requests that it is told to end
_AHEAD_SECONDS = 0.5  # the places in the queue are counted anew after so long
_EXIT_SECONDS = 0.2  # from the end of an engine's connection to its process's exit code
_RECENT = 32  # requests whose durations say when to try again


class Dispatcher(RequestBroker):
    """Used in the event loop.

    Args:
        start_engine: which of the engines -> its process and the connection to it.
        engines: how many.
        max_queue_size: requests that may wait at a time, those that find free rows not counted.
        tokens_of_image: of the model, for the metrics.
        policy: `fair`, if clients share the waiting places and the engines, or `fcfs`.
    """

    def __init__(
        self,
        start_engine: Callable[[int], tuple[ChildProcess, socket.socket]],
        engines: int,
        max_queue_size: int,
        timeouts: Timeouts,
        tokens_of_image: int,
        policy: SchedulingPolicy = "fair",
    ) -> None:
        self.timeouts, self._policy = timeouts, policy
        self._places = WaitingPlaces(max_queue_size, shared=policy == "fair")
        self.draining = False
        self.clock = AwakeClock()
        self.metrics = Metrics(
            running=lambda: self.unfinished - len(self._waiting()),
            waiting=lambda: len(self._waiting()),
            page_use=self._page_use,
        )
        self._tokens_of_image = tokens_of_image
        self._numbers = itertools.count()
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._stop_by = math.inf
        self._ahead: dict[ServedRequest, int] = {}
        self._ahead_at = -math.inf
        self._links = [
            EngineLink(*start_engine(index), self._ended, self._places, self.clock)
            for index in range(engines)
        ]
        self._watch = asyncio.create_task(self._watch_engines())

    @property
    def failure(self) -> str | None:
        """How an engine was lost, so that the service is to end with an error."""
        return next(
            (link.lost for link in self._links if link.lost and not link.start_failure), None
        )

    @property
    def start_failure(self) -> UserError | None:
        """Why an engine could not be built, if the user can mend that."""
        return next((link.start_failure for link in self._links if link.start_failure), None)

    @property
    @override
    def unhealthy(self) -> str | None:
        if self.failure is not None:
            return "the engine has stopped, and the service with it"
        if any(link.silent for link in self._links):
            return "an engine's process does not respond"
        return None

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return (
            not self.draining
            and self.failure is None
            and all(link.ready is not None for link in self._links)
        )

    @property
    def unfinished(self) -> int:
        """Accepted requests that have not ended."""
        return sum(len(link.requests) for link in self._links)

    @override
    def require_ready(self) -> None:
        why = self.unhealthy
        if self.draining and self.failure is None:
            why = "the service is stopping"
        if why is not None:
            raise not_ready(f"{why}: try again later", 10)
        if not self.ready:
            done, total = map(sum, zip(*(link.prepared for link in self._links), strict=True))
            progress = f" ({done} of {total} graphs captured)" if total else ""
            raise not_ready(f"the model is being loaded{progress}: try again soon", 5)

    @override
    async def accept(self, request: EngineRequest) -> ServedRequest:
        return self.admit(request)

    def admit(
        self, request: EngineRequest, forward: Callable[[RequestEvent], None] | None = None
    ) -> ServedRequest:
        """Accepts a request as `accept` does, and gives it to the engine that has least to do.

        Args:
            forward: takes the events, if they are read in another process.
        """
        self.require_ready()
        now, queue = time.monotonic(), self.timeouts.queue
        request = replace(
            request,
            request_id=next(self._numbers),
            start_by=None if queue is None else now + queue,
            run_seconds=self.timeouts.run,
        )
        served = ServedRequest(request, now, forward=forward)
        link = min(self._links, key=lambda link: link.rows)
        assert link.ready is not None
        rows, room = link.rows + served.rows, link.ready
        served.reserved = rows <= room.max_rows and rows * room.pages_per_row <= room.num_pages
        if not served.reserved and not self._places.admits(request.client):
            raise self._refusal(request.client)
        link.submit(served)
        return served

    @override
    def abandon(self, served: ServedRequest) -> None:
        served.abandon()
        for link in self._links:
            link.cancel(served)

    @override
    def ahead_of(self, served: ServedRequest) -> int:
        now = time.monotonic()
        if now > self._ahead_at + _AHEAD_SECONDS or served not in self._ahead:
            waiting = sorted(self._waiting(), key=lambda one: one.request_id)
            if self._policy == "fair":
                waiting = _in_turns(waiting)
            self._ahead, self._ahead_at = {one: place for place, one in enumerate(waiting)}, now
        return self._ahead.get(served, 0)

    @override
    def retry_after(self) -> int:
        return max(1, math.ceil(median_high(self._durations))) if self._durations else 1

    @override
    def count(self, outcome: str, requests: int = 1) -> None:
        self.metrics.requests.labels(outcome=outcome).inc(requests)

    @override
    async def metrics_text(self) -> bytes:
        return self.metrics.text()

    def drain(self) -> None:
        """Accepts no more requests; the accepted ones may finish within the shutdown timeout."""
        self.draining = True
        self._stop_by = time.monotonic() + self.timeouts.shutdown

    def overdue(self, now: float) -> bool:
        """Whether an engine has not let go of a request that it was told to end when the shutdown
        timeout had passed.
        """
        return now > self._stop_by + _LET_GO_SECONDS

    def stop(self, *, at_once: bool) -> None:
        """Ends the engines, even those that hang; waits for their processes.

        Args:
            at_once: do not let them leave their loops in order.
        """
        self._watch.cancel()
        for link in self._links:
            link.begin_to_stop()
        deadline = time.monotonic() + (0.0 if at_once else _LEAVE_SECONDS)
        for link in self._links:
            link.stop(deadline)

    def _refusal(self, client: str) -> ApiError:
        places = self._places
        message = f"{places.taken} requests are waiting, and no more are taken: try again later"
        if not places.full:  # the free places are for other clients
            message = (
                f"you have {places.taken_by(client)} of the {places.size} places for waiting "
                "requests, which is your share now: try again later"
            )
        return ApiError(429, message, "queue_full", None, self.retry_after())

    def _ended(self, served: ServedRequest) -> None:
        assert served.ended is not None
        self.metrics.ended(served, self._tokens_of_image)
        if served.ended.outcome == "finished" and served.started_at is not None:
            self._durations.append(served.ended.at - served.started_at)

    async def _watch_engines(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            for link in self._links:
                if link.loop_silent_seconds > (limit := self.timeouts.step):
                    link.give_up(f"an engine has not been heard of for {limit:g} seconds")
                if now > self._stop_by:
                    for served in link.requests.values():
                        link.cancel(served)

    def _waiting(self) -> list[ServedRequest]:
        return [
            served
            for link in self._links
            for served in link.requests.values()
            if served.started_at is None
        ]

    def _page_use(self) -> float:
        pages = sum(link.ready.num_pages for link in self._links if link.ready is not None)
        return sum(link.used_pages for link in self._links) / pages if pages else 0.0


class EngineLink:
    """One engine: what is known of it, and the requests that it has. Used in the event loop.

    Args:
        on_ended: called in the event loop with each request that has come to its end.
        places: of the service's queue; requests with rows reserved do not take one.
        clock: which this event loop keeps.
    """

    def __init__(
        self,
        process: ChildProcess,
        connection: socket.socket,
        on_ended: Callable[[ServedRequest], None],
        places: WaitingPlaces,
        clock: AwakeClock,
    ) -> None:
        self.process = process
        self.ready: Ready | None = None
        self.prepared = (0, 0)  # how much, of how much
        self.start_failure: UserError | None = None  # why it could not be built
        self.lost: str | None = None  # why, once it has died or was given up
        self.requests: dict[int, ServedRequest] = {}
        self.rows = 0  # that its requests take, running or not
        self.used_pages = 0
        self._clock = clock
        self._heard_at = self._loop_heard_at = clock.now()
        self._on_ended, self._places = on_ended, places
        self._stopped = False
        self._channel = Channel(connection, KINDS, self._take, self._died)

    @property
    def silent(self) -> bool:
        """Whether a built engine's process sends nothing, not even its heartbeat."""
        return self.ready is not None and self._clock.now() - self._heard_at > SILENT_SECONDS

    @property
    def loop_silent_seconds(self) -> float:
        """How long the engine's loop has not been heard of, once it runs: a step may take long, or
        hang.
        """
        return self._clock.now() - self._loop_heard_at if self.ready is not None else 0.0

    def submit(self, served: ServedRequest) -> None:
        """Gives it a request."""
        self.requests[served.request_id] = served
        self.rows += served.rows
        if not served.reserved:
            self._places.take(served.request.client)
        self._channel.put(served.request)

    def cancel(self, served: ServedRequest) -> None:
        """Asks it to end a request early, if it has it; the request stays until the engine says
        so.
        """
        if served.request_id in self.requests:
            self._channel.put(Cancel(served.request_id))

    def give_up(self, why: str) -> None:
        """Kills the process, and ends its requests; without effect once it is lost or stopped."""
        if self.lost is not None or self._stopped:
            return
        self.lost = why
        self.process.kill()
        for request_id in list(self.requests):
            self._take(Ended(request_id, "engine_lost", time.monotonic()))

    def begin_to_stop(self) -> None:
        """Tells the process to end; its results are not wanted any more.

        From now on its messages are dropped, because waiting for the process may hold up the loop.
        """
        self._stopped = True
        self._channel.put(Stop())
        self._channel.flush()
        self._channel.stop_reading()

    def stop(self, deadline: float) -> None:
        """Waits for the process until that moment; then kills it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        self.process.kill()
        self.process.wait()
        self._channel.close()

    def _died(self) -> None:
        """The connection has ended. An engine that was not ready yet would end in the same way
        again.
        """
        if self.ready or self.start_failure or self.lost or self._stopped:
            self.give_up("an engine's process has died")
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_SECONDS)
        code = self.process.poll()
        ended = "no exit status yet" if code is None else f"exit status {code}"
        if code is not None and code < 0:
            ended = signal.Signals(-code).name
        self.start_failure = UserError(
            f"an engine's process died while it loaded the model ({ended}); "
            "check the checkpoints and the memory, and what it wrote before"
        )

    def _take(self, event: Event) -> None:
        self._heard_at = self._clock.now()
        if not isinstance(event, Heartbeat):
            self._loop_heard_at = self._heard_at
        match event:
            case Preparing(done=done, total=total):
                self.prepared = (done, total)
            case Ready():
                self.ready = event
            case StartFailed():
                self.start_failure = event.error
            case LoopStats(used_pages=used_pages):
                self.used_pages = used_pages
            case Started() | Progress() | Preview() | Image() | Ended():
                self._take_request_event(event)

    def _take_request_event(self, event: RequestEvent) -> None:
        served = self.requests.get(event.request_id)
        if served is None:
            return
        waited = served.started_at is None
        served.take(event)
        if waited and not served.reserved and isinstance(event, (Started, Ended)):
            self._places.give_back(served.request.client)
        if isinstance(event, Ended):
            if event.used_pages is not None:
                self.used_pages = event.used_pages
            self.rows -= served.rows
            del self.requests[event.request_id]
            self._on_ended(served)


def _in_turns(waiting: Sequence[ServedRequest]) -> list[ServedRequest]:
    """Requests in the order in which they start if their clients share the engines equally from now
    on.

    The first waiting requests of all clients come first, then what each client can start when it
    has had as much as the others.

    Args:
        waiting: in the order in which they came.
    """
    rows: Counter[str] = Counter()  # of each client's requests so far
    turns: dict[ServedRequest, int] = {}
    for served in waiting:
        turns[served] = rows[served.request.client]
        rows[served.request.client] += served.rows
    return sorted(waiting, key=turns.__getitem__)
