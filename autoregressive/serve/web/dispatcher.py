"""Who is let in, which engine draws it, and what becomes of all when the service ends or an engine
is lost.
"""

import asyncio
import itertools
import math
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoregressive.serve.engine.config import SchedulingPolicy
from autoregressive.serve.web.awake import TICK_SECONDS, AwakeClock
from autoregressive.serve.web.engine_link import EngineLink
from autoregressive.serve.web.errors import ApiError, not_ready, queue_full, share_full
from autoregressive.serve.web.jobs import Job, JobEvent
from autoregressive.serve.web.metrics import Metrics
from autoregressive.serve.web.waiting_places import WaitingPlaces
from autoregressive.serve.worker.messages import Submit
from autoregressive.serve.worker.process import ChildProcess

# which of the engines -> its process and the connection to it
StartEngine = Callable[[int], tuple[ChildProcess, socket.socket]]
_LEAVE_SECONDS = 3.0  # for engines' processes to leave their loops; then they are killed
_LET_GO_SECONDS = 3.0  # for an engine to end jobs that it is told to end
_AHEAD_SECONDS = 0.5  # so old may be what is known of the queue's order
_RECENT = 32  # jobs whose durations say when to try again


@dataclass(frozen=True)
class Patience:
    """How long what may last, seconds; None: as long as it takes."""

    queue: float | None = 300.0  # from acceptance to the start
    run: float | None = 600.0  # from the start to the end
    step: float = 60.0  # an engine whose loop has not been heard of for so long hangs
    shutdown: float = 60.0  # for accepted work, once the service is to end


