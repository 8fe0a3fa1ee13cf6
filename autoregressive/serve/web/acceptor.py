"""Accepts connections: a few at a turn of the event loop, and never more than this process has
descriptors for.

asyncio's own server accepts as many as wait, without a look at how many are open. Once no
descriptor is left it logs a traceback for each place of the backlog, again and again.
"""

import asyncio
import contextlib
import errno
import itertools
import logging
import socket
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import REQUESTS, new_request_id
from autoregressive.serve.web.connections import REFUSED_SOCKETS, Connections, Phase
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
        self._busy_since: float | None = None  # as far as new connections have shown it
        self._refused: set[_Refusal] = set()
        listener.setblocking(False)
        self._accepting = self._loop.create_task(self._accept())

    def close(self) -> None:
        """Stops accepting. The listener's owner closes the listener."""
        self._loop.remove_reader(self._listener)
        self._accepting.cancel()
        for refusal in self._refused:
            refusal.transport.abort()

    async def wait_closed(self) -> None:
        """Returns at once, because uvicorn waits for the connections."""

    async def _accept(self) -> None:
        for number in itertools.count():
            if number % _ACCEPTS_A_TURN == 0:
                await asyncio.sleep(0)
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno in _STARVED:
                    self._connections.starve()
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            await self._wait_for_room()
            opened: PatientProtocol | _Refusal
            if self._connections.make_room():
                opened = self._protocol()
                self._connections.move(opened, Phase.NEW)  # it takes a descriptor from now on
            else:
                opened = _Refusal(self._refused)
            task = self._loop.create_task(self._open(connection, opened))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _wait_for_room(self) -> None:
        """Waits for a moment if all connections are busy, because one may soon be free or idle."""
        while not self._connections.has_room:
            now = self._loop.time()
            self._busy_since = self._busy_since or now
            if now - self._busy_since >= _REFUSE_AFTER_SECONDS:
                return
            await asyncio.sleep(_BUSY_PAUSE_SECONDS)
        self._busy_since = None

    async def _open(
        self, connection: socket.socket, protocol: "PatientProtocol | _Refusal"
    ) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection)
        except OSError:  # the client has left
            if isinstance(protocol, PatientProtocol):
                self._connections.remove(protocol)
            connection.close()


class _Refusal(asyncio.Protocol):
    """Tells a client that all connections are busy, and drops what it still sends.

    Args:
        others: that are told so now.
    """

    transport: Any  # once it is open

    def __init__(self, others: "set[_Refusal]") -> None:
        self._others, self._left_bytes = others, _DRAIN_BYTES

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        request_id = new_request_id()
        client = transport.get_extra_info("peername")
        # A warning a second counts the refused ones.
        line = {"request_id": request_id, "client": client and client[0], "status": 503}
        _log.debug("request", extra={"fields": line})
        self.transport.write(_refusal(request_id))
        if len(self._others) >= REFUSED_SOCKETS:
            self.transport.close()
            return
        self._others.add(self)
        asyncio.get_running_loop().call_later(_DRAIN_SECONDS, self.transport.abort)
        with contextlib.suppress(OSError):  # it has left
            self.transport.write_eof()

    @override
    def data_received(self, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes <= 0:
            self.transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._others.discard(self)


def _refusal(request_id: str) -> bytes:
    """The bytes of the answer to a client that found all connections busy."""
    error = ApiError(503, "all connections are busy: try again later", "overloaded", None, 5)
    headers, body = error.encode(last=True)
    headers.append((b"x-request-id", request_id.encode()))
    lines = [b"HTTP/1.1 503 Service Unavailable", *(b"%b: %b" % header for header in headers)]
    return b"\r\n".join([*lines, b"", body])
