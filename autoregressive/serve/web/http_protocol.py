"""uvicorn's HTTP/1.1 connection, which drops slow senders and stalled readers, and answers what is
not HTTP.
"""

import asyncio
import contextlib
import logging
import socket
import sys
from typing import Any, cast

import h11
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import REQUESTS, RequestContext, context_of, new_request_id
from autoregressive.serve.web.connections import Connection, Connections, Phase
from autoregressive.serve.web.strict_http import read_strictly
from autoregressive.serve.worker.messages import ServedRequest

# For a client to send a request, from its first byte to its last, or to begin one.
SEND_SECONDS = 20.0
# A client has so many seconds to take what waits for it. Each byte that it takes gives it time
# back, as long as a client of the least rate takes for it; time in which nothing waits for it does
# not count.
READ_SECONDS = 20.0
LEAST_READ_BYTES_PER_SECOND = 8 * 2**10
# After an answer that came before the end of its request: what the client still sends is read and
# dropped, for so long and so much. If it were not read, the system would reset the connection, and
# the client would lose the answer.
LINGER_SECONDS = 10.0
LINGER_BYTES = 16 * 2**20

_MOST_AHEAD_BYTES = 64 * 2**10  # of requests that come before the answer to the one before

_REFUSALS = {
    400: (
        "this is not HTTP/1.1: a line, a header or the framing of the body is malformed",
        "bad_request",
    ),
    431: ("the headers are too large: at most 100 of them, and 64 KiB", "headers_too_large"),
}
_log = logging.getLogger(REQUESTS)


