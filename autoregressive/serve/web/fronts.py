"""Several processes that answer HTTP for one dispatcher: the fronts, each with a socket of its own
at one address, and the dispatcher's end of them. Only a service with several of them imports this.

A front sends `Up`, then `EngineRequest`, `Cancel` and `AskMetrics`. The dispatcher answers with
`Accepted` or `Refused`, then with the events of the request under the front's own id, and with
`MetricsText`. It sends each change of `State`, and `Finish` at the end. Several times a second it
sends a `Heartbeat`, and the front sends `Up`, unless other messages wait to be written. `Refused`,
`MetricsText` and a `Finish` at once overtake messages that wait to be written.
"""

import asyncio
import itertools
import logging
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, ClassVar, assert_never

from typing_extensions import override

from autoregressive.serve.web.api_errors import ApiError, internal_error, not_ready
from autoregressive.serve.web.app import build_service_app
from autoregressive.serve.web.app_state import RequestBroker
from autoregressive.serve.web.connections import Connections, ConnectionStats
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.schema import ServedModel
from autoregressive.serve.web.server import Server, ShutdownPolicy, writing_seconds
from autoregressive.serve.web.server_settings import ServerSettings
from autoregressive.serve.worker.messages import (
    KINDS,
    Cancel,
    Ended,
    EngineRequest,
    Heartbeat,
    Image,
    Preview,
    Progress,
    RequestEvent,
    ServedRequest,
    Started,
)
from autoregressive.serve.worker.process import ChildProcess, settle_heap, start_child
from autoregressive.serve.worker.transport import SILENT_SECONDS, TICK_SECONDS, AwakeClock, Channel

_REPLY_SECONDS = 5.0  # for the dispatcher to answer a question
_LAST_WORDS_SECONDS = 2.0  # for the last counts to be written
_LEAVE_SECONDS = 3.0  # for a front to end once its answers are read, or have had their time
_LAST_ANSWERS_SECONDS = 1.0  # for a front that is to end at once: it tells waiting clients so
_MOST_BEHIND_BYTES = 256 * 2**20  # of pictures that wait for a front that does not respond
_log = logging.getLogger("llamagen.fronts")


@dataclass(frozen=True)
class Up:
    """The front answers HTTP. Its event loop sends this several times a second: it is the front's
    heartbeat.
    """

    connections: ConnectionStats
    answered: dict[str, int]  # requests since the last `Up`, by outcome


@dataclass(frozen=True)
class Accepted:
    """A request is accepted."""

    request_id: int
    ahead: int  # requests that wait before it


@dataclass(frozen=True)
class Refused:
    """A request is not accepted."""

    request_id: int
    error: ApiError


@dataclass(frozen=True)
class State:
    """The front answers from it without asking."""

    unhealthy: str | None  # why the service is not alive
    refusal: str | None  # why no request is accepted now
    refusal_retry_after: int
    retry_after: int  # as long as recent requests took
    waiting: tuple[int, ...]  # watched requests that wait
    ahead: tuple[int, ...]  # how many wait before each
    SUPERSEDES: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class AskMetrics:
    """The front wants the metrics' text."""

    question: int


@dataclass(frozen=True)
class MetricsText:
    """The answer to `AskMetrics`."""

    question: int
    text: bytes


@dataclass(frozen=True)
class Finish:
    """Accept no more connections, wait for answers to be read, and end."""

    at_once: bool  # without waiting


FrontMessage = Up | Accepted | Refused | State | AskMetrics | MetricsText | Finish
FRONT_KINDS: dict[str, type] = KINDS | {kind.__name__: kind for kind in FrontMessage.__args__}


