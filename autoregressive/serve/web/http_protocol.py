"""uvicorn's HTTP/1.1 connection, made strict and patient. It refuses bytes that h11 accepts
leniently, answers what is not HTTP, and drops slow senders and stalled readers.
"""

import asyncio
import logging
import re
import sys
from dataclasses import dataclass
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import REQUESTS, RequestContext, context_of, new_request_id
from autoregressive.serve.web.connections import Connection, Connections, Load, Phase
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
# A request's line, its headers, and an empty line; or trailers. Once it is read, a header of four
# bytes takes a hundred times as much.
_MOST_LINES = 102
_MOST_CHUNK_LINE_BYTES = 256  # a chunk's size and its extensions, which are not used
# A line feed without a return before it, a return without a line feed behind it, and a header that
# goes on in the next line.
_LENIENT = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
# RFC 9112, section 7.1; h11 takes white space behind the size, and any byte but a line feed in an
# extension.
_CHUNK_LINE = re.compile(rb"[0-9A-Fa-f]{1,16}(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_log = logging.getLogger(REQUESTS)


def headers_too_large() -> ApiError:
    """The answer to a request with too many headers, or too long ones."""
    return ApiError(
        431, "the headers are too large: at most 100 of them, and 64 KiB", "headers_too_large"
    )


class StrictReceiveBuffer(ReceiveBuffer):
    """The bytes that are not read yet; refuses those that h11 would let pass, and that another
    program on the way may read differently.

    Two programs that disagree about where a request ends can be made to take one client's request
    for another's (request smuggling).
    """

    _is_head = False  # whether headers are being taken out

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """A request's line and headers, or the trailers of a body in chunks."""
        self._is_head = True
        try:
            return super().maybe_extract_lines()
        finally:
            self._is_head = False

    def maybe_extract_next_line(self) -> bytearray | None:
        """The line before a chunk."""
        line = super().maybe_extract_next_line()
        if line is not None and (
            len(line) > _MOST_CHUNK_LINE_BYTES or not _CHUNK_LINE.fullmatch(line)
        ):
            raise h11.LocalProtocolError("malformed line before a chunk")
        return line

    def _extract(self, count: int) -> bytearray:
        taken = super()._extract(count)
        if self._is_head and _LENIENT.search(taken):
            raise h11.LocalProtocolError("a line does not end as it should, or is folded")
        if self._is_head and taken.count(b"\n") > _MOST_LINES:
            raise h11.LocalProtocolError("too many headers", error_status_hint=431)
        return taken


@dataclass
class _Transport:
    """A connection's transport as uvicorn sees it. It counts what is written, and lets the protocol
    close it."""

    real: asyncio.Transport
    protocol: "PatientProtocol"
    written_bytes: int = 0  # of all answers, whether the client has taken them or not

    def write(self, data: bytes) -> None:
        self.written_bytes += len(data)
        self.real.write(data)

    def close(self) -> None:
        self.protocol.close_gently()

    def is_closing(self) -> bool:
        return self.protocol.lingers or self.real.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class PatientProtocol(H11Protocol, Connection):
    """Drops clients that are too slow. It answers headers that are too large by 431, and bytes that
    are not HTTP by 400.

    Args:
        connections: of this process, which this one joins.
    """

    transport: Any  # a `_Transport`, once it is open; None before
    opening: "asyncio.Task[None] | None" = None  # opens it, with TLS after a handshake

    def __init__(self, *arguments: Any, connections: Connections, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.conn._receive_buffer = StrictReceiveBuffer()  # h11 has no setting for it
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None  # for the client to send, or of lingering
        self.lingers = False  # the answer is written, and what the client still sends is dropped
        self._lingered_bytes = 0
        self._read_seconds = READ_SECONDS  # that the client has left to take what waits
        self._taken_bytes = 0  # by the client, or by the system for it
        self._head_bytes = 0  # of the headers of the request that is answered
        self._drawn_bytes = 0  # written up to the end of the latest answer that was drawn

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self._watch_sender()
        self._connections.move(self, Phase.NEW)
        # A request that is here by now is read in the next turn of the event loop.
        self.loop.call_soon(self.loop.call_soon, self._tell_phase)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        self._stop_timer()
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
                self.transport.real.close()
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
            self._connections.buffered_bytes += len(data)

    @override
    def handle_events(self) -> None:
        super().handle_events()
        if (context := self._context) is not None and context.connection is None:
            context.connection, context.connections = self, self._connections
            self._head_bytes = sum(len(name) + len(value) for name, value in self.headers)

    @override
    def on_response_complete(self) -> None:
        if self._served is not None:  # noted here: the next request may take the scope's place
            self._drawn_bytes = self.transport.written_bytes
        # A connection that is idle, or whose answer is not read, holds nothing of the request.
        self.scope = self.headers = self.cycle = None  # type: ignore[assignment]
        if not self.lingers:
            self._stop_timer()
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY or self._unread_bytes:
            self._watch_sender()
        self._tell_phase()

    @override
    def shutdown(self) -> None:
        if not self._is_answering:
            self.transport.real.close()
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
    def answers_last(self) -> bool:
        # Either the rest of the request's body is not read, or others want the connection's place.
        return self.conn.their_state is h11.SEND_BODY or self._connections.crowded

    @override
    def look(self, seconds: float) -> Load:
        waiting = self.transport.get_write_buffer_size()
        taken = self.transport.written_bytes - waiting
        new, self._taken_bytes = taken - self._taken_bytes, taken
        left = self._read_seconds - seconds + new / LEAST_READ_BYTES_PER_SECOND
        self._read_seconds = min(left, READ_SECONDS) if waiting > 0 else READ_SECONDS
        if self._read_seconds <= 0:
            self._connections.drop(self)
        self._tell_phase()
        held, served, seconds_left = self._unread_bytes + waiting, self._served, None
        if waiting > 0:
            seconds_left = self._read_seconds
        elif self._timer is not None:
            seconds_left = self._timer.when() - self.loop.time()
        if (context := self._context) is not None:
            held += self._head_bytes + len(self.cycle.body)
            held += context.body_bytes + context.unsent_bytes
        if served is None:
            return Load(held, seconds_left)
        held += served.held_bytes
        return Load(held, seconds_left, served.request.client, served.promised_bytes)

    @override
    def drop(self) -> None:
        if self.transport is None:
            if self.opening is not None:
                self.opening.cancel()
            return
        if self._is_answering and not self._draws:
            context_of(self.scope).counted = True
        self.transport.abort()

    def close_gently(self) -> None:
        """Closes it when its answers are sent.

        A client that still sends gets time to read its answer before the system refuses what it
        sends.
        """
        if self.transport.is_closing():
            return
        transport = self.transport.real
        if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR) and not self._unread_bytes:
            transport.close()
            return
        self.lingers = True
        self._stop_timer()
        try:
            if transport.can_write_eof():  # TLS has no end of one direction
                transport.write_eof()
        except OSError:  # it has left
            transport.close()
            return
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_SECONDS, transport.close)
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
        taken = self.transport.written_bytes - self.transport.get_write_buffer_size()
        return taken < self._drawn_bytes or self._served is not None

    @property
    def _phase(self) -> Phase:
        answer = Phase.ANSWER if self._draws else Phase.UNREAD
        if self._is_answering:
            if self.flow.write_paused:
                return answer
            incomplete = self.cycle.more_body and not self.cycle.response_started
            return Phase.BODY if incomplete else Phase.ANSWER
        if self.transport.get_write_buffer_size() > 0:
            return answer
        if self.lingers:
            return Phase.UNREAD
        if self.conn.their_state is h11.SEND_BODY or self._unread_bytes:
            return Phase.HEAD
        return Phase.IDLE

    def _tell_phase(self) -> None:
        if not self.transport.real.is_closing():  # else it keeps its phase until it is gone
            self._connections.move(self, self._phase)

    @override
    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
            self.transport.abort()
            return
        error = ApiError(
            400,
            "this is not HTTP/1.1: a line, a header or the framing of the body is malformed",
            "bad_request",
        )
        reason = sys.exc_info()[1]  # the exception that is being handled
        if isinstance(reason, h11.RemoteProtocolError) and reason.error_status_hint == 431:
            error = headers_too_large()
        headers, body = error.encode(last=True)
        request_id = new_request_id() if self._context is None else self._context.request_id
        headers.append((b"x-request-id", request_id.encode()))
        status = error.status
        for part in (
            h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(part))
        self.transport.close()
        if self._is_answering:  # it was a request before; the line is written at its end
            context_of(self.scope).refused = (status, len(body))
            # so that uvicorn drops what the application answers, and wakes it if it reads
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            return
        fields = {
            "request_id": request_id,
            "client": self.client[0] if self.client else None,
            "status": status,
            "bytes": len(body),
        }
        _log.info("request", extra={"fields": fields})

    def _watch_sender(self) -> None:
        """The time runs while a request is incomplete, and not while it is answered."""
        if self.lingers:
            return
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(SEND_SECONDS, self._drop_sender)

    def _drop_sender(self) -> None:
        if self._phase is Phase.IDLE:  # a client that has sent nothing is not slow
            self.drop()
        else:
            self._connections.drop(self)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