class _Transport:
    """A connection's transport as uvicorn sees it. It counts what is written, and lets the protocol
    close it."""

    def __init__(self, transport: asyncio.Transport, protocol: "PatientProtocol") -> None:
        self._transport, self._protocol = transport, protocol
        self.written_bytes = 0

    def write(self, data: bytes) -> None:
        self.written_bytes += len(data)
        self._transport.write(data)

    def close(self) -> None:
        self._protocol.close_gently(self._transport)

    def is_closing(self) -> bool:
        return self._protocol.lingers or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class PatientProtocol(H11Protocol, Connection):
    """Drops clients that are too slow. It answers headers that are too large by 431, and bytes that
    are not HTTP by 400.

    Args:
        connections: of this process, which this one joins.
    """

    def __init__(self, *arguments: Any, connections: Connections, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        read_strictly(self.conn)
        self._connections = connections
        self._sender_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self.lingers = False  # the answer is written, and what the client still sends is dropped
        self._lingered_bytes = 0
        self._read_seconds = READ_SECONDS  # that the client has left to take what waits
        self._taken_bytes = 0  # by the client, or by the system for it
        self._head_bytes = 0  # of the headers of the request that is answered
        self._drawn_bytes = 0  # written up to the end of the latest answer that was drawn
        self._is_unwanted = False  # closed before it was open
        self._is_new = True  # the event loop has not looked yet whether a request is here
        self._real_transport: asyncio.Transport  # once it is open

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._real_transport = transport
        super().connection_made(cast(asyncio.Transport, _Transport(transport, self)))
        # asyncio does this only where a socket names its protocol. Without it the second part of an
        # answer waits 40 ms for the client to confirm the first.
        with contextlib.suppress(OSError):  # it has left already
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch_sender()
        self._tell_phase()
        # A request that is here by now is read in the next turn of the event loop.
        self.loop.call_soon(self.loop.call_soon, self._arrive)
        if self._is_unwanted:
            transport.close()

    def _arrive(self) -> None:
        self._is_new = False
        self._tell_phase()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        self._stop_sender_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        if (context := self._context) is not None:
            context.cut |= self._is_answering
            # Else each would keep the other until the garbage collector comes.
            context.connection = None
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self.lingers:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > LINGER_BYTES:
                self._real_transport.close()
            return
        super().data_received(data)
        self._watch_sender()
        if self.conn.their_state is h11.DONE and self.flow.read_paused:
            # uvicorn has stopped reading, and so would not notice that the client leaves before it
            # is answered.
            if self._unread_bytes > _MOST_AHEAD_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()
        self._tell_phase()
        if self._phase in (Phase.HEAD, Phase.BODY):
            self._connections.add_bytes(len(data))

    @override
    def handle_events(self) -> None:
        super().handle_events()
        if (context := self._context) is not None and context.connection is None:
            context.connection, context.connections = self, self._connections
            self._head_bytes = sum(len(name) + len(value) for name, value in self.headers)

    @override
    def on_response_complete(self) -> None:
        self._stop_sender_timer()
        if self._served is not None:  # noted here: the next request may take the scope's place
            self._drawn_bytes = self._written_bytes
        # A connection that is idle, or whose answer is not read, holds nothing of the request.
        self.scope = self.headers = self.cycle = None  # type: ignore[assignment]
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY or self._unread_bytes:
            self._watch_sender()
        self._tell_phase()

    @override
    def shutdown(self) -> None:
        if not self._is_answering:
            self._real_transport.close()
        else:
            super().shutdown()

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._tell_phase()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._tell_phase()

    @property
    @override
    def promised(self) -> tuple[str, int]:
        served = self._served
        return ("", 0) if served is None else (served.request.client, served.promised_bytes)

    @property
    @override
    def sends(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    @property
    @override
    def held_bytes(self) -> int:
        held: int = self._unread_bytes + self.transport.get_write_buffer_size()
        if (context := self._context) is not None:
            held += self._head_bytes + len(self.cycle.body)
            held += context.body_bytes + context.unsent_bytes
            held += 0 if context.served is None else context.served.held_bytes
        return held

    @property
    @override
    def seconds_left(self) -> float | None:
        if self.transport.get_write_buffer_size() > 0:
            return self._read_seconds
        return None if self._sender_timer is None else self._sender_timer.when() - self.loop.time()

    @override
    def look(self, seconds: float) -> None:
        waiting = self.transport.get_write_buffer_size()
        taken = self._written_bytes - waiting
        new, self._taken_bytes = taken - self._taken_bytes, taken
        left = self._read_seconds - seconds + new / LEAST_READ_BYTES_PER_SECOND
        self._read_seconds = min(left, READ_SECONDS) if waiting > 0 else READ_SECONDS
        if self._read_seconds <= 0:
            self._connections.count_dropped()
            self.drop()
        self._tell_phase()

    @override
    def drop(self) -> None:
        if self._is_answering and not self._draws:
            context_of(self.scope).counted = True
        self.transport.abort()

    @override
    def close_idle(self) -> None:
        if self.transport is None:
            self._is_unwanted = True
        elif self.transport.get_write_buffer_size() > 0:
            # Closed gently, it would keep its descriptor until its client has read, uncounted.
            self.drop()
        else:
            if self._is_answering:
                context_of(self.scope).counted = True
            self._real_transport.close()

    def close_gently(self, transport: asyncio.Transport) -> None:
        """Closes it when its answers are sent.

        A client that still sends gets time to read its answer before the system refuses what it
        sends.
        """
        if self.lingers or transport.is_closing():
            return
        if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR) and not self._unread_bytes:
            transport.close()
            return
        self.lingers = True
        self._stop_sender_timer()
        try:
            transport.write_eof()
        except OSError:  # it has left
            transport.close()
            return
        self.flow.resume_reading()
        self._linger_timer = self.loop.call_later(LINGER_SECONDS, transport.close)
        self._tell_phase()

    @property
    def _context(self) -> RequestContext | None:
        """The record of the latest request; None: its answer is written, or no request has come."""
        return None if self.scope is None else context_of(self.scope)

    @property
    def _served(self) -> ServedRequest | None:
        """The accepted request behind the latest HTTP request."""
        return None if (context := self._context) is None else context.served

    @property
    def _written_bytes(self) -> int:
        """Bytes of all answers of this connection, whether the client has taken them or not."""
        return cast(_Transport, self.transport).written_bytes

    @property
    def _unread_bytes(self) -> int:
        """Bytes that have come and are no event yet. h11's own way to give them copies them."""
        return len(self.conn._receive_buffer)

    @property
    def _is_answering(self) -> bool:
        """Whether a request is here, perhaps in part, whose answer is not written."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _draws(self) -> bool:
        """Whether something is drawn for the latest request, or for an earlier one whose answer
        still waits for the client."""
        if self._written_bytes - self.transport.get_write_buffer_size() < self._drawn_bytes:
            return True
        return self._served is not None

    @property
    def _phase(self) -> Phase:
        if self._is_answering:
            if self.flow.write_paused:
                return Phase.ANSWER if self._draws else Phase.UNREAD
            incomplete = self.cycle.more_body and not self.cycle.response_started
            return Phase.BODY if incomplete else Phase.ANSWER
        if self.transport.get_write_buffer_size() > 0:
            return Phase.ANSWER if self._draws else Phase.UNREAD
        if self.lingers:
            return Phase.UNREAD
        if self.sends or self._unread_bytes:
            return Phase.HEAD
        return Phase.NEW if self._is_new else Phase.IDLE

    def _tell_phase(self) -> None:
        if not self._real_transport.is_closing():  # else it keeps its phase until it is gone
            self._connections.move(self, self._phase)

    @override
    def send_400_response(self, msg: str) -> None:
        # the reason is in the exception that is being handled
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
            self.transport.abort()
            return
        status = status if status in _REFUSALS else 400
        message, code = _REFUSALS[status]
        headers, body = ApiError(status, message, code).encode(last=True)
        request_id = new_request_id() if self._context is None else self._context.request_id
        headers.append((b"x-request-id", request_id.encode()))
        parts: list[Any] = [
            h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        for part in parts:
            self.transport.write(self.conn.send(part))
        self.transport.close()
        if self._is_answering:  # it was a request before; the line is written at its end
            context_of(self.scope).refused = (status, len(body))
            # so that uvicorn drops what the application answers, and wakes it if it reads
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            return
        line = {
            "request_id": request_id,
            "client": self.client[0] if self.client else None,
            "status": status,
            "bytes": len(body),
        }
        _log.info("request", extra={"fields": line})

    def _watch_sender(self) -> None:
        """The time runs while a request is incomplete, and not while it is answered."""
        complete = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        if complete:
            self._stop_sender_timer()
        elif self._sender_timer is None and not self.transport.is_closing():
            self._sender_timer = self.loop.call_later(SEND_SECONDS, self._drop_sender)

    def _drop_sender(self) -> None:
        if self._phase is not Phase.IDLE:  # a client that has sent nothing is not slow
            self._connections.count_dropped()
        self.drop()

    def _stop_sender_timer(self) -> None:
        if self._sender_timer is not None:
            self._sender_timer.cancel()
            self._sender_timer = None
