"""The three routes that draw: OpenAI's images, whole or as a stream; the page's stream; codes."""

import asyncio
import base64
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import anyio.to_thread
import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from autoregressive.serve.web.clients import client_of
from autoregressive.serve.web.desk import Desk
from autoregressive.serve.web.errors import ApiError, ended_early, internal_error
from autoregressive.serve.web.http_protocol import CONNECTION, JOB
from autoregressive.serve.web.jobs import Job
from autoregressive.serve.web.pictures import encode_picture, encode_preview
from autoregressive.serve.web.schema import (
    CodesAnswer,
    CodesData,
    CodesRequest,
    ErrorAnswer,
    ImageData,
    ImageRequest,
    ImagesAnswer,
    OutputFormat,
    StreamRequest,
    Usage,
)
from autoregressive.serve.web.served_model import ServedModel
from autoregressive.serve.web.store import Store, StoredPicture, StoreFailed
from autoregressive.serve.web.turns import Turns
from autoregressive.serve.worker.messages import Drawn, Ended, Image, Preview, Started, Submit

_STORE_THREADS = 8  # a slow disk holds up these, and neither the encoders nor the page
_NOT_STORED = ApiError(
    503,
    "images cannot be stored now: ask for b64_json, or try again later",
    "store_failed",
    "response_format",
    10,
)
_NOT_READ = ApiError(503, "the image cannot be read now: try again later", "store_failed", None, 10)
FAILED = "failed"  # in a request's state: its stream broke off for a reason of ours
_log = logging.getLogger("llamagen.requests")
DRAWING_PATHS = ("/v1/images/generations", "/v1/images/stream", "/v1/codes")
_CODE_BYTES = 12  # of a token of an answer: four from the engine, and its number as text
_KEEP_ALIVE_SECONDS = (
    15.0  # a comment after so long a silence, or proxies take the connection for dead
)
_EMPTY_PICTURE = b'"b64_json":""'
_SILENCE = b": waiting\n\n"
_QUEUE_LOOK_SECONDS = 0.5  # so often a waiting reader's place in the queue is looked at
_ERRORS: dict[int | str, dict[str, Any]] = {
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
_TAGS: list[str | Enum] = ["images"]
_EVENT_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class ClientLeft(Exception):
    """Nobody is there to be answered."""


@dataclass(frozen=True)
class Studio:
    """What the routes work with."""

    model: ServedModel
    desk: Desk
    encoders: Executor
    store: Store | None
    turns: Turns = field(default_factory=Turns)  # of reading a request, and of writing an image
    store_threads: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_STORE_THREADS)
    )

    async def picture(
        self, order: Submit, image: Image, output_format: OutputFormat, quality: int | None
    ) -> bytes:
        """A finished image's file."""
        return await self._run(self._picture, order, image, output_format, quality)

    async def picture_text(
        self, order: Submit, image: Image, output_format: OutputFormat, quality: int | None
    ) -> bytes:
        """A finished image's file in base64, when it is its turn to be written."""
        text: bytes = await self._run(
            lambda: base64.b64encode(self._picture(order, image, output_format, quality))
        )
        await self.turns.take()
        return text

    async def preview_text(self, preview: Preview, output_format: OutputFormat) -> bytes:
        """A preview's file in base64, when it is its turn to be written."""
        size = self.model.image_size
        text: bytes = await self._run(
            lambda: base64.b64encode(encode_preview(preview.pixels, size, output_format))
        )
        await self.turns.take()
        return text

    async def check_store(self, images: int) -> None:
        """Finds out before so many images are drawn whether they can be stored."""
        assert self.store is not None
        if images > (most := self.store.most_of_a_request):
            raise ApiError(
                400,
                f"n must be at most {most} with response_format url: no more are kept",
                "invalid_value",
                "n",
            )
        await self._on_disk(_NOT_STORED, self.store.check, images)

    async def save(self, pictures: list[bytes], output_format: OutputFormat) -> list[str]:
        """Stores the pictures of an answer; their URLs."""
        assert self.store is not None
        urls: list[str] = await self._on_disk(_NOT_STORED, self.store.save, pictures, output_format)
        return urls

    async def stored(self, name: str) -> StoredPicture | None:
        """The stored picture of that name."""
        assert self.store is not None
        found: StoredPicture | None = await self._on_disk(_NOT_READ, self.store.read, name)
        return found

    def failure(self, ended: Ended) -> ApiError:
        """Of a job that has no result."""
        return ended_early(ended.outcome, ended.message, self.desk.retry_after())

    def _picture(
        self, order: Submit, image: Image, output_format: OutputFormat, quality: int | None
    ) -> bytes:
        record = self.model.record_of(order, image.image)
        return encode_picture(image.data, self.model.image_size, output_format, quality, record)

    async def _on_disk(
        self, problem: ApiError, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        try:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=self.store_threads)
        except StoreFailed as error:
            raise replace(problem) from error

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.encoders, function, *arguments)


