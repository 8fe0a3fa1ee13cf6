"""What requests pass before a route sees them: a number and a line in the log, limits, a turn.

Plain ASGI, so that streams and clients that leave pass through as they are.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from autoregressive.serve.web.errors import ApiError, ended_early, internal_error
from autoregressive.serve.web.generation import DRAWING_PATHS, FAILED
from autoregressive.serve.web.http_protocol import (
    BODY_BYTES,
    CONNECTION,
    COUNTED,
    CUT,
    JOB,
    REFUSED,
    REQUEST_ID,
    UNSENT_BYTES,
    PatientProtocol,
)
from autoregressive.serve.web.jobs import Job
from autoregressive.serve.web.logs import REQUESTS, new_request_id
from autoregressive.serve.web.turns import Turns

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_HEADER_BYTES = 64 * 2**10
MOST_BODY_BYTES = 2**20
_LOGGED_CHARACTERS = 200  # of what a client names: its path, its method
_LAST_ANSWER_SECONDS = 0.5  # for a reader to take a 503 at the end
_CHUNK_BYTES = 64 * 2**10  # of an answer at a time: what waits for a slow reader stays small
_RETRY_SECONDS = 5
_CLOSE = (b"connection", b"close")
_VERSIONS = ("1.0", "1.1", "2", "3")  # the latter two behind another server than ours
_log = logging.getLogger(REQUESTS)


def _connection_of(scope: Scope) -> PatientProtocol | None:
    """What the request came through; None behind another server."""
    connection: PatientProtocol | None = scope["state"].get(CONNECTION)
    return connection


async def answer(send: Send, error: ApiError, *, last: bool = False) -> None:
    """An error as the whole answer; the connection's last, if what follows cannot be trusted."""
    headers, body = error.encode(last=last)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class RequestLog:
    """Numbers requests, says so in every answer, writes a line for each, and turns what nobody
    caught into a 500.

    Args:
        count: told of every request of the routes that draw, by outcome.
        secrets: never written, wherever a client puts them.
    """

    def __init__(self, app: App, count: Callable[[str], None], secrets: Sequence[str]) -> None:
        self._app, self._count = app, count
        self._secrets = sorted(secrets, key=len, reverse=True)  # one may be a part of another

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, number = time.monotonic(), new_request_id()
        status, sent, complete = 0, 0, False
        scope.setdefault("state", {})

        async def send_numbered(message: Message) -> None:
            nonlocal status, sent, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", number.encode())]
                connection = _connection_of(scope)
                # Either the rest of its body is not read, or others want its place.
                last = connection is not None and (connection.sends or connection.is_crowded)
                if last and _CLOSE not in headers:
                    headers.append(_CLOSE)
                message["headers"] = headers
                await send(message)
                return
            body = message.get("body", b"")
            sent += len(body)
            more = message.get("more_body", False)
            scope["state"][UNSENT_BYTES] = len(body)
            for start in range(0, max(1, len(body)), _CHUNK_BYTES):
                end = start + _CHUNK_BYTES
                await send(
                    {**message, "body": body[start:end], "more_body": more or end < len(body)}
                )
            scope["state"][UNSENT_BYTES] = 0
            complete = not more

        failure = None
        try:
            await self._app(scope, receive, send_numbered)
        except (
            asyncio.CancelledError
        ):  # the service ends, and has waited long enough; the task ends here, and nobody asks why
            if status == 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_ANSWER_SECONDS):
                        await answer(send_numbered, ended_early("cancelled", "", 10))
            else:  # cut short, so that it does not pass for whole; its reader may not even read
                scope["state"][CUT] = True
        except Exception as error:
            failure = error
            if status == 0:
                await answer(send_numbered, internal_error())
        finally:
            scope["state"] |= {BODY_BYTES: 0, UNSENT_BYTES: 0}
            number = scope["state"].get(REQUEST_ID, number)
            if REFUSED in scope["state"]:
                status, sent = scope["state"][REFUSED]
            elif CUT in scope["state"] or (not complete and failure is None):
                status = 499
            self._write(scope, number, status, sent, time.monotonic() - begun, failure)

    def _write(
        self,
        scope: Scope,
        number: str,
        status: int,
        sent: int,
        seconds: float,
        failure: Exception | None,
    ) -> None:
        line: dict[str, Any] = {
            "request_id": number,
            "client": self._shown(scope["client"][0]) if scope.get("client") else None,
            "method": self._shown(scope["method"]),
            "path": self._shown(scope["path"]),
            "status": status,
            "bytes": sent,
            "seconds": round(seconds, 4),
        }
        job = scope["state"].get(JOB)
        if isinstance(job, Job):
            line |= _about(job)
        if scope["path"] in DRAWING_PATHS and scope["method"] == "POST":
            broken = failure is not None or FAILED in scope["state"]
            line["outcome"] = "failed" if broken and status != 499 else _outcome(status, job)
            self._count(line["outcome"])
        level = logging.ERROR if failure is not None else logging.INFO
        if COUNTED in scope["state"]:
            level = logging.DEBUG
        _log.log(level, "request", extra={"fields": line}, exc_info=failure)

    def _shown(self, text: str) -> str:
        shown = text
        for secret in self._secrets:
            shown = shown.replace(secret, "[key]")
        return shown if len(shown) <= _LOGGED_CHARACTERS else f"{shown[:_LOGGED_CHARACTERS]}..."