class RemoteBroker(RequestBroker):
    """Stands for the dispatcher in a front. Used in the event loop in which it is made.

    Args:
        finish: called when the front is to end; with True: without waiting for anything.
        alone: called when the dispatcher's process has gone.
        timeout: seconds after which the front gives up a dispatcher that does not respond, and
            ends.
        connection_stats: of this process, for the dispatcher.
    """

    def __init__(
        self,
        connection: socket.socket,
        finish: Callable[[bool], None],
        alone: Callable[[], None],
        timeout: float,
        connection_stats: Callable[[], ConnectionStats] = ConnectionStats,
    ) -> None:
        self._finish, self._timeout, self._connection_stats = finish, timeout, connection_stats
        self._clock = AwakeClock()
        self._heard_at = self._clock.now()
        self._state = State(None, "the service is being loaded: try again soon", 5, 1, (), ())
        self._numbers = itertools.count()  # of requests and of questions
        self._requests: dict[int, ServedRequest] = {}
        self._ahead: dict[int, int] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        # answered requests that the dispatcher has not been told of
        self._uncounted: Counter[str] = Counter()
        self._channel = Channel(connection, FRONT_KINDS, self._take, alone)
        self._watching = asyncio.create_task(self._watch())

    @property
    def _silent_seconds(self) -> float:
        return self._clock.now() - self._heard_at

    @property
    @override
    def unhealthy(self) -> str | None:
        if self._silent_seconds > SILENT_SECONDS:
            return "the process that shares out the work does not respond"
        return self._state.unhealthy

    @override
    def require_ready(self) -> None:
        if (why := self.unhealthy) is not None:
            raise not_ready(f"{why}: try again later", 10)
        if self._state.refusal is not None:
            raise not_ready(self._state.refusal, self._state.refusal_retry_after)

    @override
    async def accept(self, request: EngineRequest) -> ServedRequest:
        self.require_ready()
        request = replace(request, request_id=next(self._numbers))
        served = self._requests[request.request_id] = ServedRequest(request, time.monotonic())
        try:
            reply: Accepted | Refused = await self._ask(request.request_id, request)
        except (ApiError, asyncio.CancelledError):
            self.abandon(served)
            raise
        if isinstance(reply, Refused):
            raise reply.error
        return served

    @override
    def abandon(self, served: ServedRequest) -> None:
        served.abandon()
        if served.request_id in self._requests:
            self._channel.put(Cancel(served.request_id))

    @override
    def ahead_of(self, served: ServedRequest) -> int:
        return self._ahead.get(served.request_id, 0)

    @override
    def retry_after(self) -> int:
        return self._state.retry_after

    @override
    def count(self, outcome: str) -> None:
        self._uncounted[outcome] += 1  # the dispatcher is told with the next heartbeat

    @override
    async def metrics_text(self) -> bytes:
        if self._silent_seconds > SILENT_SECONDS:
            raise _no_reply()
        self._tell()
        number = next(self._numbers)
        text: bytes = await self._ask(number, AskMetrics(number))
        return text

    async def close(self) -> None:
        """Waits until all messages are written."""
        self._watching.cancel()
        self._tell()
        await self._channel.drain(_LAST_WORDS_SECONDS)
        self._channel.close()

    def _tell(self) -> None:
        self._channel.put(Up(self._connection_stats(), dict(self._uncounted)))
        self._uncounted.clear()

    async def _ask(self, number: int, question: object) -> Any:
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        self._channel.put(question)
        try:
            async with asyncio.timeout(_REPLY_SECONDS):
                return await reply
        except TimeoutError as error:
            raise _no_reply() from error
        finally:
            del self._replies[number]

    async def _watch(self) -> None:
        """Sends heartbeats, and looks whether the dispatcher responds."""
        while self._silent_seconds <= self._timeout:
            if self._channel.idle:
                self._tell()
            await asyncio.sleep(TICK_SECONDS)
        _log.critical(
            "the dispatcher has not been heard of for %g seconds: this process ends", self._timeout
        )
        for request_id, served in list(self._requests.items()):
            served.take(Ended(request_id, "engine_lost", time.monotonic()))
        self._finish(False)

    def _take(self, message: object) -> None:
        self._heard_at = self._clock.now()
        match message:
            case Accepted(request_id=request_id):
                self._ahead[request_id] = message.ahead
                self._resolve(request_id, message)
            case Refused(request_id=request_id):
                del self._requests[request_id]
                self._resolve(request_id, message)
            case Started() | Progress() | Preview() | Image() | Ended():
                self._requests[message.request_id].take(message)
                if isinstance(message, Ended):
                    del self._requests[message.request_id]
                    self._ahead.pop(message.request_id, None)
            case State():
                self._state = message
                self._ahead |= dict(zip(message.waiting, message.ahead, strict=True))
            case MetricsText(question=number, text=text):
                self._resolve(number, text)
            case Finish(at_once=at_once):
                self._finish(at_once)

    def _resolve(self, number: int, reply: object) -> None:
        if (future := self._replies.get(number)) is not None and not future.done():
            future.set_result(reply)


