"""Accepts connections: a few at a turn of the event loop, and never more than this process has
descriptors for.

asyncio's own server accepts as many as wait, without a look at how many are open. Once no
descriptor is left it logs a traceback for each place of the backlog, again and again.
"""

import asyncio
import contextlib
import errno
import json
import socket
from collections.abc import Callable

from autoregressive.serve.web.connections import Connections, Phase
from autoregressive.serve.web.errors import ApiError
from autoregressive.serve.web.http_protocol import PatientProtocol

_ACCEPTS_A_TURN = 8  # so that a new one's request is read before many others have come
_PAUSE_SECONDS = 0.1  # when the system has no room for another
_BUSY_PAUSE_SECONDS = 0.02  # when all connections are busy
# All connections may be busy for a moment only. New ones wait for so long before they are refused.
_REFUSE_AFTER_SECONDS = 0.5
_NOBODY = (BlockingIOError, InterruptedError, ConnectionAbortedError)  # waits any more
_STARVED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Of one listening socket; stands for asyncio's server in uvicorn's.

    Args:
        protocol: makes the protocol of a connection.
    """

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], PatientProtocol],
        connections: Connections,
    ) -> None:
        self._listener, self._protocol, self._connections = listener, protocol, connections
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._busy_since: float | None = None  # as far as new connections have shown it
        listener.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accepts no more; the listener is its owner's to close."""
        self._loop.remove_reader(self._listener)
        if self._pause is not None:
            self._pause.cancel()

    async def wait_closed(self) -> None:
        """Nothing is left to wait for: uvicorn waits for the connections."""

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            if self._should_wait():
                self._pause_for(_BUSY_PAUSE_SECONDS)
                return
            try:
                connection, _ = self._listener.accept()
            except _NOBODY:
                return
            except OSError as error:
                if error.errno in _STARVED:
                    self._connections.starve()
                self._pause_for(_PAUSE_SECONDS)
                return
            if self._connections.make_room():
                self._open(connection)
            else:
                _refuse(connection)

    def _should_wait(self) -> bool:
        """Whether a new connection waits in the backlog, because one may soon be free or idle."""
        if self._connections.has_room:
            self._busy_since = None
            return False
        now = self._loop.time()
        if self._busy_since is None:
            self._busy_since = now
        return now - self._busy_since < _REFUSE_AFTER_SECONDS

    def _pause_for(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._pause = self._loop.call_later(seconds, self._resume)

    def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        protocol = self._protocol()
        self._connections.move(protocol, Phase.IDLE)  # it takes a descriptor from now on
        task = self._loop.create_task(self._connect(connection, protocol))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, connection: socket.socket, protocol: PatientProtocol) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection)
        except OSError:  # the client has left
            self._connections.remove(protocol)
            connection.close()


def _refuse(connection: socket.socket) -> None:
    """Says why, as far as that goes without waiting."""
    error = ApiError(503, "all connections are busy: try again later", "overloaded", None, 5)
    body = json.dumps(error.body).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\n"
    with connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.send(
            f"{head}connection: close\r\nretry-after: {error.retry_after}\r\n\r\n".encode() + body
        )
        connection.shutdown(socket.SHUT_WR)