def add_generation_routes(app: FastAPI, studio: Studio) -> None:
    """The routes. Not as a router of their own: FastAPI would build them at the first request,
    which takes tens of milliseconds.
    """
    model, desk = studio.model, studio.desk

    def order_of(body: CodesRequest, request: Request, *, pixels: bool) -> Submit:
        return replace(model.order(body, pixels=pixels), client=client_of(request.scope))

    async def accept(order: Submit, request: Request) -> Job:
        """Lets a job in if there will be room for its images in this process."""
        image_bytes = (
            3 * model.image_size**2 if order.pixels else _CODE_BYTES * model.tokens_of_image
        )
        connection = getattr(request.state, CONNECTION, None)
        if connection is not None and not connection.has_room_for(
            order.n * image_bytes, order.client
        ):
            raise ApiError(
                503,
                "too many images are asked for at once: try again later",
                "overloaded",
                None,
                desk.retry_after(),
            )
        job = await desk.accept(order)
        job.image_bytes = image_bytes
        if connection is not None:
            connection.promise(job.promised_bytes, order.client)
        return job

    @app.post(
        DRAWING_PATHS[0],
        response_model=ImagesAnswer,
        responses={**_ERRORS, 200: {"content": _EVENT_STREAM[200]["content"]}},
        tags=_TAGS,
    )
    async def generate_images(body: ImageRequest, request: Request) -> Response:
        """OpenAI's images: `prompt` is a class, by name or id."""
        order = order_of(body, request, pixels=True)
        stores = body.response_format == "url"
        if stores and studio.store is None:
            message = (
                "response_format must be b64_json: this service stores no images (it was "
                "started without --store-dir)"
            )
            raise ApiError(400, message, "invalid_value", "response_format")
        if stores and body.stream:
            raise ApiError(
                400,
                "response_format must be b64_json with stream",
                "invalid_value",
                "response_format",
            )
        if body.partial_images and not body.stream:
            raise ApiError(
                400, "partial_images goes with stream", "invalid_value", "partial_images"
            )
        if body.stream:
            rows = partial_rows(body.partial_images or 0, model.grid)
            job = await accept(replace(order, preview_rows=rows), request)
            events = _OpenAIEvents(
                studio, job, body.output_format or "png", body.output_compression
            )
            return _event_stream(studio, request, job, events)
        if stores:
            await studio.check_store(order.n)
        job = await accept(order, request)
        output_format = body.output_format or "png"
        pictures: dict[
            int, bytes
        ] = {}  # stored together, so that none is evicted for another one's sake
        texts: dict[int, bytes] = {}
        urls: list[str] = []

        async def keep(image: Image) -> None:
            if stores:
                file = pictures[image.image] = await studio.picture(
                    order, image, output_format, body.output_compression
                )
            else:
                file = texts[image.image] = await studio.picture_text(
                    order, image, output_format, body.output_compression
                )
            job.answer_bytes += len(file)

        await _until_drawn(studio, request, job, keep)
        if stores:
            try:
                urls = await studio.save(
                    [pictures[image] for image in sorted(pictures)], output_format
                )
            finally:
                job.answer_bytes = 0
        answer = ImagesAnswer(
            created=int(time.time()),
            data=[
                ImageData(url=urls[image]) if stores else ImageData(b64_json="")
                for image in range(order.n)
            ],
            size=model.size,
            output_format=output_format,
            usage=Usage.of(order.n, model.tokens_of_image),
            model=model.name,
            seed=order.params.seed,
        )
        text = answer.model_dump_json(exclude_none=True).encode()
        return _PicturesResponse(job, text, [texts[image] for image in sorted(texts)])

    @app.post(
        DRAWING_PATHS[1],
        responses={**_ERRORS, **_EVENT_STREAM},
        response_class=StreamingResponse,
        tags=_TAGS,
    )
    async def stream_images(body: StreamRequest, request: Request) -> Response:
        """The page's events: queued, started, progress, preview, image, then done or error."""
        order = replace(
            order_of(body, request, pixels=True),
            preview_rows=tuple(range(1, model.grid)),
            watched=True,
        )
        job = await accept(order, request)
        return _event_stream(
            studio,
            request,
            job,
            _PageEvents(studio, job, body.output_format or "png", body.output_compression),
        )

    @app.post(DRAWING_PATHS[2], response_model=CodesAnswer, responses=_ERRORS, tags=_TAGS)
    async def draw_codes(body: CodesRequest, request: Request) -> Response:
        """The tokens of images, for those who have a decoder of their own."""
        order = order_of(body, request, pixels=False)
        job = await accept(order, request)
        data: dict[int, CodesData] = {}

        async def keep(image: Image) -> None:
            await studio.turns.take()
            data[image.image] = CodesData(codes=np.frombuffer(image.data, dtype=np.int32).tolist())

        await _until_drawn(studio, request, job, keep)
        answer = CodesAnswer(
            created=int(time.time()),
            data=[data[image] for image in sorted(data)],
            grid=model.grid,
            codebook_size=model.codebook_size,
            usage=Usage.of(order.n, model.tokens_of_image),
            model=model.name,
            seed=order.params.seed,
        )
        return Response(answer.model_dump_json(), media_type="application/json")


