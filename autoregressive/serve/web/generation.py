"""The way of a request that draws, from its body to its answer, as far as all routes share it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import Enum
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from autoregressive.serve.web.api_errors import ApiError, internal_error
from autoregressive.serve.web.app_state import AppState
from autoregressive.serve.web.request_context import context_of
from autoregressive.serve.web.schema import ErrorAnswer
from autoregressive.serve.web.served_request import ServedRequest
from autoregressive.serve.worker.messages import Ended, EngineRequest, Image

IMAGES_PATH, STREAM_PATH, CODES_PATH = "/v1/images/generations", "/v1/images/stream", "/v1/codes"
DRAWING_PATHS = (IMAGES_PATH, STREAM_PATH, CODES_PATH)
_CODE_BYTES = 12  # of a token of an answer: four from the engine, and its number as text
# A comment follows so long a silence, or proxies take the connection for dead.
KEEP_ALIVE_SECONDS = 15.0
SILENCE = b": waiting\n\n"
DRAWING_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in (
        (400, "A field is unknown or out of range; `param` names it."),
        (401, "The key is missing or wrong."),
        (404, "No such model."),
        (413, "The body is too large."),
        (415, "The body is compressed, or is not declared as JSON."),
        (
            429,
            "The queue is full, the client has its share, or too many wrong keys came; Retry-After "
            "says when to try again.",
        ),
        (500, "The model gave no image."),
        (503, "Not ready, stopping, or waited too long."),
        (504, "The images took too long."),
    )
}
IMAGE_TAGS: list[str | Enum] = ["images"]
EVENT_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_log = logging.getLogger("llamagen.requests")


class ClientLeft(Exception):
    """The client has gone, so there is no answer to send."""


async def accept(state: AppState, wanted: EngineRequest, request: Request) -> ServedRequest:
    """Accepts a request if there will be room for its images in this process.

    Raises:
        ApiError: there will not, or as `RequestBroker.accept`.
    """
    model, context = state.model, context_of(request.scope)
    image_bytes = 3 * model.image_size**2 if wanted.pixels else _CODE_BYTES * model.tokens_of_image
    connections = context.connections
    if connections is not None and not connections.has_room_for(
        wanted.n * image_bytes, wanted.client
    ):
        message = "too many images are asked for at once: try again later"
        raise ApiError(503, message, "overloaded", None, state.broker.retry_after())
    served = context.served = await state.broker.accept(wanted)
    served.image_bytes = image_bytes
    if connections is not None:
        connections.promise(served.promised_bytes, wanted.client)
    return served


async def until_drawn(
    state: AppState,
    request: Request,
    served: ServedRequest,
    keep: Callable[[Image], Awaitable[None]],
) -> None:
    """Gives every image to `keep` until the request ends or the client leaves.

    Raises:
        ApiError: the request has no result.
        ClientLeft: the client has left.
    """

    async def collect() -> Ended:
        while not isinstance(event := await served.next_event(), Ended):
            if isinstance(event, Image):
                await keep(event)
        return event

    async def wait_until_the_client_leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting = asyncio.create_task(collect())
    leaving = asyncio.create_task(wait_until_the_client_leaves())
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ClientLeft
        ended = collecting.result()
    finally:
        state.broker.abandon(served)
        collecting.cancel()
        leaving.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)
    if ended.outcome != "finished":
        raise state.failure(ended)


def event_stream(
    state: AppState,
    request: Request,
    served: ServedRequest,
    next_event: Callable[[], Awaitable[bytes]],
) -> StreamingResponse:
    """Server-sent events as an answer; the request ends when its reader leaves.

    Args:
        next_event: waits for what happens next, and returns the bytes of its event. They are empty
            where there is nothing to tell.
    """

    async def until_the_reader_leaves() -> AsyncIterator[bytes]:
        try:
            while served.ended is None or served.has_news:
                if event := await next_event():
                    yield event
        except Exception:
            fields = {"engine_request": served.request_id}
            _log.exception("a stream broke off", extra={"fields": fields})
            context_of(request.scope).failed = True
            yield event_bytes("error", **internal_error().body)
        finally:
            state.broker.abandon(served)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        until_the_reader_leaves(), media_type="text/event-stream", headers=headers
    )


def event_bytes(kind: str, picture: bytes | None = None, **fields: Any) -> bytes:
    """A server-sent event.

    Args:
        picture: in base64; becomes the field `b64_json`, and is copied once.
    """
    head = json.dumps({"type": kind} | fields).encode()
    parts = (head,) if picture is None else (head[:-1], b', "b64_json": "', picture, b'"}')
    return b"".join((b"event: ", kind.encode(), b"\ndata: ", *parts, b"\n\n"))
