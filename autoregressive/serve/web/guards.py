"""What a request passes on its way to a route, and its answer on the way back.

These are plain ASGI applications around another one, so that streams, and the news that a client
has left, pass through. They are called with HTTP requests only.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoregressive.serve.web.api_errors import ApiError, ended_early, internal_error
from autoregressive.serve.web.app_state import DRAWING_PATHS, REQUESTS, Turns, context_of
from autoregressive.serve.web.connections import Connections
from autoregressive.serve.web.http_protocol import headers_too_large
from autoregressive.serve.worker.messages import ServedRequest

MOST_HEADER_BYTES = 64 * 2**10
MOST_BODY_BYTES = 2**20
_URL = re.compile(rb"https?://([^/]*)(/.*)?", re.IGNORECASE)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_LOGGED_CHARACTERS = 200  # of what a client names: its path, its method
_LAST_ANSWER_SECONDS = 0.5  # for a reader to take a 503 at the end
_CHUNK_BYTES = 64 * 2**10  # of an answer at a time: what waits for a slow reader stays small
_CLOSE = (b"connection", b"close")
# Of OpenAI's routes. They are refused before their pictures are read, which may be large.
_NOT_SUPPORTED = {
    f"/v1/images/{name}": ApiError(
        400,
        f"image {name} are not supported: this service makes images of classes "
        "(/v1/images/generations)",
        "not_supported",
    )
    for name in ("edits", "variations")
}
_log = logging.getLogger(REQUESTS)
Trace = Callable[[Scope, Mapping[str, Any]], None]


class BelowPrefix:
    """Removes a prefix from paths. So a proxy may pass on a request's path as it is, or without
    the prefix, and what is behind this sees no prefix.

    Args:
        prefix: begins with a slash, and ends without one.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on one request."""
        if scope["raw_path"].startswith(f"{self._prefix}/".encode()):
            raw_path = scope["raw_path"].removeprefix(self._prefix.encode())
            path = scope["path"].removeprefix(self._prefix)
            scope = {**scope, "path": path, "raw_path": raw_path}
        await self._app(scope, receive, send)


class Guards:
    """Answers the requests that no route should see, and reads the whole body of the others before
    their route is called.

    Requests of the routes that draw pass one at a turn of the event loop. To read and check one
    takes a millisecond or two. When hundreds come at once, a probe would otherwise wait for all of
    them. When connections hold too much already, these requests are refused, and not read.

    Args:
        check_access: raises the `ApiError` of a request that is not let in.
        turns: which the routes that draw take.
    """

    def __init__(self, app: ASGIApp, check_access: Callable[[Scope], None], turns: Turns) -> None:
        self._app, self._check_access, self._turns = app, check_access, turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on one request, or answers it."""
        draws = scope["path"] in DRAWING_PATHS
        try:
            self._check_access(scope)
            context_of(scope).admitted = True
            _check_head(scope)
            body = await _read_body(scope, receive, keeps=draws)
        except ApiError as error:
            # What follows something that is not HTTP cannot be trusted.
            await answer(send, error, last=error.status == 400)
            return
        if body is None:
            return
        if draws:
            await self._turns.take()
        unread = [body]
        del body  # the route is the only one to hold it

        async def receive_again() -> Message:
            if not unread:
                return await receive()
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        if scope["method"] == "HEAD":  # answered wherever GET is (RFC 9110, section 9.3.2)
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive_again, send)


async def answer(send: Send, error: ApiError, *, last: bool = False) -> None:
    """Sends an error as the whole answer.

    Args:
        last: close the connection after it.
    """
    headers, body = error.encode(last=last)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def use_whole_url(scope: Scope) -> None:
    """Accepts a whole URL in the place of the path (the "absolute form").

    The URL's host then replaces the Host header. RFC 9112, section 3.2.2, demands both of a server.
    """
    if (url := _URL.fullmatch(scope["raw_path"])) is not None:
        host, path = url[1], url[2] or b"/"
        scope["raw_path"], scope["path"] = path, unquote(path.decode("ascii"))
        others = [(name, value) for name, value in scope["headers"] if name != b"host"]
        scope["headers"] = [(b"host", host), *others]


def _check_head(scope: Scope) -> None:
    """Checks the request's line and its headers.

    Raises:
        ApiError: they are too large, or not HTTP/1.1, or for what this service does not do.
    """
    if scope["method"] == "POST" and (error := _NOT_SUPPORTED.get(scope["path"])) is not None:
        raise replace(error)
    headers = scope["headers"]
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if sum(len(name) + len(value) + 4 for name, value in headers) + target > MOST_HEADER_BYTES:
        raise headers_too_large()
    names = {name for name, _ in headers}
    if {b"content-length", b"transfer-encoding"} <= names:  # a proxy may believe the other one
        raise ApiError(400, "the request has two lengths", "bad_request")
    if b"transfer-encoding" in names and scope["http_version"] == "1.0":  # RFC 9112, section 6.1
        raise ApiError(400, "HTTP/1.0 has no Transfer-Encoding", "bad_request")
    # the latter two come from another server than ours
    if scope["http_version"] not in ("1.0", "1.1", "2", "3"):
        raise ApiError(400, "this service speaks HTTP/1.1", "bad_request")


