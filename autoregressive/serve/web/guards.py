"""What requests pass before a route is called: the host that they name, their size, a turn.

These are plain ASGI applications around another one, so that streams, and the news that a client
has left, pass through. They are called with HTTP requests only.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import DRAWING_PATHS, FairQueue, context_of
from autoregressive.serve.web.clients import is_loopback

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_HEADER_BYTES = 64 * 2**10
MOST_BODY_BYTES = 2**20
_RETRY_SECONDS = 5
_VERSIONS = ("1.0", "1.1", "2", "3")  # the latter two behind another server than ours
# An IPv6 address in brackets, or a name or an IPv4 address; with or without a port.
_HOST = re.compile(rb"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+?)\.?)(?::[0-9]*)?", re.IGNORECASE)
_URL = re.compile(rb"https?://([^/]*)(/.*)?", re.IGNORECASE)


async def answer(send: Send, error: ApiError, *, last: bool = False) -> None:
    """Sends an error as the whole answer.

    Args:
        last: close the connection, because what follows on it cannot be trusted.
    """
    headers, body = error.encode(last=last)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def accept_whole_urls(app: App) -> App:
    """Accepts a whole URL in the place of the path (the "absolute form").

    The URL's host then replaces the Host header. RFC 9112, section 3.2.2, demands both of a server.
    """

    async def accept(scope: Scope, receive: Receive, send: Send) -> None:
        if (url := _URL.fullmatch(scope["raw_path"])) is not None:
            host, path = url[1], url[2] or b"/"
            scope["raw_path"], scope["path"] = path, unquote(path.decode("ascii"))
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope["headers"] = [(b"host", host), *others]
        await app(scope, receive, send)

    return accept


def answer_head(app: App) -> App:
    """Answers HEAD wherever GET is answered, with the same headers (RFC 9110, section 9.3.2)."""

    async def answer_without_body(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        if scope["method"] == "HEAD":
            await app({**scope, "method": "GET"}, receive, send_head)
        else:
            await app(scope, receive, send)

    return answer_without_body


def known_hosts(app: App, public: str | None) -> App:
    """Answers requests for this machine's own names and for one other name, and refuses others.

    The owner of a web page can make its name resolve to 127.0.0.1. The browser then takes the
    service for a part of that page's site, and lets the page read answers (DNS rebinding). But it
    sends the page's name as Host. A client that sends no Host, such as a load balancer's probe in
    HTTP/1.0, is no browser, and is answered.

    starlette's `TrustedHostMiddleware` knows neither networks (127.0.0.0/8) nor this service's
    errors.

    Args:
        public: the other name.
    """

    def knows(headers: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"host"]
        if len(given) != 1:
            return not given
        host = _HOST.fullmatch(given[0])
        if host is None:
            return False
        name = (host[1] or host[2]).decode("ascii").lower()
        return name == public or is_loopback(name)

    async def check(scope: Scope, receive: Receive, send: Send) -> None:
        if knows(scope["headers"]):
            await app(scope, receive, send)
            return
        why = "without a key this service answers to localhost only"
        way = "start it with --api-key, or with --public-url and the URL that clients use"
        await answer(send, ApiError(421, f"{why}: {way}", "unknown_host"))

    return check


def one_drawing_a_turn(app: App, turns: FairQueue) -> App:
    """Lets requests of the routes that draw pass one at a turn of the event loop.

    To read and check one takes a millisecond or two. When hundreds come at once, a probe would
    otherwise wait for all of them.
    """

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in DRAWING_PATHS:
            await turns.take()
        await app(scope, receive, send)

    return wait


def limit_sizes(app: App) -> App:
    """Refuses headers and bodies that are too large, and reads the whole body before the route is
    called.

    When connections hold too much already, no body is read, and a request to draw is refused.
    """

    async def limit(scope: Scope, receive: Receive, send: Send) -> None:
        if (error := _unreadable(scope)) is not None:
            await answer(send, error, last=error.status == 400)
            return
        body = await _read_body(scope, receive)
        if isinstance(body, ApiError):
            await answer(send, body)
            return
        left: list[bytes] = [] if body is None else [body]
        del body  # the route is the only one to hold it

        async def receive_again() -> Message:
            if not left:
                return await receive()
            return {"type": "http.request", "body": left.pop(), "more_body": False}

        if left:
            await app(scope, receive_again, send)

    return limit


async def _read_body(scope: Scope, receive: Receive) -> bytes | ApiError | None:
    """The whole body of a request to draw, an empty one of others, which have no use for it.

    Returns:
        Why the body is refused, where it is; None if the client has left.
    """
    context = context_of(scope)
    draws = scope["path"] in DRAWING_PATHS
    if draws and context.connections is not None and context.connections.overload is not None:
        return ApiError(503, context.connections.overload, "overloaded", None, _RETRY_SECONDS)
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    too_large = any(value.isdigit() and int(value) > MOST_BODY_BYTES for value in lengths)
    parts: list[bytes] = []  # a buffer that grows would be larger than its content
    size = 0
    more = not too_large
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if draws:
            parts.append(part)
            context.body_bytes = size
        too_large = size > MOST_BODY_BYTES
        more = message.get("more_body", False) and not too_large
    if too_large:
        return ApiError(413, "the body is too large: at most 1 MiB", "body_too_large")
    context.body_bytes *= 2  # the framework keeps the bytes, and their content
    return b"".join(parts)


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
