"""A front: a process that answers HTTP for a dispatcher in another. Several share an address, each
with a socket of its own.
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

from autoregressive.serve.heap import settle_heap
from autoregressive.serve.web.awake import SILENT_SECONDS, TICK_SECONDS, AwakeClock
from autoregressive.serve.web.channel import Channel
from autoregressive.serve.web.connections import Connections, ConnectionStats
from autoregressive.serve.web.errors import ApiError, not_ready
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
from autoregressive.serve.web.jobs import Job
from autoregressive.serve.web.served_model import ServedModel
from autoregressive.serve.web.server import QuietServer
from autoregressive.serve.web.service import Share, build_service_app
from autoregressive.serve.web.settings import ServerSettings
from autoregressive.serve.worker.messages import (
    Cancel,
    Drawn,
    Ended,
    Heartbeat,
    Image,
    Preview,
    Started,
    Submit,
)

_HEARTBEAT_SECONDS = 0.2
_REPLY_SECONDS = 5.0  # for the dispatcher to answer a question
_LAST_WORDS_SECONDS = 2.0  # for the last counts to be written
_log = logging.getLogger("llamagen.fronts")


class RemoteDesk:
    """Stands for the dispatcher in a front: a `Desk`. Used in the event loop in which it is made.

    Args:
        finish: called when the front is to end; with True: without waiting for anything.
        alone: called when the dispatcher's process has gone.
        patience: seconds after which a dispatcher that does not respond is given up, and the front
            ends.
        connection_stats: of this process, which the dispatcher is told.
    """

    def __init__(
        self,
        connection: socket.socket,
        finish: Callable[[bool], None],
        alone: Callable[[], None],
        patience: float,
        connection_stats: Callable[[], ConnectionStats] = ConnectionStats,
    ) -> None:
        self._finish, self._patience, self._connection_stats = finish, patience, connection_stats
        self._clock = AwakeClock()
        self._heard_at = self._clock.now()
        self._state = State(None, "the service is being loaded: try again soon", 5, 1, (), ())
        self._numbers = itertools.count()
        self._jobs: dict[int, Job] = {}
        self._ahead: dict[int, int] = {}
        self._replies: dict[int, asyncio.Future[Accepted | Refused]] = {}
        self._questions: dict[int, asyncio.Future[bytes]] = {}
        # answered requests that the dispatcher has not been told of
        self._uncounted: Counter[str] = Counter()
        self._channel = Channel(connection, KINDS, self._take, alone)
        self._watching = asyncio.create_task(self._watch())

    @property
    def unhealthy(self) -> str | None:
        """What the dispatcher said last, unless that is too long ago."""
        if self._silent_seconds > SILENT_SECONDS:
            return "the process that shares out the work does not respond"
        return self._state.unhealthy

    @property
    def _silent_seconds(self) -> float:
        return self._clock.now() - self._heard_at

    def require_ready(self) -> None:
        """As the dispatcher's."""
        if (why := self.unhealthy) is not None:
            raise not_ready(f"{why}: try again later", 10)
        if self._state.refusal is not None:
            raise not_ready(self._state.refusal, self._state.refusal_retry_after)

    async def accept(self, order: Submit) -> Job:
        """Asks the dispatcher, unless it is known that nothing is accepted, or that the dispatcher
        is silent.
        """
        self.require_ready()
        job = Job(replace(order, job=next(self._numbers)), time.monotonic())
        number = job.order.job
        self._jobs[number] = job
        self._replies[number] = asyncio.get_running_loop().create_future()
        self._channel.put(job.order)
        try:
            async with asyncio.timeout(_REPLY_SECONDS):
                reply = await self._replies[number]
        except TimeoutError as error:
            self.abandon(job)
            raise _no_reply() from error
        except asyncio.CancelledError:
            self.abandon(job)
            raise
        finally:
            del self._replies[number]
        if isinstance(reply, Refused):
            raise ApiError(reply.status, reply.message, reply.code, reply.param, reply.retry_after)
        return job

    def abandon(self, job: Job) -> None:
        """As the dispatcher's."""
        job.abandon()
        if job.order.job in self._jobs:
            self._channel.put(Cancel(job.order.job))

    def ahead_of(self, job: Job) -> int:
        """As the dispatcher told last."""
        return self._ahead.get(job.order.job, 0)

    def retry_after(self) -> int:
        """As the dispatcher's."""
        return self._state.retry_after

    def count(self, outcome: str) -> None:
        """The dispatcher is told with the next heartbeat."""
        self._uncounted[outcome] += 1

    def _tell_counts(self) -> None:
        for outcome, requests in self._uncounted.items():
            self._channel.put(Count(outcome, requests))
        self._uncounted.clear()

    async def metrics_text(self) -> bytes:
        """The dispatcher's, which has counted by then all that this front has answered."""
        if self._silent_seconds > SILENT_SECONDS:
            raise _no_reply()
        self._tell_counts()
        number = next(self._numbers)
        self._questions[number] = asyncio.get_running_loop().create_future()
        self._channel.put(AskMetrics(number))
        try:
            async with asyncio.timeout(_REPLY_SECONDS):
                return await self._questions[number]
        except TimeoutError as error:
            raise _no_reply() from error
        finally:
            del self._questions[number]

    async def close(self) -> None:
        """Waits until what was said is written."""
        self._watching.cancel()
        self._tell_counts()
        await self._channel.drain(_LAST_WORDS_SECONDS)
        self._channel.close()

    async def _watch(self) -> None:
        """Says that this front answers, and looks whether the dispatcher responds."""
        told_at = -_HEARTBEAT_SECONDS
        while self._silent_seconds <= self._patience:
            now = self._clock.now()
            if now - told_at >= _HEARTBEAT_SECONDS and self._channel.idle:
                told_at = now
                self._channel.put(Up(**vars(self._connection_stats())))
                self._tell_counts()
            await asyncio.sleep(TICK_SECONDS)
        _log.critical(
            "the dispatcher has not been heard of for %g seconds: this process ends", self._patience
        )
        for job in list(self._jobs.values()):
            job.take(Ended(job.order.job, "engine_lost", time.monotonic()))
        self._finish(False)

    def _take(self, message: object) -> None:
        self._heard_at = self._clock.now()
        match message:
            case Heartbeat():
                pass
            case Accepted(job=number) | Refused(job=number):
                if isinstance(message, Refused):
                    del self._jobs[number]
                else:
                    self._ahead[number] = message.ahead
                if (reply := self._replies.get(number)) is not None and not reply.done():
                    reply.set_result(message)
            case Started() | Drawn() | Preview() | Image() | Ended():
                job = self._jobs[message.job]
                job.take(message)
                if isinstance(message, Ended):
                    del self._jobs[message.job]
                    self._ahead.pop(message.job, None)
            case State():
                self._state = message
                self._ahead |= dict(zip(message.waiting, message.ahead, strict=True))
            case MetricsText(question=number, text=text):
                if (question := self._questions.get(number)) is not None and not question.done():
                    question.set_result(text)
            case Finish(at_once=at_once):
                self._finish(at_once)


