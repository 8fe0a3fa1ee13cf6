"""OpenAI's route for images, whole or as a stream; and what all routes that draw share: a request
is accepted, its images are drawn and become files, the answer goes out.
"""

import asyncio
import io
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import PIL.Image
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from autoregressive.output.images import QUALITY, record_options
from autoregressive.output.records import readable
from autoregressive.serve.web.api_errors import ApiError, described, internal_error, invalid
from autoregressive.serve.web.app_state import (
    IMAGES_PATH,
    REQUESTS,
    AppState,
    client_of,
    context_of,
)
from autoregressive.serve.web.schema import (
    ImageData,
    ImageRequest,
    ImagesAnswer,
    OutputFormat,
    PictureRequest,
    Usage,
)
from autoregressive.serve.web.store import Store
from autoregressive.serve.worker.messages import (
    Ended,
    EngineRequest,
    Image,
    Preview,
    RequestPhase,
    ServedRequest,
)

# A comment follows so long a silence, or proxies take the connection for dead.
KEEP_ALIVE_SECONDS = 15.0
DRAWING_ERRORS = described(
    {
        400: "A field is unknown or out of range; `param` names it.",
        401: "The key is missing or wrong.",
        404: "No such model.",
        413: "The body is too large.",
        415: "The body is compressed, or is not declared as JSON.",
        429: "The queue is full, the client has its share, or too many wrong keys came; "
        "Retry-After says when to try again.",
        500: "The model gave no image.",
        503: "Not ready, stopping, or waited too long.",
        504: "The images took too long.",
    }
)
EVENT_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_NOT_STORED = ApiError(
    503,
    "images cannot be stored now: ask for b64_json, or try again later",
    "store_failed",
    "response_format",
    10,
)
_CODE_BYTES = 12  # of a token of an answer: four from the engine, and its number as text
_FILE_BYTES = 4096  # of a picture's file, as base64, beside its pixels
_EMPTY_PICTURE = b'"b64_json":""'
_PNG_LEVEL = 3  # a third of the time of the library's default, files a few per cent larger
_PREVIEW_QUALITY = 75
_log = logging.getLogger(REQUESTS)
_Finished = TypeVar("_Finished")


class ClientLeft(Exception):
    """The client has gone, so there is no answer to send."""


def add_openai_routes(app: FastAPI, state: AppState) -> None:
    """Adds the route to the application itself: FastAPI would build those of a router at the first
    request, which takes tens of milliseconds.
    """
    model = state.model

    @app.post(
        IMAGES_PATH,
        response_model=ImagesAnswer,
        responses={**DRAWING_ERRORS, **EVENT_STREAM},
        tags=["images"],
    )
    async def generate_images(body: ImageRequest, request: Request) -> Response:
        """OpenAI's images: `prompt` is a class, by name or id."""
        wanted = model.engine_request(body, pixels=True, client=client_of(request.scope))
        _check(body, wanted.n, state.store)
        if not body.stream:
            return await _whole_images(state, body, wanted, request)
        rows = partial_rows(body.partial_images or 0, model.grid)
        served = await begin_drawing(state, replace(wanted, preview_rows=rows), request)
        return event_stream(state, request, served, partial(openai_event, state, served, body))


def _check(body: ImageRequest, images: int, store: Store | None) -> None:
    """Raises an `ApiError` if fields do not go together."""
    by_url = body.response_format == "url"
    if by_url and store is None:
        raise invalid(
            "response_format must be b64_json: this service stores no images (it was "
            "started without --store-dir)",
            "response_format",
        )
    if by_url and body.stream:
        raise invalid("response_format must be b64_json with stream", "response_format")
    if body.partial_images and not body.stream:
        raise invalid("partial_images goes with stream", "partial_images")
    if by_url and store and images > (most := store.most_of_a_request):
        raise invalid(f"n must be at most {most} with response_format url: no more are kept", "n")


