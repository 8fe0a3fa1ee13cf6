"""uvicorn's HTTP/1.1 connection, with patience that has an end: for slow senders, for stalled readers, for garbage."""

import asyncio
import contextlib
import json
import logging
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from autoregressive.serve.web.errors import ApiError
from autoregressive.serve.web.logs import REQUESTS, new_request_id

SEND_SECONDS = 20.0  # for a client to send a request, from its first byte to its last, or to begin one
READ_SECONDS = 20.0  # for a client to take what waits for it: 64 KiB at most

# In a request's state:
CUT = "cut"  # the connection went before the answer was complete
REQUEST_ID = "request_id"  # what it has been told, if its answer has come already
REFUSED = "refused"  # status and bytes of an answer that was given while its body was read, which turned out to be no HTTP
_MOST_AHEAD_BYTES = 64 * 2**10  # of requests that come before the answer to the one before

_REFUSALS = {
    400: ("this is not HTTP/1.1: a line, a header or the framing of the body is malformed", "bad_request"),
    431: ("the headers are too large: at most 64 KiB", "headers_too_large"),
}
_log = logging.getLogger(REQUESTS)


class PatientProtocol(H11Protocol):
    """Drops who is too slow. Headers that are too large are answered by 431, what is not HTTP by 400."""

    _sender_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None
    _flush_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits for the first request."""
        super().connection_made(transport)
        # asyncio does this only where a socket names its protocol. Without it the second part of an answer waits 40 ms for the
        # client to confirm the first.
        with contextlib.suppress(OSError):  # it has left already
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch_sender()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing any more."""
        self._stop_sender_timer()
        self._stop_reader_timer()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        if self.cycle is not None and not self.cycle.response_complete:
            self.scope["state"][CUT] = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Part of a request, or of one that is to be answered later."""
        super().data_received(data)
        self._watch_sender()
        if self.conn.their_state is h11.DONE and self.flow.read_paused:
            # uvicorn has stopped reading, and so would not notice that the client leaves before it is answered.
            if len(self.conn.trailing_data[0]) > _MOST_AHEAD_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """An answer is written, though perhaps not read; the next request may be here in part."""
        self._stop_sender_timer()
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._watch_sender()
        self._watch_flush()

    def _watch_flush(self) -> None:
        """What is left of a complete answer has to be taken, too: closing waits for that for ever."""
        if self._flush_timer is None and self.transport.get_write_buffer_size() > 0:
            self._flush_timer = self.loop.call_later(READ_SECONDS, self._abort_if_unread)

    def _abort_if_unread(self) -> None:
        self._flush_timer = None
        if self.transport.get_write_buffer_size() > 0 and (self.cycle is None or self.cycle.response_complete):
            self.transport.abort()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        if self._reader_timer is None:
            self._reader_timer = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        self._stop_reader_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """The end of a connection that does not speak HTTP; the reason is in the exception that is being handled."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
            self.transport.abort()
            return
        status = status if status in _REFUSALS else 400
        message, code = _REFUSALS[status]
        body = json.dumps(ApiError(status, message, code).body).encode()
        number = new_request_id()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        headers.append((b"x-request-id", number.encode()))
        parts: list[Any] = [
            h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        for part in parts:
            self.transport.write(self.conn.send(part))
        self.transport.close()
        self._watch_flush()
        if self.cycle is not None and not self.cycle.response_complete:  # it was a request before; the line is written at its end
            self.scope["state"] |= {REQUEST_ID: number, REFUSED: (status, len(body))}
            return
        line = {"request_id": number, "client": self.client[0] if self.client else None, "status": status, "bytes": len(body)}
        _log.info("request", extra={"fields": line})

    def _watch_sender(self) -> None:
        """The time runs while a request is incomplete, and not while it is answered."""
        complete = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        if complete:
            self._stop_sender_timer()
        elif self._sender_timer is None and not self.transport.is_closing():
            self._sender_timer = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def _stop_sender_timer(self) -> None:
        if self._sender_timer is not None:
            self._sender_timer.cancel()
            self._sender_timer = None

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None
