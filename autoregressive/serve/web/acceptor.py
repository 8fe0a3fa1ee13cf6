"""Accepts connections: a few at a turn of the event loop, and never more than this process has
descriptors for.

asyncio's own server accepts as many as wait, without a look at how many are open. Once no
descriptor is left it logs a traceback for each place of the backlog, again and again.
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import REQUESTS, new_request_id
from autoregressive.serve.web.connections import Connections, Phase
from autoregressive.serve.web.descriptors import REFUSED_SOCKETS
from autoregressive.serve.web.http_protocol import PatientProtocol

_ACCEPTS_A_TURN = 8  # so that a new one's request is read before many others have come
_PAUSE_SECONDS = 0.1  # when the system has no room for another
_BUSY_PAUSE_SECONDS = 0.02  # when all connections are busy
# All connections may be busy for a moment only. New ones wait for so long before they are refused.
_REFUSE_AFTER_SECONDS = 0.5
# A refused client may still send. That is read and dropped, up to these limits: otherwise the
# system would reset the connection, and the client would lose the answer.
_DRAIN_SECONDS = 1.0
_DRAIN_BYTES = 2 * 2**20
_READ_BYTES = 64 * 2**10
_NONE_WAITS = (BlockingIOError, InterruptedError, ConnectionAbortedError)
_STARVED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger(REQUESTS)


class Acceptor:
    """Accepts the connections of one listening socket; stands for asyncio's server in uvicorn's.

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
        # How many bytes of each may still be read, and the timer that closes it.
        self._refused: dict[socket.socket, tuple[int, asyncio.TimerHandle]] = {}
        listener.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Stops accepting. The listener's owner closes the listener."""
        self._loop.remove_reader(self._listener)
        if self._pause is not None:
            self._pause.cancel()
        for connection in list(self._refused):
            self._close_refused(connection)

    async def wait_closed(self) -> None:
        """Returns at once, because uvicorn waits for the connections."""

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            if self._should_wait():
                self._pause_for(_BUSY_PAUSE_SECONDS)
                return
            try:
                connection, address = self._listener.accept()
            except _NONE_WAITS:
                return
            except OSError as error:
                if error.errno in _STARVED:
                    self._connections.starve()
                self._pause_for(_PAUSE_SECONDS)
                return
            if self._connections.make_room():
                self._open(connection)
            else:
                self._refuse(connection, address)

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
        self._connections.move(protocol, Phase.NEW)  # it takes a descriptor from now on
        task = self._loop.create_task(self._connect(connection, protocol))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, connection: socket.socket, protocol: PatientProtocol) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection)
        except OSError:  # the client has left
            self._connections.remove(protocol)
            connection.close()

    def _refuse(self, connection: socket.socket, address: tuple[str, int]) -> None:
        """Answers why, as far as that goes without waiting for the client."""
        connection.setblocking(False)
        number = new_request_id()
        # A warning a second counts the refused ones.
        _log.debug(
            "request",
            extra={"fields": {"request_id": number, "client": address[0], "status": 503}},
        )
        try:
            connection.send(_refusal(number))
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # it has left
            connection.close()
            return
        if len(self._refused) >= REFUSED_SOCKETS:
            connection.close()
            return
        timer = self._loop.call_later(_DRAIN_SECONDS, self._close_refused, connection)
        self._refused[connection] = (_DRAIN_BYTES, timer)
        self._loop.add_reader(connection, self._drain, connection)

    def _drain(self, connection: socket.socket) -> None:
        left, timer = self._refused[connection]
        try:
            count = len(connection.recv(_READ_BYTES))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        self._refused[connection] = (left - count, timer)
        if count == 0 or left <= count:
            self._close_refused(connection)

    def _close_refused(self, connection: socket.socket) -> None:
        _, timer = self._refused.pop(connection)
        timer.cancel()
        self._loop.remove_reader(connection)
        connection.close()


def _refusal(number: str) -> bytes:
    """The bytes of the answer to a client that found all connections busy."""
    error = ApiError(503, "all connections are busy: try again later", "overloaded", None, 5)
    headers, body = error.encode(last=True)
    lines = [b"HTTP/1.1 503 Service Unavailable"]
    lines += [b"%b: %b" % header for header in (*headers, (b"x-request-id", number.encode()))]
    return b"\r\n".join([*lines, b"", body])