class Dispatcher:
    """Used in the event loop.

    Args:
        start_engine: starts one engine's process.
        engines: how many.
        max_queue_size: requests that may wait at a time, those that find free rows not counted.
        tokens_of_image: of the model, for the metrics.
        policy: whether clients share the waiting places and the engines, or whoever comes first is
            served first.
    """

    def __init__(
        self,
        start_engine: StartEngine,
        engines: int,
        max_queue_size: int,
        patience: Patience,
        tokens_of_image: int,
        policy: SchedulingPolicy = "fair",
    ) -> None:
        self.patience, self._policy = patience, policy
        self._places = WaitingPlaces(max_queue_size, shared=policy == "fair")
        self.draining = False
        self.clock = AwakeClock()
        self.metrics = Metrics(
            lambda: len(self._running()), lambda: len(self._waiting()), self._page_use
        )
        self._tokens_of_image = tokens_of_image
        self._numbers = itertools.count()
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._stop_by = math.inf
        self._ahead: dict[Job, int] = {}
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
            (link.lost for link in self._links if link.lost is not None and link.unable is None),
            None,
        )

    @property
    def unhealthy(self) -> str | None:
        """Why the service is not alive, as far as is known; for clients."""
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
    def idle(self) -> bool:
        """Whether no engine holds anything."""
        return not any(link.jobs for link in self._links)

    @property
    def unfinished(self) -> int:
        """Accepted requests that have not ended."""
        return sum(len(link.jobs) for link in self._links)

    @property
    def unable(self) -> str | None:
        """Why an engine could not be built, if that is for the user to mend."""
        return next((link.unable for link in self._links if link.unable is not None), None)

    def require_ready(self) -> None:
        """Raises the `ApiError` that says why nothing is accepted now."""
        if self.failure is not None:
            raise not_ready("the engine has stopped, and the service with it: try again later", 10)
        if self.draining:
            raise not_ready("the service is stopping: try again later", 10)
        if self.unhealthy is not None:
            raise not_ready(f"{self.unhealthy}: try again later", 10)
        if not self.ready:
            done, total = (
                sum(numbers)
                for numbers in zip(*(link.prepared for link in self._links), strict=True)
            )
            progress = f" ({done} of {total} graphs captured)" if total else ""
            raise not_ready(f"the model is being loaded{progress}: try again soon", 5)

    async def accept(self, order: Submit) -> Job:
        """Lets a job in, as `admit` does."""
        return self.admit(order)

    def admit(self, order: Submit, forward: Callable[[JobEvent], None] | None = None) -> Job:
        """Lets a job in and gives it to the engine that has least to do.

        Args:
            order: its number and deadlines are filled in here.
            forward: takes its events, if they are not to wait in the job's mailbox.

        Raises:
            ApiError: the service is not ready, the queue is full, or the client has its share of
                it.
        """
        self.require_ready()
        now = time.monotonic()
        patience = self.patience
        start_by = now + patience.queue if patience.queue is not None else None
        job = Job(
            replace(order, job=next(self._numbers), start_by=start_by, run_seconds=patience.run),
            now,
            forward=forward,
        )
        link = min(self._links, key=lambda link: link.rows)
        assert link.ready is not None
        rows, room = link.rows + job.rows, link.ready
        job.reserved = rows <= room.max_rows and rows * room.pages_per_row <= room.num_pages
        if not job.reserved and not self._places.admits(order.client):
            raise self._refusal(order.client)
        link.submit(job)
        return job

    def abandon(self, job: Job) -> None:
        """Nobody waits for it any more: its engine is told, unless it has ended."""
        job.abandon()
        for link in self._links:
            if job.order.job in link.jobs:
                link.cancel(job)

    def ahead_of(self, job: Job) -> int:
        """How many waiting jobs start before a waiting one, if no more come; as it was half a
        second ago at most.

        Where clients take turns this is an estimate, because the engines alone know whose turn it
        is: the first waiting jobs of all clients come first, in the order in which they came, then
        what each client can start when it has had as much as they.
        """
        now = time.monotonic()
        if (
            now > self._ahead_at + _AHEAD_SECONDS or job not in self._ahead
        ):  # many ask this again and again
            waiting = sorted(self._waiting(), key=lambda one: one.order.job)
            if self._policy == "fair":
                waiting = _in_turns(waiting)
            self._ahead, self._ahead_at = {one: place for place, one in enumerate(waiting)}, now
        return self._ahead.get(job, 0)

    def retry_after(self) -> int:
        """Seconds after which to try again: what a request takes these days."""
        recent = sorted(self._durations)
        return max(1, math.ceil(recent[len(recent) // 2])) if recent else 1

    def count(self, outcome: str, requests: int = 1) -> None:
        """Requests for images or codes have been answered."""
        self.metrics.requests.labels(outcome=outcome).inc(requests)

    async def metrics_text(self) -> bytes:
        """Returns all metrics as Prometheus reads them."""
        return self.metrics.text()

    def drain(self) -> None:
        """No more is accepted; what was, may finish within the time for that."""
        self.draining = True
        self._stop_by = time.monotonic() + self.patience.shutdown

    def overdue(self, now: float) -> bool:
        """Whether accepted work has had its time, and an engine has not even let go of it when told
        to.
        """
        return now > self._stop_by + _LET_GO_SECONDS

    def stop(self, *, at_once: bool) -> None:
        """Ends the engines, whatever they do; waits for their processes.

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
        if places.full:
            return queue_full(places.taken, self.retry_after())
        return share_full(places.taken_by(client), places.size, self.retry_after())

    def _ended(self, job: Job) -> None:
        assert job.ended is not None
        self.metrics.ended(job, self._tokens_of_image)
        if job.ended.outcome == "finished" and job.started_at is not None:
            self._durations.append(job.ended.at - job.started_at)

    async def _watch_engines(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            for link in self._links:
                if link.loop_silent_seconds > self.patience.step:
                    link.give_up(
                        f"an engine has not been heard of for {self.patience.step:g} seconds"
                    )
                if now > self._stop_by:
                    for job in link.jobs.values():
                        link.cancel(job)

    def _jobs(self) -> Sequence[Job]:
        return [job for link in self._links for job in link.jobs.values()]

    def _waiting(self) -> Sequence[Job]:
        return [job for job in self._jobs() if job.started_at is None]

    def _running(self) -> Sequence[Job]:
        return [job for job in self._jobs() if job.started_at is not None]

    def _page_use(self) -> float:
        pages = sum(link.ready.num_pages for link in self._links if link.ready is not None)
        return sum(link.used_pages for link in self._links) / pages if pages else 0.0


def _in_turns(waiting: Sequence[Job]) -> list[Job]:
    """Jobs in the order in which they start if their clients share the engines equally from now on.

    Args:
        waiting: in the order in which they came.
    """
    rows: Counter[str] = Counter()  # of each client's jobs so far
    turns: dict[Job, int] = {}
    for job in waiting:
        turns[job] = rows[job.order.client]
        rows[job.order.client] += job.rows
    return sorted(waiting, key=turns.__getitem__)