async def _read_body(scope: Scope, receive: Receive, *, keeps: bool) -> bytes | None:
    """The whole body; None if the client has left.

    Args:
        keeps: it is for a route that draws. Others have no use for theirs, and get an empty one.

    Raises:
        ApiError: connections hold too much, or the body is too large.
    """
    context = context_of(scope)
    if keeps:
        _check_overload(context.connections)
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    if any(value.isdigit() and int(value) > MOST_BODY_BYTES for value in lengths):
        raise _body_too_large()
    parts: list[bytes] = []  # a buffer that grows would be larger than its content
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > MOST_BODY_BYTES:
            raise _body_too_large()
        if keeps:
            parts.append(part)
            context.body_bytes = size
        more = message.get("more_body", False)
    if keeps:  # again: many bodies may have come at once, each after its head
        _check_overload(context.connections)
    context.body_bytes *= 2  # the framework keeps the bytes, and their content
    return b"".join(parts)


def _check_overload(connections: Connections | None) -> None:
    if connections is not None and (why := connections.overload):
        raise ApiError(503, why, "overloaded", None, 5)


def _body_too_large() -> ApiError:
    # It is made where it is raised: a local variable would keep the parts in a cycle.
    return ApiError(413, "the body is too large: at most 1 MiB", "body_too_large")


class RequestLog:
    """Adds an id to every answer, writes a line for each request, and answers an exception with a
    500.

    Args:
        count: called with the outcome of every request of the routes that draw.
        secrets: never written, wherever a client puts them.
        quiet_paths: have a line at INFO only after an error.
        trace: called with every request of the routes that draw that was let in, once it is
            answered, and with its line.
    """

    def __init__(
        self,
        app: ASGIApp,
        count: Callable[[str], None],
        secrets: Sequence[str],
        quiet_paths: Container[str] = (),
        trace: Trace | None = None,
    ) -> None:
        self._app, self._count, self._quiet_paths, self._trace = app, count, quiet_paths, trace
        self._secrets = sorted(secrets, key=len, reverse=True)  # one may be a part of another

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        begun, context = time.monotonic(), context_of(scope)
        context.request_id = _given_id(scope) or context.request_id
        status, sent, complete = 0, 0, False

        async def send_numbered(message: Message) -> None:
            nonlocal status, sent, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", context.request_id.encode())]
                last = context.connection is not None and context.connection.answers_last
                if last and _CLOSE not in headers:
                    headers.append(_CLOSE)
                await send({**message, "headers": headers})
                return
            body = b"" if scope["method"] == "HEAD" else message.get("body", b"")
            sent += len(body)
            more = message.get("more_body", False)
            context.unsent_bytes = len(body)
            for start in range(0, max(1, len(body)), _CHUNK_BYTES):
                end = start + _CHUNK_BYTES
                await send(
                    {**message, "body": body[start:end], "more_body": more or end < len(body)}
                )
            context.unsent_bytes = 0
            complete = not more

        failure = None
        try:
            await self._app(scope, receive, send_numbered)
        except asyncio.CancelledError:
            # The service ends, and has waited long enough. The task ends here; nothing awaits it.
            if status == 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_ANSWER_SECONDS):
                        await answer(send_numbered, ended_early("cancelled", "", 10))
            else:  # cut short, so that it does not pass for whole; its reader may not even read
                context.cut = True
        except Exception as error:
            failure = error
            if status == 0:
                await answer(send_numbered, internal_error())
        finally:
            context.body_bytes = context.unsent_bytes = 0
            if context.refused is not None:
                status, sent = context.refused
            elif context.cut or (not complete and failure is None):
                status = 499
            self._write(scope, status, sent, time.monotonic() - begun, failure)

    def _write(
        self, scope: Scope, status: int, sent: int, seconds: float, failure: Exception | None
    ) -> None:
        context = context_of(scope)
        line: dict[str, Any] = {
            "request_id": self._shown(context.request_id),
            "client": self._shown(scope["client"][0]) if scope.get("client") else None,
            "method": self._shown(scope["method"]),
            "path": self._shown(scope["path"]),
            "status": status,
            "bytes": sent,
            "seconds": round(seconds, 4),
        }
        if (served := context.served) is not None:
            request = served.request
            line |= {
                "images": request.n,
                "class_label": request.class_label,
                "seed": request.params.seed,
            }
            # Of a request that is neither watched nor ended, only the first few tokens are known.
            if request.watched or (served.ended is not None and served.ended.tokens is not None):
                line["tokens"] = served.tokens
            if served.started_at is not None:
                line["queue_seconds"] = round(served.started_at - served.accepted_at, 4)
        if scope["path"] in DRAWING_PATHS and scope["method"] == "POST":
            broken = failure is not None or context.failed
            outcome = _outcome(status, served)
            line["outcome"] = "failed" if broken and status != 499 else outcome
            self._count(line["outcome"])
            if self._trace is not None and context.admitted:
                self._trace(scope, line)
        level = logging.ERROR if failure is not None else logging.INFO
        if context.counted or (status < 400 and scope["path"] in self._quiet_paths):
            level = logging.DEBUG
        _log.log(level, "request", extra={"fields": line}, exc_info=failure)

    def _shown(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text if len(text) <= _LOGGED_CHARACTERS else f"{text[:_LOGGED_CHARACTERS]}..."


def _given_id(scope: Scope) -> str | None:
    """The id that the caller has given the request, so that both logs tell of it by one id."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    return given[0].decode() if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else None


def _outcome(status: int, served: ServedRequest | None) -> str:
    ended = None if served is None else served.ended
    if status == 200 and ended is not None and ended.outcome != "finished":
        return ended.outcome
    invalid = "invalid" if 400 <= status < 500 else "failed"
    return {200: "success", 499: "disconnected", 429: "rejected"}.get(status, invalid)