def _about(job: Job) -> dict[str, Any]:
    order = job.order
    line: dict[str, Any] = {
        "images": order.n,
        "class_label": order.class_label,
        "seed": order.params.seed,
    }
    if order.watched or (
        job.ended is not None and job.ended.tokens is not None
    ):  # of others only the first few are known
        line["tokens"] = job.tokens
    if job.started_at is not None:
        line["queue_seconds"] = round(job.started_at - job.accepted_at, 4)
    return line


def _outcome(status: int, job: object) -> str:
    if (
        isinstance(job, Job)
        and status == 200
        and job.ended is not None
        and job.ended.outcome != "finished"
    ):
        return job.ended.outcome
    return {200: "success", 499: "disconnected", 429: "rejected"}.get(
        status, "invalid" if 400 <= status < 500 else "failed"
    )


class HeadAsGet:
    """Answers HEAD wherever GET is answered, with the same headers (RFC 9110, section 9.3.2)."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


class OneDrawingATurn:
    """Lets requests of the routes that draw pass one at a turn of the event loop.

    To read and check one takes a millisecond or two. When hundreds come at once, a probe would
    otherwise stand behind them all.
    """

    def __init__(self, app: App, turns: Turns) -> None:
        self._app, self._turns = app, turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["path"] in DRAWING_PATHS:
            await self._turns.take()
        await self._app(scope, receive, send)


class SizeLimits:
    """Refuses headers and bodies that are too large, and reads the whole body before the route is
    called.

    When connections hold too much already, no body is read: what would be drawn is refused.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        scope["state"][BODY_BYTES] = 0
        draws = scope["path"] in DRAWING_PATHS
        if (error := _unreadable(scope)) is not None:
            await answer(send, error, last=error.status == 400)
            return
        connection = _connection_of(scope)
        overload = connection.overload if draws and connection is not None else None
        if overload is not None:
            await answer(send, ApiError(503, overload, "overloaded", None, _RETRY_SECONDS))
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        too_large = any(value.isdigit() and int(value) > MOST_BODY_BYTES for value in lengths)
        parts: list[bytes] = []  # a buffer that grows would be larger than what is in it
        size = 0
        more = not too_large
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            part = message.get("body", b"")
            size += len(part)
            if draws:  # other routes have no use for one
                parts.append(part)
                scope["state"][BODY_BYTES] = size
            too_large = size > MOST_BODY_BYTES
            more = message.get("more_body", False) and not too_large
        if too_large:
            await answer(
                send, ApiError(413, "the body is too large: at most 1 MiB", "body_too_large")
            )
            return
        whole: bytes | None = b"".join(parts)
        parts.clear()
        scope["state"][BODY_BYTES] *= 2  # as bytes, and as what they say: the framework keeps both

        async def receive_again() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = {"type": "http.request", "body": whole, "more_body": False}, None
            return message

        await self._app(scope, receive_again, send)


def _unreadable(scope: Scope) -> ApiError | None:
    """Why a request is refused before its body is read."""
    headers = scope["headers"]
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if sum(len(name) + len(value) + 4 for name, value in headers) + target > MOST_HEADER_BYTES:
        return ApiError(
            431, "the headers are too large: at most 100 of them, and 64 KiB", "headers_too_large"
        )
    names = {name for name, _ in headers}
    if {b"content-length", b"transfer-encoding"} <= names:  # a proxy may believe the other one
        return ApiError(400, "the request has two lengths", "bad_request")
    if b"transfer-encoding" in names and scope["http_version"] == "1.0":  # RFC 9112, section 6.1
        return ApiError(400, "HTTP/1.0 has no Transfer-Encoding", "bad_request")
    if scope["http_version"] not in _VERSIONS:
        return ApiError(400, "this service speaks HTTP/1.1", "bad_request")
    return None
