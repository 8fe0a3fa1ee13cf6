"""The dispatcher's end of the fronts: several processes that answer HTTP, one that says who is let
in.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import assert_never

from autoregressive.serve.web.awake import SILENT_SECONDS, TICK_SECONDS
from autoregressive.serve.web.channel import Channel
from autoregressive.serve.web.connections import ConnectionStats
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.ending import Ending
from autoregressive.serve.web.errors import ApiError, internal_error, not_ready
from autoregressive.serve.web.front import FrontRecipe
from autoregressive.serve.web.front_messages import (
    KINDS,
    Accepted,
    AskMetrics,
    Count,
    Finish,
    MetricsText,
    Refused,
    State,
    Up,
)
from autoregressive.serve.web.jobs import Job, JobEvent
from autoregressive.serve.web.server import writing_seconds
from autoregressive.serve.worker.messages import Cancel, Ended, Heartbeat, Submit
from autoregressive.serve.worker.process import start_child

_LEAVE_SECONDS = 3.0  # for a front to end once its answers are read, or have had their time
_LAST_ANSWERS_SECONDS = 1.0  # for a front that is to end at once: it tells waiting clients so
_MOST_BEHIND_BYTES = 256 * 2**20  # of pictures that wait for a front that does not respond
_log = logging.getLogger("llamagen.fronts")


class FrontLink:
    """One front's process, and the jobs that its clients have.

    Args:
        gone: called in the event loop when it has ended, whatever for.
    """

    def __init__(
        self,
        recipe: FrontRecipe,
        listener: socket.socket,
        dispatcher: Dispatcher,
        gone: Callable[[], None],
    ) -> None:
        self.process, connection = start_child(recipe, f"front-{recipe.share.index}", listener)
        self._dispatcher, self._gone = dispatcher, gone
        self._jobs: dict[int, Job] = {}  # by the front's numbers
        self.up = False  # whether it answers
        self.connection_stats = ConnectionStats()
        self._heard_at = dispatcher.clock.now()
        self._told: State | None = None
        self._channel = Channel(connection, KINDS, self._take, self._leave)

    @property
    def silent_seconds(self) -> float:
        """How long it has not been heard of, once it answers."""
        return self._dispatcher.clock.now() - self._heard_at if self.up else 0.0

    @property
    def hangs(self) -> bool:
        """Whether it has been silent for too long, or so much waits for it meanwhile that memory is
        at stake.
        """
        silent = self.silent_seconds
        if silent > self._dispatcher.patience.step:
            return True
        return silent > SILENT_SECONDS and self._channel.waiting_bytes > _MOST_BEHIND_BYTES

    def tell(self, state: State) -> None:
        """Of what is the same for all fronts; its own jobs' places are added here. If nothing is
        new, that the dispatcher lives.
        """
        waiting = {
            number: job
            for number, job in self._jobs.items()
            if job.order.watched and job.started_at is None
        }
        state = replace(
            state,
            waiting=tuple(waiting),
            ahead=tuple(self._dispatcher.ahead_of(job) for job in waiting.values()),
        )
        if state != self._told:
            self._told = state
            self._channel.put(state)
        elif self._channel.idle:
            self._channel.put(Heartbeat())

    def finish(self, *, at_once: bool) -> None:
        """Tells it to end; without waiting for anything, if `at_once`."""
        self._channel.put(Finish(at_once), urgent=at_once)

    def kill(self) -> bool:
        """Ends it for certain; whether it had ended in order by itself."""
        self.process.kill()
        self.process.join()
        self._channel.close()
        return self.process.exitcode == 0

    def _take(self, message: Up | Submit | Cancel | Count | AskMetrics) -> None:
        self._heard_at = self._dispatcher.clock.now()
        match message:
            case Up():
                self.up = True
                self.connection_stats = ConnectionStats(**vars(message))
            case Submit():
                self._submit(message)
            case Cancel(job=number):
                if (job := self._jobs.get(number)) is not None:
                    self._dispatcher.abandon(job)
            case Count(outcome=outcome, requests=requests):
                self._dispatcher.count(outcome, requests)
            case AskMetrics(question=question):
                self._channel.put(
                    MetricsText(question, self._dispatcher.metrics.text()), urgent=True
                )
            case _:
                assert_never(message)

    def _submit(self, order: Submit) -> None:
        number = order.job
        try:
            job = self._dispatcher.admit(order, partial(self._forward, number))
        except Exception as caught:
            if not isinstance(caught, ApiError):
                _log.exception("a request could not be accepted")
            error = caught if isinstance(caught, ApiError) else internal_error()
            refused = Refused(
                number, error.status, error.message, error.code, error.param, error.retry_after
            )
            self._channel.put(refused, urgent=True)
            return
        self._jobs[number] = job
        self._channel.put(Accepted(number, self._dispatcher.ahead_of(job) if order.watched else 0))

    def _leave(self) -> None:
        for job in list(self._jobs.values()):  # their clients have gone with it
            self._dispatcher.abandon(job)
        self._gone()

    def _forward(self, number: int, event: JobEvent) -> None:
        self._channel.put(replace(event, job=number))
        if isinstance(event, Ended):
            del self._jobs[number]


class Hub:
    """Runs the fronts until the service ends.

    Args:
        recipes: of the fronts, each with the socket that it listens at.

    Attributes:
        failure: how a front was lost before the end.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        ending: Ending,
        recipes: Sequence[tuple[FrontRecipe, socket.socket]],
    ) -> None:
        self._dispatcher, self._ending = dispatcher, ending
        self.failure: str | None = None
        self._ends = False  # fronts that go are not lost
        self._fronts: list[FrontLink] = []
        dispatcher.metrics.connection_stats = lambda: sum(
            (front.connection_stats for front in self._fronts), ConnectionStats()
        )
        try:
            for recipe, listener in recipes:
                self._fronts.append(FrontLink(recipe, listener, dispatcher, self._lose_front))
        except BaseException:
            self._kill_fronts()
            raise

    @property
    def up(self) -> bool:
        """Whether all fronts answer."""
        return all(front.up for front in self._fronts)

    async def run(self) -> None:
        """Until the end is due, or a front is lost. All fronts have ended then."""
        try:
            while not self._ending.due(time.monotonic()) and self.failure is None:
                self._tell_fronts()
                await asyncio.sleep(TICK_SECONDS)
                self._watch()
            self._tell_fronts()
            await self._end_fronts()
        finally:
            self._kill_fronts()

    def _watch(self) -> None:
        """Looks for a front that hangs."""
        for front in self._fronts:
            if front.hangs:
                front.process.kill()
                self._lose_front("has not been heard of")

    def _tell_fronts(self) -> None:
        dispatcher = self._dispatcher
        unhealthy = dispatcher.unhealthy
        if unhealthy is None and any(
            front.silent_seconds > SILENT_SECONDS for front in self._fronts
        ):
            unhealthy = "a process that answers HTTP does not respond"
        refusal: ApiError | None = None
        try:
            dispatcher.require_ready()
            if unhealthy is not None:
                refusal = not_ready(f"{unhealthy}: try again later", 10)
            elif not self.up:
                refusal = not_ready("the service is being loaded: try again soon", 5)
        except ApiError as error:
            refusal = error
        state = State(
            unhealthy=unhealthy,
            refusal=refusal.message if refusal is not None else None,
            refusal_retry_after=(refusal.retry_after or 0) if refusal is not None else 0,
            retry_after=dispatcher.retry_after(),
            waiting=(),
            ahead=(),
        )
        for front in self._fronts:
            front.tell(state)

    async def _end_fronts(self) -> None:
        """Lets those that answer write what is left to be read, unless told not to wait."""
        self._ends = True
        writing = [front for front in self._fronts if front.up]
        for front in writing:
            front.finish(at_once=False)
        patience = writing_seconds(self._dispatcher.patience.shutdown) + _LEAVE_SECONDS
        await self._wait_for(writing, time.monotonic() + patience, lambda: self._ending.at_once)
        if self._ending.at_once:  # told meanwhile, perhaps
            for front in writing:
                front.finish(at_once=True)
            await self._wait_for(writing, time.monotonic() + _LAST_ANSWERS_SECONDS, lambda: False)
        if not all([front.kill() for front in writing]) and not self._ending.at_once:
            self._ending.status = 1

    async def _wait_for(
        self, fronts: Sequence[FrontLink], deadline: float, enough: Callable[[], bool]
    ) -> None:
        while (
            any(front.process.is_alive() for front in fronts)
            and time.monotonic() < deadline
            and not enough()
        ):
            await asyncio.sleep(TICK_SECONDS / 2)

    def _kill_fronts(self) -> None:
        for front in self._fronts:
            front.kill()

    def _lose_front(self, how: str = "has died") -> None:
        if not self._ends and self.failure is None:
            self.failure = f"a process that answers HTTP {how}"
            if not self._dispatcher.draining:
                self._dispatcher.drain()
