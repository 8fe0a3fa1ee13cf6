"""Decides which requests are accepted and which engine draws them, and what becomes of them when
the service ends or an engine is lost.
"""

import asyncio
import itertools
import math
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from typing_extensions import override

from autoregressive.serve.engine.config import SchedulingPolicy
from autoregressive.serve.web.api_errors import ApiError, not_ready
from autoregressive.serve.web.channel import TICK_SECONDS, AwakeClock
from autoregressive.serve.web.clients import WaitingPlaces
from autoregressive.serve.web.engine_link import EngineLink
from autoregressive.serve.web.metrics import Metrics
from autoregressive.serve.web.served_request import ServedRequest
from autoregressive.serve.web.timeouts import Timeouts
from autoregressive.serve.worker.messages import EngineRequest, RequestEvent
from autoregressive.serve.worker.process import ChildProcess

# which of the engines -> its process and the connection to it
StartEngine = Callable[[int], tuple[ChildProcess, socket.socket]]
_LEAVE_SECONDS = 3.0  # for engines' processes to leave their loops; then they are killed
_LET_GO_SECONDS = 3.0  # for an engine to end requests that it is told to end
_AHEAD_SECONDS = 0.5  # the places in the queue are counted anew after so long
_RECENT = 32  # requests whose durations say when to try again


class RequestBroker(Protocol):
    """Takes the routes' requests: the dispatcher, or its stand-in in another process."""

    @property
    def unhealthy(self) -> str | None:
        """For clients: which process of the service is lost or does not respond, as far as is
        known.
        """

    def require_ready(self) -> None:
        """Raises the `ApiError` that says why no request is accepted now."""

    async def accept(self, request: EngineRequest) -> ServedRequest:
        """Accepts a request, and fills in its id and deadlines.

        Raises:
            ApiError: the service is not ready, the queue is full, or the client has its share of
                it.
        """

    def abandon(self, served: ServedRequest) -> None:
        """Drops a request that is not waited for any more. Its engine is told unless it has
        ended.
        """

    def ahead_of(self, served: ServedRequest) -> int:
        """How many waiting requests start before a waiting one, if no more come.

        It is counted every half a second. Where clients take turns it is an estimate, because only
        the engines know whose turn it is.
        """

    def retry_after(self) -> int:
        """Seconds after which to try again: as long as recent requests took."""

    def count(self, outcome: str) -> None:
        """Counts an answered request for images or codes."""

    async def metrics_text(self) -> bytes:
        """All metrics in Prometheus' format.

        Raises:
            ApiError: the dispatcher's process does not respond.
        """


class Dispatcher(RequestBroker):
    """Used in the event loop.

    Args:
        start_engine: starts one engine's process.
        engines: how many.
        max_queue_size: requests that may wait at a time, those that find free rows not counted.
        tokens_of_image: of the model, for the metrics.
        policy: `fair`, if clients share the waiting places and the engines, or `fcfs`.
    """

    def __init__(
        self,
        start_engine: StartEngine,
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
        lost = (link.lost for link in self._links if link.start_failure is None)
        return next(filter(None, lost), None)

    @property
    def start_failure(self) -> str | None:
        """Why an engine could not be built, if the user can mend that."""
        return next(filter(None, (link.start_failure for link in self._links)), None)

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
        built = all(link.ready is not None for link in self._links)
        return built and not self.draining and self.failure is None

    @property
    def unfinished(self) -> int:
        """Accepted requests that have not ended."""
        return sum(len(link.requests) for link in self._links)

    @override
    def require_ready(self) -> None:
        if self.failure is not None:
            raise not_ready("the engine has stopped, and the service with it: try again later", 10)
        if self.draining:
            raise not_ready("the service is stopping: try again later", 10)
        if self.unhealthy is not None:
            raise not_ready(f"{self.unhealthy}: try again later", 10)
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
        now = time.monotonic()
        timeouts = self.timeouts
        start_by = now + timeouts.queue if timeouts.queue is not None else None
        request = replace(
            request, request_id=next(self._numbers), start_by=start_by, run_seconds=timeouts.run
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
            if served.request_id in link.requests:
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
        recent = sorted(self._durations)
        return max(1, math.ceil(recent[len(recent) // 2])) if recent else 1

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
                if link.loop_silent_seconds > self.timeouts.step:
                    link.give_up(
                        f"an engine has not been heard of for {self.timeouts.step:g} seconds"
                    )
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