def partial_rows(count: int, grid: int) -> tuple[int, ...]:
    """Rows of the grid at which so many previews of an image are made, evenly spaced."""
    return tuple(sorted({max(1, grid * (index + 1) // (count + 1)) for index in range(count)}))


async def _whole_images(
    state: AppState, body: ImageRequest, wanted: EngineRequest, request: Request
) -> Response:
    """Draws all images, and answers with the files or with their URLs."""
    model, store = state.model, state.store if body.response_format == "url" else None
    if store is not None:  # before anything is drawn
        await state.on_disk(_NOT_STORED, store.check, wanted.n)
    served = await begin_drawing(state, wanted, request)

    async def make_file(image: Image) -> bytes:
        make = state.make_base64 if store is None else state.make
        file = await make(picture_of(state, served, image, body))
        served.answer_bytes += len(file)
        return file

    pictures = await until_drawn(state, request, served, make_file)
    data = [ImageData(b64_json="") for _ in pictures]
    if store is not None:  # all together, so that none is evicted for the sake of another
        try:
            urls = await state.on_disk(_NOT_STORED, store.save, pictures, body.picture_format)
        finally:
            served.answer_bytes = 0
        data, pictures = [ImageData(url=state.signer.signed(url)) for url in urls], []
    answer = ImagesAnswer(
        created=int(time.time()),
        data=data,
        size=model.size,
        output_format=body.picture_format,
        usage=Usage.of(wanted.n, model.tokens_of_image),
        model=model.name,
        seed=wanted.params.seed,
    )
    return PicturesResponse(served, answer.model_dump_json(exclude_none=True).encode(), pictures)


async def begin_drawing(state: AppState, wanted: EngineRequest, request: Request) -> ServedRequest:
    """Accepts a request if there will be room for its images in this process.

    Raises:
        ApiError: there will not, or as `RequestBroker.accept`.
    """
    context, side = context_of(request.scope), state.model.image_size
    # A file of noise is no smaller than its pixels, of three bytes each, and one byte a row. Base64
    # makes four bytes of three.
    picture_bytes = 4 * side * (side + 1) + _FILE_BYTES
    image_bytes = picture_bytes if wanted.pixels else _CODE_BYTES * state.model.tokens_of_image
    connections = context.connections
    if connections and not connections.has_room_for(wanted.n * image_bytes, wanted.client):
        raise ApiError(
            503,
            "too many images are asked for at once: try again later",
            "overloaded",
            None,
            state.broker.retry_after(),
        )
    served = context.served = await state.broker.accept(wanted)
    served.image_bytes = image_bytes
    if connections:
        connections.promise(served.promised_bytes, wanted.client)
    return served


async def until_drawn(
    state: AppState,
    request: Request,
    served: ServedRequest,
    finish: Callable[[Image], Awaitable[_Finished]],
) -> list[_Finished]:
    """What `finish` makes of each image, once the request has ended.

    Raises:
        ApiError: the request has no result.
        ClientLeft: the client has left.
    """

    finished: dict[int, _Finished] = {}

    async def stop_when_the_client_leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        drawing.reschedule(asyncio.get_running_loop().time())  # its time is over now

    leaving = asyncio.create_task(stop_when_the_client_leaves())
    try:
        async with asyncio.timeout(None) as drawing:
            while not isinstance(event := await served.next_event(), Ended):
                if isinstance(event, Image):
                    finished[event.index] = await finish(event)
    except TimeoutError as error:
        raise ClientLeft from error
    finally:
        leaving.cancel()
        state.broker.abandon(served)
    if event.outcome != "finished":
        raise state.failure(event)
    return [finished[index] for index in sorted(finished)]


def event_stream(
    state: AppState,
    request: Request,
    served: ServedRequest,
    next_event: Callable[[], Awaitable[bytes]],
    on_end: Callable[[ServedRequest], None] | None = None,
) -> StreamingResponse:
    """Server-sent events as an answer.

    Args:
        next_event: waits for what happens next, but not for longer than `KEEP_ALIVE_SECONDS`, and
            returns the bytes of its event. They are empty where there is nothing to tell.
        on_end: what becomes of the request when its reader leaves; None: it ends.
    """

    async def until_the_reader_leaves() -> AsyncIterator[bytes]:
        told_at = time.monotonic()
        try:
            while served.ended is None or served.has_news:
                event = await next_event()
                now = time.monotonic()
                if event or now - told_at >= KEEP_ALIVE_SECONDS:
                    told_at = now
                    yield event or b": waiting\n\n"
        except Exception:
            _log.exception(
                "a stream broke off", extra={"fields": {"engine_request": served.request_id}}
            )
            context_of(request.scope).failed = True
            yield event_bytes("error", **internal_error().body)

    return EventStream(
        until_the_reader_leaves(),
        partial(on_end or state.broker.abandon, served),
    )


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        on_end: called once the answer has ended, also if its reader left before the first event,
            in which case nothing of `events` is run.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events, as ASGI wants it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def event_bytes(kind: str, picture: bytes | None = None, **fields: Any) -> bytes:
    """A server-sent event.

    Args:
        picture: in base64; becomes the field `b64_json`, and is copied once.
    """
    head = json.dumps({"type": kind} | fields).encode()
    parts = (head,) if picture is None else (head[:-1], b', "b64_json": "', picture, b'"}')
    return b"".join((b"event: ", kind.encode(), b"\ndata: ", *parts, b"\n\n"))


async def openai_event(state: AppState, served: ServedRequest, body: ImageRequest) -> bytes:
    """OpenAI's next event of a streamed request, with the index of its image, for `event_stream`.

    The pixels are freed when it returns, so a slow reader of the event does not hold them.
    """
    request, about = served.request, dict[str, Any]()
    match await served.next_event(KEEP_ALIVE_SECONDS):
        case Preview(index=index) as preview:
            kind, make_file = "partial_image", preview_of(state, preview, body.picture_format)
            about["partial_image_index"] = request.preview_rows.index(preview.rows)
        case Image(index=index) as image:
            kind, make_file = "completed", picture_of(state, served, image, body)
            about["usage"] = Usage.of(1, state.model.tokens_of_image).model_dump()
        case Ended() as ended if ended.outcome != "finished":
            return event_bytes("error", **state.failure(ended).body)
        case _:
            return b""
    return event_bytes(
        f"image_generation.{kind}",
        await state.make_base64(make_file),
        image_index=index,
        created_at=int(time.time()),
        background="opaque",
        output_format=body.picture_format,
        quality="auto",
        size=state.model.size,
        seed=request.params.seed,
        **about,
    )


class PicturesResponse(Response):
    """A JSON answer whose pictures go in one by one and are freed once they are sent, so that none
    is held twice.

    Args:
        text: the answer with an empty `b64_json` for each picture.
        pictures: base64.
    """

    def __init__(self, served: ServedRequest, text: bytes, pictures: list[bytes]) -> None:
        self._served = served
        # Inside a JSON string the quotation marks would be escaped.
        first, *others = text.split(_EMPTY_PICTURE)
        self._parts = deque([first])
        for picture, other in zip(pictures, others, strict=True):
            self._parts += (_EMPTY_PICTURE[:-1], picture, _EMPTY_PICTURE[-1:] + other)
        super().__init__(
            headers={"Content-Length": str(sum(map(len, self._parts)))},
            media_type="application/json",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        while self._parts:
            part = self._parts.popleft()  # the server counts it from now on
            self._served.answer_bytes = sum(map(len, self._parts))
            await send({"type": "http.response.body", "body": part, "more_body": bool(self._parts)})


def picture_of(
    state: AppState, served: ServedRequest, image: Image, body: PictureRequest
) -> Callable[[], bytes]:
    """How the file of a finished image is made, which takes a while, and is noted."""
    model = state.model

    def make_file() -> bytes:
        begun, record = time.monotonic(), model.record_of(served.request, image.index)
        file = encode_picture(
            image.data, model.image_size, body.picture_format, body.output_compression, record
        )
        served.phases.append(RequestPhase("encoding", begun, time.monotonic(), image.index))
        return file

    return make_file


def preview_of(
    state: AppState, preview: Preview, output_format: OutputFormat
) -> Callable[[], bytes]:
    """How the file of a preview is made: small and quickly."""
    options = {"compress_level": 1} if output_format == "png" else {"quality": _PREVIEW_QUALITY}
    if output_format == "webp":
        options["method"] = 0
    return partial(_encode, preview.pixels, state.model.image_size, output_format, options)


def encode_picture(
    pixels: bytes,
    size: int,
    output_format: OutputFormat,
    quality: int | None,
    record: dict[str, object],
) -> bytes:
    """Makes a picture's file.

    Args:
        pixels: uint8 [size, size, 3]
        quality: of jpeg and webp, 0 to 100; None: 90.
        record: how it was made, as of `generation_record` with its class: see `record_options` for
            where.
    """
    options = record_options(output_format.upper(), readable(record), record)
    if output_format == "png":
        options["compress_level"] = _PNG_LEVEL
    else:
        options["quality"] = QUALITY if quality is None else quality
    return _encode(pixels, size, output_format, options)


def _encode(
    pixels: bytes, size: int, output_format: OutputFormat, options: Mapping[str, Any]
) -> bytes:
    array, file = np.frombuffer(pixels, dtype=np.uint8).reshape(size, size, 3), io.BytesIO()
    PIL.Image.fromarray(array).save(file, format=output_format.upper(), **options)
    return file.getvalue()
