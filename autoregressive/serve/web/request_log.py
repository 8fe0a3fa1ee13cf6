"""The log of requests: an id in every answer, and a line for each request."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from autoregressive.serve.web.api_errors import ended_early, internal_error
from autoregressive.serve.web.generation import DRAWING_PATHS
from autoregressive.serve.web.guards import App, Message, Receive, Scope, Send, answer
from autoregressive.serve.web.request_context import REQUESTS, RequestContext, context_of
from autoregressive.serve.web.served_request import ServedRequest

_LOGGED_CHARACTERS = 200  # of what a client names: its path, its method
_LAST_ANSWER_SECONDS = 0.5  # for a reader to take a 503 at the end
_CHUNK_BYTES = 64 * 2**10  # of an answer at a time: what waits for a slow reader stays small
_CLOSE = (b"connection", b"close")
_log = logging.getLogger(REQUESTS)


class RequestLog:
    """Adds an id to every answer, writes a line for each request, and answers an exception with a
    500.

    Args:
        count: called with the outcome of every request of the routes that draw.
        secrets: never written, wherever a client puts them.
    """

    def __init__(self, app: App, count: Callable[[str], None], secrets: Sequence[str]) -> None:
        self._app, self._count = app, count
        self._secrets = sorted(secrets, key=len, reverse=True)  # one may be a part of another

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        begun, context = time.monotonic(), context_of(scope)
        status, sent, complete = 0, 0, False

        async def send_numbered(message: Message) -> None:
            nonlocal status, sent, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _headers(message, context)
                await send(message)
                return
            body = message.get("body", b"")
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
            "request_id": context.request_id,
            "client": self._shown(scope["client"][0]) if scope.get("client") else None,
            "method": self._shown(scope["method"]),
            "path": self._shown(scope["path"]),
            "status": status,
            "bytes": sent,
            "seconds": round(seconds, 4),
        }
        if context.served is not None:
            line |= _about(context.served)
        if scope["path"] in DRAWING_PATHS and scope["method"] == "POST":
            broken = failure is not None or context.failed
            outcome = _outcome(status, context.served)
            line["outcome"] = "failed" if broken and status != 499 else outcome
            self._count(line["outcome"])
        level = logging.ERROR if failure is not None else logging.INFO
        if context.counted:
            level = logging.DEBUG
        _log.log(level, "request", extra={"fields": line}, exc_info=failure)

    def _shown(self, text: str) -> str:
        shown = text
        for secret in self._secrets:
            shown = shown.replace(secret, "[key]")
        return shown if len(shown) <= _LOGGED_CHARACTERS else f"{shown[:_LOGGED_CHARACTERS]}..."


def _headers(start: Message, context: RequestContext) -> list[tuple[bytes, bytes]]:
    """The headers of an answer, with its id; they close the connection where they must."""
    headers = [*start.get("headers", []), (b"x-request-id", context.request_id.encode())]
    last = context.connection is not None and context.connection.answers_last
    return [*headers, _CLOSE] if last and _CLOSE not in headers else headers


def _about(served: ServedRequest) -> dict[str, Any]:
    request = served.request
    line: dict[str, Any] = {
        "images": request.n,
        "class_label": request.class_label,
        "seed": request.params.seed,
    }
    # Of a request that is neither watched nor ended, only the first few tokens are known.
    if request.watched or (served.ended is not None and served.ended.tokens is not None):
        line["tokens"] = served.tokens
    if served.started_at is not None:
        line["queue_seconds"] = round(served.started_at - served.accepted_at, 4)
    return line


def _outcome(status: int, served: ServedRequest | None) -> str:
    ended = None if served is None else served.ended
    if status == 200 and ended is not None and ended.outcome != "finished":
        return ended.outcome
    invalid = "invalid" if 400 <= status < 500 else "failed"
    return {200: "success", 499: "disconnected", 429: "rejected"}.get(status, invalid)
