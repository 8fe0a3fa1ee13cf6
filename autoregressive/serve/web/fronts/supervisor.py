"""The dispatcher's end of the fronts: starts them, passes on requests and events, and ends them."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import assert_never

from autoregressive.serve.web.api_errors import ApiError, internal_error, not_ready
from autoregressive.serve.web.channel import SILENT_SECONDS, TICK_SECONDS, Channel
from autoregressive.serve.web.connections import ConnectionStats
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.fronts.front import (
    KINDS,
    Accepted,
    AskMetrics,
    Finish,
    FrontRecipe,
    MetricsText,
    Refused,
    State,
    Up,
)
from autoregressive.serve.web.served_request import ServedRequest
from autoregressive.serve.web.server import ShutdownPolicy, writing_seconds
from autoregressive.serve.worker.messages import (
    Cancel,
    Ended,
    EngineRequest,
    Heartbeat,
    RequestEvent,
)
from autoregressive.serve.worker.process import start_child

_LEAVE_SECONDS = 3.0  # for a front to end once its answers are read, or have had their time
_LAST_ANSWERS_SECONDS = 1.0  # for a front that is to end at once: it tells waiting clients so
_MOST_BEHIND_BYTES = 256 * 2**20  # of pictures that wait for a front that does not respond
_log = logging.getLogger("llamagen.fronts")


class FrontLink:
    """One front's process, and the requests that its clients have.

    Args:
        gone: called in the event loop when the process has ended, whatever the cause.
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
        self._requests: dict[int, ServedRequest] = {}  # by the front's numbers
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
        """Whether it has been silent for too long, or its waiting messages endanger the memory."""
        silent = self.silent_seconds
        if silent > self._dispatcher.timeouts.step:
            return True
        return silent > SILENT_SECONDS and self._channel.waiting_bytes > _MOST_BEHIND_BYTES

    def tell(self, state: State) -> None:
        """Sends a state if it is new, else a heartbeat.

        Args:
            state: the same for all fronts; the places of the front's own requests are added here.
        """
        waiting = {
            number: served
            for number, served in self._requests.items()
            if served.request.watched and served.started_at is None
        }
        state = replace(
            state,
            waiting=tuple(waiting),
            ahead=tuple(self._dispatcher.ahead_of(served) for served in waiting.values()),
        )
        if state != self._told:
            self._told = state
            self._channel.put(state)
        elif self._channel.idle:
            self._channel.put(Heartbeat())

    def finish(self, *, at_once: bool) -> None:
        """Tells it to end.

        Args:
            at_once: without waiting for anything.
        """
        self._channel.put(Finish(at_once), urgent=at_once)

    def kill(self) -> bool:
        """Ends it for certain; returns whether it had ended in order by itself."""
        self.process.kill()
        status = self.process.wait()
        self._channel.close()
        return status == 0

    def _take(self, message: Up | EngineRequest | Cancel | AskMetrics) -> None:
        self._heard_at = self._dispatcher.clock.now()
        match message:
            case Up(connections=stats, answered=answered):
                self.up = True
                self.connection_stats = stats
                for outcome, requests in answered.items():
                    self._dispatcher.count(outcome, requests)
            case EngineRequest():
                self._submit(message)
            case Cancel(request_id=number):
                if (served := self._requests.get(number)) is not None:
                    self._dispatcher.abandon(served)
            case AskMetrics(question=question):
                text = self._dispatcher.metrics.text()
                self._channel.put(MetricsText(question, text), urgent=True)
            case _:
                assert_never(message)

    def _submit(self, request: EngineRequest) -> None:
        number = request.request_id
        try:
            served = self._dispatcher.admit(request, partial(self._forward, number))
        except Exception as caught:
            if not isinstance(caught, ApiError):
                _log.exception("a request could not be accepted")
            error = caught if isinstance(caught, ApiError) else internal_error()
            self._channel.put(Refused(number, error), urgent=True)
            return
        self._requests[number] = served
        ahead = self._dispatcher.ahead_of(served) if request.watched else 0
        self._channel.put(Accepted(number, ahead))

    def _leave(self) -> None:
        for served in list(self._requests.values()):  # their clients have gone with it
            self._dispatcher.abandon(served)
        self._gone()

    def _forward(self, number: int, event: RequestEvent) -> None:
        self._channel.put(replace(event, request_id=number))
        if isinstance(event, Ended):
            del self._requests[number]


class FrontSupervisor:
    """Runs the fronts until the service ends.

    Args:
        recipes: of the fronts, each with the socket that it listens at.

    Attributes:
        failure: how a front was lost before the end.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        policy: ShutdownPolicy,
        recipes: Sequence[tuple[FrontRecipe, socket.socket]],
    ) -> None:
        self._dispatcher, self._policy = dispatcher, policy
        self.failure: str | None = None
        self._ends = False  # fronts that go are not lost
        self._fronts: list[FrontLink] = []
        dispatcher.metrics.connection_stats = self._connection_stats
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

    def _connection_stats(self) -> ConnectionStats:
        counts = zip(*(astuple(front.connection_stats) for front in self._fronts), strict=True)
        return ConnectionStats(*map(sum, counts))

    async def run(self) -> None:
        """Runs until the end is due, or a front is lost. All fronts have ended then."""
        try:
            while not self._policy.due(time.monotonic()) and self.failure is None:
                self._tell_fronts()
                await asyncio.sleep(TICK_SECONDS)
                for front in self._fronts:
                    if front.hangs:
                        front.process.kill()
                        self._lose_front("has not been heard of")
            self._tell_fronts()
            await self._end_fronts()
        finally:
            self._kill_fronts()

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
        seconds = writing_seconds(self._dispatcher.timeouts.shutdown) + _LEAVE_SECONDS
        await self._wait_for(writing, seconds, lambda: self._policy.at_once)
        if self._policy.at_once:  # told meanwhile, perhaps
            for front in writing:
                front.finish(at_once=True)
            await self._wait_for(writing, _LAST_ANSWERS_SECONDS, lambda: False)
        if not all([front.kill() for front in writing]) and not self._policy.at_once:
            self._policy.status = 1

    async def _wait_for(
        self, fronts: Sequence[FrontLink], seconds: float, enough: Callable[[], bool]
    ) -> None:
        deadline = time.monotonic() + seconds
        while (
            any(front.process.poll() is None for front in fronts)
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