def _no_reply() -> ApiError:
    return not_ready("the service did not respond in time: try again later", 10)


def run_front(
    settings: ServerSettings,
    model: ServedModel,
    address: str,
    share: tuple[int, int],
    connection: socket.socket,
    listener: socket.socket,
) -> None:
    """Answers HTTP in this process until the dispatcher says that it is to end.

    Args:
        address: where clients reach the service, if the settings do not say.
        share: which of the fronts this is, and how many there are.
        connection: to the dispatcher.
        listener: clients connect to it.
    """

    async def serve() -> None:
        connections = Connections(settings.max_connections, settings.max_buffered_bytes)
        broker = RemoteBroker(
            connection,
            lambda at_once: server.finish(at_once=at_once),
            lambda: sys.exit(1),
            settings.timeouts.step,
            lambda: connections.stats,
        )
        service = build_service_app(settings, model, broker, address, *share)
        server = Server(
            service.app, settings.timeouts.shutdown, connections, certificate=settings.certificate
        )
        settle_heap()
        await server.serve(sockets=[listener])
        await broker.close()
        service.close()

    logging.getLogger("llamagen").setLevel(settings.log_level.upper())
    asyncio.run(serve())


class FrontLink:
    """One front's process, and the requests that its clients have.

    Args:
        connection: to the process.
        gone: called in the event loop when the process has ended, whatever the cause.
    """

    def __init__(
        self,
        process: ChildProcess,
        connection: socket.socket,
        dispatcher: Dispatcher,
        gone: Callable[[], None],
    ) -> None:
        self.process, self._dispatcher, self._gone = process, dispatcher, gone
        self._requests: dict[int, ServedRequest] = {}  # by the front's numbers
        self.up = False  # whether it answers
        self.connection_stats = ConnectionStats()
        self._heard_at = dispatcher.clock.now()
        self._told: State | None = None
        self.channel = Channel(connection, FRONT_KINDS, self._take, self._leave)

    @property
    def silent_seconds(self) -> float:
        """How long it has not been heard of, once it answers."""
        return self._dispatcher.clock.now() - self._heard_at if self.up else 0.0

    @property
    def hangs(self) -> bool:
        """Whether it has been silent for too long, or its waiting messages endanger the memory."""
        return self.silent_seconds > self._dispatcher.timeouts.step or (
            self.silent_seconds > SILENT_SECONDS and self.channel.waiting_bytes > _MOST_BEHIND_BYTES
        )

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
            self.channel.put(state)
        elif self.channel.idle:
            self.channel.put(Heartbeat())

    def kill(self) -> bool:
        """Ends it for certain; returns whether it had ended in order by itself."""
        self.process.kill()
        self.channel.close()
        return self.process.wait() == 0

    def _take(self, message: Up | EngineRequest | Cancel | AskMetrics) -> None:
        self._heard_at = self._dispatcher.clock.now()
        match message:
            case Up(connections=stats, answered=answered):
                self.up, self.connection_stats = True, stats
                for outcome, requests in answered.items():
                    self._dispatcher.count(outcome, requests)
            case EngineRequest():
                self._submit(message)
            case Cancel(request_id=number):
                if (served := self._requests.get(number)) is not None:
                    self._dispatcher.abandon(served)
            case AskMetrics(question=question):
                text = self._dispatcher.metrics.text()
                self.channel.put(MetricsText(question, text), urgent=True)
            case _:
                assert_never(message)

    def _submit(self, request: EngineRequest) -> None:
        number = request.request_id
        try:
            served = self._dispatcher.admit(request, partial(self._forward, number))
        except Exception as error:
            if not isinstance(error, ApiError):
                _log.exception("a request could not be accepted")
                error = internal_error()
            self.channel.put(Refused(number, error), urgent=True)
            return
        self._requests[number] = served
        ahead = self._dispatcher.ahead_of(served) if request.watched else 0
        self.channel.put(Accepted(number, ahead))

    def _leave(self) -> None:
        for served in list(self._requests.values()):  # their clients have gone with it
            self._dispatcher.abandon(served)
        self._gone()

    def _forward(self, number: int, event: RequestEvent) -> None:
        self.channel.put(replace(event, request_id=number))
        if isinstance(event, Ended):
            del self._requests[number]