def _no_reply() -> ApiError:
    return not_ready("the service did not respond in time: try again later", 10)


@dataclass(frozen=True)
class FrontRecipe:
    """What a front's process is started with."""

    settings: ServerSettings
    model: ServedModel
    address: str  # where clients reach the service, if the settings do not say
    share: Share

    def __call__(self, connection: socket.socket, listener: socket.socket) -> None:
        """The process, with the connection to the dispatcher and the socket that clients connect
        to.
        """
        logging.getLogger("llamagen").setLevel(self.settings.log_level.upper())
        asyncio.run(self._serve(connection, listener))

    async def _serve(self, connection: socket.socket, listener: socket.socket) -> None:
        def finish(at_once: bool) -> None:
            server.should_exit = True
            server.force_exit |= at_once  # this may come first: it overtakes

        settings = self.settings
        connections = Connections(settings.max_connections, settings.max_buffered_bytes)
        desk = RemoteDesk(
            connection,
            finish,
            lambda: sys.exit(1),
            settings.patience.step,
            lambda: connections.stats,
        )
        app, encoders = build_service_app(settings, self.model, desk, self.address, self.share)
        server = QuietServer(app, settings.patience.shutdown, connections)
        settle_heap()
        await server.serve(sockets=[listener])
        encoders.shutdown(wait=False, cancel_futures=True)
        await desk.close()
