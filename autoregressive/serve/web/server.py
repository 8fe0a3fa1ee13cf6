"""uvicorn around the application."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import uvicorn

from autoregressive.serve.web.acceptor import Acceptor
from autoregressive.serve.web.connections import Connections
from autoregressive.serve.web.ending import Ending
from autoregressive.serve.web.guards import MOST_HEADER_BYTES, App
from autoregressive.serve.web.http_protocol import PatientProtocol

_WRITING_SECONDS = 10.0  # at least, for answers that are complete to be read, before the end
# longer than proxies keep theirs, so that none sends a request into a connection that is being
# closed
_KEEP_ALIVE_SECONDS = 75


def writing_seconds(shutdown: float) -> int:
    """For answers to be read once the service ends, where accepted work has so many seconds."""
    return round(max(_WRITING_SECONDS, shutdown))


def _config(app: App, shutdown: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        workers=1,  # None would be whatever WEB_CONCURRENCY says, a number or not
        h11_max_incomplete_event_size=MOST_HEADER_BYTES,
        timeout_graceful_shutdown=writing_seconds(shutdown),
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )


class QuietServer(uvicorn.Server):
    """Runs until `should_exit` is set; signals are for others."""

    def __init__(self, app: App, shutdown: float, connections: Connections) -> None:
        super().__init__(_config(app, shutdown))
        self._connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts connections in a way of our own."""
        await self.lifespan.startup()
        loop = asyncio.get_running_loop()

        def protocol() -> PatientProtocol:
            state: dict[str, Any] = self.lifespan.state
            return PatientProtocol(
                self.config, self.server_state, state, loop, connections=self._connections
            )

        acceptors = [Acceptor(listener, protocol, self._connections) for listener in sockets or []]
        self.servers = cast(list[asyncio.Server], acceptors)  # closed, and waited for, by uvicorn
        self.started = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves them as they are."""
        yield


class Server(QuietServer):
    """Runs until `ending` is due.

    Args:
        shutdown: seconds that accepted work has to finish.
    """

    def __init__(self, app: App, ending: Ending, shutdown: float, connections: Connections) -> None:
        super().__init__(app, shutdown, connections)
        self._ending = ending
        ending.hurry = self._hurry

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, asked ten times a second."""
        return self._ending.due(time.monotonic()) or await super().on_tick(counter)

    def _hurry(self) -> None:
        self.force_exit = self.should_exit = True