class FrontSupervisor:
    """Starts a front for each listener, and runs them until the service ends.

    Args:
        address: as of `run_front`.
        listeners: the fronts get copies; these are closed.

    Attributes:
        failure: how a front was lost before the end.
    """

    def __init__(
        self,
        settings: ServerSettings,
        model: ServedModel,
        address: str,
        listeners: Sequence[socket.socket],
        dispatcher: Dispatcher,
        policy: ShutdownPolicy,
    ) -> None:
        self._dispatcher, self._policy = dispatcher, policy
        self.failure: str | None = None
        self._ends = False  # fronts that go are not lost
        self._fronts: list[FrontLink] = []
        dispatcher.metrics.connection_stats = self._connection_stats
        try:
            for index, listener in enumerate(listeners):
                run = partial(run_front, settings, model, address, (index, len(listeners)))
                process, connection = start_child(run, f"front-{index}", listener)
                self._fronts.append(FrontLink(process, connection, dispatcher, self._lose_front))
                listener.close()
        except BaseException:
            for front in self._fronts:
                front.kill()
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
            for front in self._fronts:
                front.kill()

    def _tell_fronts(self) -> None:
        dispatcher = self._dispatcher
        unhealthy = dispatcher.unhealthy
        if unhealthy is None and any(
            front.silent_seconds > SILENT_SECONDS for front in self._fronts
        ):
            unhealthy = "a process that answers HTTP does not respond"
        refusal, refusal_retry_after = None, 0
        try:
            dispatcher.require_ready()
            if unhealthy is not None:
                raise not_ready(f"{unhealthy}: try again later", 10)
            if not self.up:
                raise not_ready("the service is being loaded: try again soon", 5)
        except ApiError as error:
            refusal, refusal_retry_after = error.message, error.retry_after or 0
        state = State(unhealthy, refusal, refusal_retry_after, dispatcher.retry_after(), (), ())
        for front in self._fronts:
            front.tell(state)

    async def _end_fronts(self) -> None:
        """Lets those that answer write what is left to be read, unless told not to wait."""
        self._ends = True
        writing = [front for front in self._fronts if front.up]
        for front in writing:
            front.channel.put(Finish(at_once=False))
        seconds = writing_seconds(self._dispatcher.timeouts.shutdown) + _LEAVE_SECONDS
        deadline, hurries = time.monotonic() + seconds, False
        while time.monotonic() <= deadline and any(
            front.process.poll() is None for front in writing
        ):
            if self._policy.at_once and not hurries:  # told meanwhile, perhaps
                deadline, hurries = time.monotonic() + _LAST_ANSWERS_SECONDS, True
                for front in writing:
                    front.channel.put(Finish(at_once=True), urgent=True)
            await asyncio.sleep(TICK_SECONDS / 2)
        if not all([front.kill() for front in writing]) and not self._policy.at_once:
            self._policy.status = 1

    def _lose_front(self, how: str = "has died") -> None:
        if not self._ends and self.failure is None:
            self.failure = f"a process that answers HTTP {how}"
            if not self._dispatcher.draining:
                self._dispatcher.drain()
