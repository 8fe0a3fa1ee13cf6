"""A front: a process that answers HTTP for a dispatcher in another one. Several share an address,
each with a socket of its own.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from typing_extensions import override

from autoregressive.serve.web.api_errors import ApiError, not_ready
from autoregressive.serve.web.app import Share, build_service_app
from autoregressive.serve.web.app_state import RequestBroker
from autoregressive.serve.web.channel import SILENT_SECONDS, TICK_SECONDS, AwakeClock, Channel
from autoregressive.serve.web.connections import Connections, ConnectionStats
from autoregressive.serve.web.schema import ServedModel
from autoregressive.serve.web.server import Server
from autoregressive.serve.web.server_settings import ServerSettings
from autoregressive.serve.worker import messages
from autoregressive.serve.worker.messages import (
    Cancel,
    Ended,
    EngineRequest,
    Heartbeat,
    Image,
    Preview,
    Progress,
    ServedRequest,
    Started,
)
from autoregressive.serve.worker.process import settle_heap

_HEARTBEAT_SECONDS = 0.2
_REPLY_SECONDS = 5.0  # for the dispatcher to answer a question
_LAST_WORDS_SECONDS = 2.0  # for the last counts to be written
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
KINDS: dict[str, type] = messages.KINDS | {kind.__name__: kind for kind in FrontMessage.__args__}


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
        self._channel = Channel(connection, KINDS, self._take, alone)
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
        """Sends a question, and waits for the reply."""
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
        told_at = -_HEARTBEAT_SECONDS
        while self._silent_seconds <= self._timeout:
            now = self._clock.now()
            if now - told_at >= _HEARTBEAT_SECONDS and self._channel.idle:
                told_at = now
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
            case Heartbeat():
                pass
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


@dataclass(frozen=True)
class FrontRecipe:
    """The arguments of a front's process, which it runs."""

    settings: ServerSettings
    model: ServedModel
    address: str  # where clients reach the service, if the settings do not say
    share: Share

    def __call__(self, connection: socket.socket, listener: socket.socket) -> None:
        """Runs the front.

        Args:
            connection: to the dispatcher.
            listener: clients connect to it.
        """
        logging.getLogger("llamagen").setLevel(self.settings.log_level.upper())
        asyncio.run(self._serve(connection, listener))

    async def _serve(self, connection: socket.socket, listener: socket.socket) -> None:
        settings, timeouts = self.settings, self.settings.timeouts
        connections = Connections(settings.max_connections, settings.max_buffered_bytes)
        broker = RemoteBroker(
            connection,
            lambda at_once: server.finish(at_once=at_once),
            lambda: sys.exit(1),
            timeouts.step,
            lambda: connections.stats,
        )
        app, encoders = build_service_app(settings, self.model, broker, self.address, self.share)
        server = Server(app, timeouts.shutdown, connections)
        settle_heap()
        await server.serve(sockets=[listener])
        encoders.shutdown(wait=False, cancel_futures=True)
        await broker.close()