def partial_rows(count: int, grid: int) -> tuple[int, ...]:
    """Rows of the grid at which so many previews of an image are made, evenly spaced."""
    return tuple(sorted({max(1, grid * (index + 1) // (count + 1)) for index in range(count)}))


@dataclass(frozen=True)
class _OpenAIEvents:
    """OpenAI's events of a streamed request, each with the index of its image."""

    studio: Studio
    job: Job
    output_format: OutputFormat
    quality: int | None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.job.ended is None or self.job.has_news:
            event = await self._next()
            if event:
                yield event

    async def _next(self) -> bytes:
        """The bytes of the next event; a function of its own, so that whoever waits for a slow
        reader holds no pixels.
        """
        studio, order = self.studio, self.job.order
        match await self.job.next_event(_KEEP_ALIVE_SECONDS):
            case None:
                return _SILENCE
            case Preview() as preview:
                picture = await studio.preview_text(preview, self.output_format)
                index = order.preview_rows.index(preview.rows)
                return self._event(
                    "partial_image", picture, preview.image, partial_image_index=index
                )
            case Image() as image:
                picture = await studio.picture_text(order, image, self.output_format, self.quality)
                usage = Usage.of(1, studio.model.tokens_of_image).model_dump()
                return self._event("completed", picture, image.image, usage=usage)
            case Ended() as ended if ended.outcome != "finished":
                return _event("error", **studio.failure(ended).body)
            case _:
                return b""

    def _event(self, kind: str, picture: bytes, image: int, **fields: Any) -> bytes:
        return _event(
            f"image_generation.{kind}",
            picture,
            image_index=image,
            created_at=int(time.time()),
            background="opaque",
            output_format=self.output_format,
            quality="auto",
            size=self.studio.model.size,
            seed=self.job.order.params.seed,
            **fields,
        )


@dataclass
class _PageEvents:
    """What the page shows, as it happens."""

    studio: Studio
    job: Job
    output_format: OutputFormat
    quality: int | None
    ahead: int = -1  # in the queue, as last told
    told_at: float = 0.0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.told_at = time.monotonic()
        yield self._queued(self.studio.desk.ahead_of(self.job))
        while self.job.ended is None or self.job.has_news:
            event = await self._next()
            if event:
                self.told_at = time.monotonic()
                yield event

    async def _next(self) -> bytes:
        """As `_OpenAIEvents._next`."""
        studio, job, model, order = self.studio, self.job, self.studio.model, self.job.order
        match await job.next_event(_QUEUE_LOOK_SECONDS):
            case None:
                if job.started_at is None and (ahead := studio.desk.ahead_of(job)) != self.ahead:
                    return self._queued(ahead)
                return _SILENCE if time.monotonic() - self.told_at > _KEEP_ALIVE_SECONDS else b""
            case Started():
                return _event("started")
            case Drawn(tokens=tokens):
                left = job.seconds_left(model.tokens_of_image)
                rounded = None if left is None else round(left, 2)
                return _event(
                    "progress",
                    tokens_drawn=tokens,
                    tokens=order.n * model.tokens_of_image,
                    seconds_left=rounded,
                )
            case Preview() as preview:
                picture = await studio.preview_text(preview, "webp")
                rows, grid = preview.rows, model.grid
                return _event(
                    "preview",
                    picture,
                    image_index=preview.image,
                    rows=rows,
                    grid=grid,
                    output_format="webp",
                )
            case Image() as image:
                picture = await studio.picture_text(order, image, self.output_format, self.quality)
                return _event(
                    "image",
                    picture,
                    image_index=image.image,
                    output_format=self.output_format,
                    seed=order.params.seed,
                )
            case Ended() as ended if ended.outcome == "finished":
                seconds = round(ended.at - job.accepted_at, 3)
                return _event(
                    "done",
                    seconds=seconds,
                    usage=Usage.of(order.n, model.tokens_of_image).model_dump(),
                )
            case Ended() as ended:
                return _event("error", **studio.failure(ended).body)

    def _queued(self, ahead: int) -> bytes:
        self.ahead, model, order = ahead, self.studio.model, self.job.order
        return _event(
            "queued",
            ahead=ahead,
            seed=order.params.seed,
            n=order.n,
            class_label=order.class_label,
            class_name=model.classes[order.class_label],
            size=model.size,
            grid=model.grid,
        )


class _PicturesResponse(Response):
    """A JSON answer whose pictures go in one by one, and are let go of once they are sent: nothing
    holds them twice.

    Args:
        text: the answer with an empty `b64_json` for each picture.
        pictures: base64.
    """

    def __init__(self, job: Job, text: bytes, pictures: list[bytes]) -> None:
        self._job = job
        # Inside a JSON string the quotation marks would be escaped.
        first, *others = text.split(_EMPTY_PICTURE)
        self._parts = deque([first])
        for picture, other in zip(pictures, others, strict=True):
            self._parts += (_EMPTY_PICTURE[:-1], picture, _EMPTY_PICTURE[-1:] + other)
        length = str(sum(map(len, self._parts)))
        super().__init__(headers={"Content-Length": length}, media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        while self._parts:
            part = self._parts.popleft()  # the server counts it from now on
            self._job.answer_bytes = sum(map(len, self._parts))
            await send({"type": "http.response.body", "body": part, "more_body": bool(self._parts)})


async def _until_drawn(
    studio: Studio, request: Request, job: Job, keep: Callable[[Image], Awaitable[None]]
) -> None:
    """Hands every image on, until the job ends or the client leaves.

    Raises:
        ApiError: the job has no result.
        ClientLeft: nobody waits for it any more.
    """

    async def collect() -> Ended:
        while not isinstance(event := await job.next_event(), Ended):
            if isinstance(event, Image):
                await keep(event)
        return event

    setattr(request.state, JOB, job)
    collecting, leaving = (
        asyncio.create_task(collect()),
        asyncio.create_task(_client_leaves(request)),
    )
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ClientLeft
        ended = collecting.result()
    finally:
        studio.desk.abandon(job)
        collecting.cancel()
        leaving.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)
    if ended.outcome != "finished":
        raise studio.failure(ended)


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event_stream(
    studio: Studio, request: Request, job: Job, events: AsyncIterable[bytes]
) -> StreamingResponse:
    """The events as an answer; the job ends when its reader leaves."""
    setattr(request.state, JOB, job)

    async def until_the_reader_leaves() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except Exception:
            _log.exception("a stream broke off", extra={"fields": {"job": job.order.job}})
            setattr(request.state, FAILED, True)
            yield _event("error", **internal_error().body)
        finally:
            studio.desk.abandon(job)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        until_the_reader_leaves(), media_type="text/event-stream", headers=headers
    )


def _event(kind: str, picture: bytes | None = None, **fields: Any) -> bytes:
    """A server-sent event; the picture, in base64 already, goes in as `b64_json`, and is copied
    once.
    """
    head = json.dumps({"type": kind} | fields).encode()
    parts = (head,) if picture is None else (head[:-1], b', "b64_json": "', picture, b'"}')
    return b"".join((b"event: ", kind.encode(), b"\ndata: ", *parts, b"\n\n"))
