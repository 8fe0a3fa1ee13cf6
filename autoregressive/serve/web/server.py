"""uvicorn around the application, and when it ends."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import uvicorn
from typing_extensions import override

from autoregressive.serve.web.acceptor import Acceptor
from autoregressive.serve.web.connections import Connections
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.guards import MOST_HEADER_BYTES, App
from autoregressive.serve.web.http_protocol import PatientProtocol

_WRITING_SECONDS = 10.0  # at least, for complete answers to be read before the end
# longer than proxies keep theirs, so that none sends a request into a connection that is being
# closed
_KEEP_ALIVE_SECONDS = 75
# After an engine is lost, for waiting clients to get their errors, and probes a 503.
_LAST_ANSWERS_SECONDS = 3.0
_log = logging.getLogger("llamagen.service")


def writing_seconds(shutdown: float) -> int:
    """Seconds for answers to be read once the service ends.

    Args:
        shutdown: seconds that accepted requests have to finish.
    """
    return round(max(_WRITING_SECONDS, shutdown))


class ShutdownPolicy:
    """When the service ends, and with which status.

    After a first signal, accepted requests may finish; after a second, the service ends at once. A
    lost engine ends it with status 1.

    Attributes:
        status: that the process is to end with.
        at_once: whether to end without waiting for anything.
        hurry: called when `at_once` becomes true.

    Args:
        announce: tells people, who may wait at a terminal.
    """

    def __init__(self, dispatcher: Dispatcher, announce: Callable[[str], None]) -> None:
        self.status = 0
        self.at_once = False
        self.hurry: Callable[[], None] = lambda: None
        self._dispatcher, self._announce = dispatcher, announce
        self._lost_at: float | None = None

    def signal(self) -> None:
        """Takes a signal. The second one gives status 1, because clients may still wait for
        answers.
        """
        if not self._dispatcher.draining:
            self._dispatcher.drain()
            self._say(self._waits_for())
            return
        self.status = 1
        self.at_once = True
        self._say("told again: the service ends now")
        self.hurry()

    def _waits_for(self) -> str:
        count, seconds = self._dispatcher.unfinished, self._dispatcher.timeouts.shutdown
        if count == 0:
            return "the service is stopping"
        requests = "1 request is" if count == 1 else f"{count} requests are"
        return (
            f"the service is stopping: {requests} being finished, for {seconds:g} s at most; "
            "Ctrl-C or SIGTERM again ends it now"
        )

    def _say(self, message: str) -> None:
        self._announce(message)
        _log.info(message)

    def due(self, now: float) -> bool:
        """Whether the service is to end now; asked again and again while it runs."""
        dispatcher = self._dispatcher
        if dispatcher.start_failure is not None:
            self.status = 2
            return True
        if dispatcher.failure is not None:
            self.status = 1
            self._lost_at = self._lost_at or now
            if now - self._lost_at > _LAST_ANSWERS_SECONDS:
                return True
        if dispatcher.draining and dispatcher.overdue(now):
            self.status = 1
            return True
        return self.at_once or (dispatcher.draining and dispatcher.unfinished == 0)


class Server(uvicorn.Server):
    """Runs until it is told to finish, and handles no signals.

    Args:
        shutdown: seconds that accepted requests have to finish.
        due: asked ten times a second whether to finish at this moment.
    """

    def __init__(
        self,
        app: App,
        shutdown: float,
        connections: Connections,
        due: Callable[[float], bool] = lambda now: False,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                workers=1,  # None would take the value of WEB_CONCURRENCY, even if it is no number
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                timeout_graceful_shutdown=writing_seconds(shutdown),
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
        )
        self._connections, self._due = connections, due

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        protocol = partial(
            PatientProtocol,
            self.config,
            self.server_state,
            self.lifespan.state,
            asyncio.get_running_loop(),
            connections=self._connections,
        )
        self.servers = [  # closed, and waited for, by uvicorn
            cast(asyncio.Server, Acceptor(listener, protocol, self._connections))
            for listener in sockets or []
        ]
        self.started = True

    @override
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # `SignalWatch` takes the signals
        yield

    @override
    async def on_tick(self, counter: int) -> bool:
        return self._due(time.monotonic()) or await super().on_tick(counter)

    def finish(self, *, at_once: bool) -> None:
        """Ends the server when its answers are read.

        Args:
            at_once: without waiting for that.
        """
        self.should_exit = True
        self.force_exit |= at_once  # a front may be told this first: it overtakes
