"""uvicorn around the application, how it accepts connections, and when it ends."""

import asyncio
import contextlib
import errno
import itertools
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from typing_extensions import override

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import REQUESTS, new_request_id
from autoregressive.serve.web.connections import REFUSED_SOCKETS, Connections, Phase
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.guards import MOST_HEADER_BYTES
from autoregressive.serve.web.http_protocol import PatientProtocol

_WRITING_SECONDS = 10.0  # at least, for complete answers to be read before the end
# longer than proxies keep theirs, so that none sends a request into a connection that is being
# closed
_KEEP_ALIVE_SECONDS = 75
# After an engine is lost, for waiting clients to get their errors, and probes a 503.
_LAST_ANSWERS_SECONDS = 3.0
_HANDSHAKE_SECONDS = 20.0  # for a client of HTTPS to send its part
_ACCEPTS_A_TURN = 8  # so that a new one's request is read before many others have come
_PAUSE_SECONDS = 0.1  # when the system has no room for another
_BUSY_PAUSE_SECONDS = 0.02  # when all connections are busy
# All connections may be busy for a moment only. New ones wait for so long before they are refused.
_REFUSE_AFTER_SECONDS = 0.5
# A refused client may still send. That is read and dropped, up to these limits: otherwise the
# system would reset the connection, and the client would lose the answer.
_DRAIN_SECONDS = 1.0
_DRAIN_BYTES = 2 * 2**20
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
        self._say(f"stopping at once: {_requests(self._dispatcher.unfinished)} cut off")
        self.hurry()

    def _waits_for(self) -> str:
        count, seconds = self._dispatcher.unfinished, self._dispatcher.timeouts.shutdown
        if count == 0:
            return "stopping: no request waits for its images"
        return (
            f"finishing {_requests(count)}, for {seconds:g} s at most; Ctrl-C again stops at once "
            "(so does another SIGTERM)"
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


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


class Server(uvicorn.Server):
    """Runs until it is told to finish, and handles no signals.

    Args:
        shutdown: seconds that accepted requests have to finish.
        due: asked ten times a second whether to finish at this moment.
        certificate: the files of the chain and of its key, for HTTPS.
    """

    def __init__(
        self,
        app: ASGIApp,
        shutdown: float,
        connections: Connections,
        due: Callable[[float], bool] = lambda now: False,
        certificate: tuple[Path, Path | None] | None = None,
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
                ssl_certfile=certificate and certificate[0],
                ssl_keyfile=certificate and certificate[1] and str(certificate[1]),
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
            cast(asyncio.Server, Acceptor(listener, protocol, self._connections, self.config.ssl))
            for listener in sockets or []
        ]
        self.started = True

    @override
    @contextlib.contextmanager
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


class Acceptor:
    """Accepts the connections of one listening socket; stands for asyncio's server in uvicorn's.

    It accepts a few at a turn of the event loop, and never more than this process has descriptors
    for. asyncio's own server accepts as many as wait, without a look at how many are open. Once no
    descriptor is left it logs a traceback for each place of the backlog, again and again.

    Args:
        protocol: makes the protocol of a connection.
        tls: of HTTPS; None: HTTP.
    """

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], PatientProtocol],
        connections: Connections,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = tls
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
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._connections.starve()
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            try:
                await self._wait_for_room()
                opened: PatientProtocol | _Refusal
                if self._connections.make_room():
                    opened = self._protocol()
                    # It takes a descriptor from now on. Before a handshake it may be closed for
                    # another's sake.
                    self._connections.move(opened, Phase.IDLE if self._tls else Phase.NEW)
                else:
                    opened = _Refusal(self._refused)
                task = self._loop.create_task(self._open(connection, opened))
                if isinstance(opened, PatientProtocol):
                    opened.opening = task
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
            except Exception:  # nobody would be answered any more if this loop ended
                _log.exception("a connection could not be opened")
                connection.close()
                await asyncio.sleep(_PAUSE_SECONDS)

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
            await self._loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=_HANDSHAKE_SECONDS if self._tls else None,
            )
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
        fields = {"request_id": request_id, "client": client and client[0], "status": 503}
        logging.getLogger(REQUESTS).debug("request", extra={"fields": fields})
        error = ApiError(503, "all connections are busy: try again later", "overloaded", None, 5)
        headers, body = error.encode(last=True)
        headers.append((b"x-request-id", request_id.encode()))
        lines = [b"HTTP/1.1 503 Service Unavailable", *(b"%b: %b" % header for header in headers)]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        if len(self._others) >= REFUSED_SOCKETS:
            self.transport.close()
            return
        self._others.add(self)
        asyncio.get_running_loop().call_later(_DRAIN_SECONDS, self.transport.abort)
        with contextlib.suppress(OSError):  # it has left
            if self.transport.can_write_eof():  # TLS has no end of one direction
                self.transport.write_eof()

    @override
    def data_received(self, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes <= 0:
            self.transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._others.discard(self)
