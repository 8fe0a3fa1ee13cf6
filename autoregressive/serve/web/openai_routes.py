"""OpenAI's route for images, whole or as a stream, and the same for codes."""

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import AppState
from autoregressive.serve.web.generation import (
    CODES_PATH,
    DRAWING_ERRORS,
    EVENT_STREAM,
    IMAGE_TAGS,
    IMAGES_PATH,
    KEEP_ALIVE_SECONDS,
    SILENCE,
    accept,
    event_bytes,
    event_stream,
    until_drawn,
)
from autoregressive.serve.web.request_context import client_of
from autoregressive.serve.web.schema import (
    CodesAnswer,
    CodesData,
    CodesRequest,
    ImageData,
    ImageRequest,
    ImagesAnswer,
    Usage,
)
from autoregressive.serve.web.served_request import ServedRequest
from autoregressive.serve.worker.messages import Ended, EngineRequest, Image, Preview

_EMPTY_PICTURE = b'"b64_json":""'


def add_openai_routes(app: FastAPI, state: AppState) -> None:
    """Adds the routes to the application itself: FastAPI would build those of a router at the first
    request, which takes tens of milliseconds.
    """
    model = state.model

    @app.post(
        IMAGES_PATH,
        response_model=ImagesAnswer,
        responses={**DRAWING_ERRORS, 200: {"content": EVENT_STREAM[200]["content"]}},
        tags=IMAGE_TAGS,
    )
    async def generate_images(body: ImageRequest, request: Request) -> Response:
        """OpenAI's images: `prompt` is a class, by name or id."""
        wanted = model.engine_request(body, pixels=True, client=client_of(request.scope))
        _check(body, stores=state.store is not None)
        if not body.stream:
            return await _whole_images(state, body, wanted, request)
        rows = partial_rows(body.partial_images or 0, model.grid)
        served = await accept(state, replace(wanted, preview_rows=rows), request)
        events = OpenAIEvents(state, served, body)
        return event_stream(state, request, served, events.next_event)

    @app.post(CODES_PATH, response_model=CodesAnswer, responses=DRAWING_ERRORS, tags=IMAGE_TAGS)
    async def draw_codes(body: CodesRequest, request: Request) -> Response:
        """The tokens of images, for clients that have a decoder of their own."""
        wanted = model.engine_request(body, pixels=False, client=client_of(request.scope))
        served = await accept(state, wanted, request)
        data: dict[int, CodesData] = {}

        async def keep(image: Image) -> None:
            await state.turns.take()
            data[image.index] = CodesData(codes=np.frombuffer(image.data, dtype=np.int32).tolist())

        await until_drawn(state, request, served, keep)
        answer = CodesAnswer(
            created=int(time.time()),
            data=[data[index] for index in sorted(data)],
            grid=model.grid,
            codebook_size=model.codebook_size,
            usage=Usage.of(wanted.n, model.tokens_of_image),
            model=model.name,
            seed=wanted.params.seed,
        )
        return Response(answer.model_dump_json(), media_type="application/json")


def _check(body: ImageRequest, *, stores: bool) -> None:
    """Raises an `ApiError` if fields do not go together."""
    problem, param = None, "response_format"
    if body.response_format == "url" and not stores:
        problem = (
            "response_format must be b64_json: this service stores no images (it was "
            "started without --store-dir)"
        )
    elif body.response_format == "url" and body.stream:
        problem = "response_format must be b64_json with stream"
    elif body.partial_images and not body.stream:
        problem, param = "partial_images goes with stream", "partial_images"
    if problem is not None:
        raise ApiError(400, problem, "invalid_value", param)


async def _whole_images(
    state: AppState, body: ImageRequest, wanted: EngineRequest, request: Request
) -> Response:
    """Draws all images, and answers with the files or with their URLs."""
    model, stores = state.model, body.response_format == "url"
    if stores:
        await state.check_store(wanted.n)
    served = await accept(state, wanted, request)
    files: dict[int, bytes] = {}

    async def keep(image: Image) -> None:
        make_file = state.picture if stores else state.picture_text
        file = files[image.index] = await make_file(wanted, image, body)
        served.answer_bytes += len(file)

    await until_drawn(state, request, served, keep)
    pictures = [files[index] for index in sorted(files)]
    data = [ImageData(b64_json="") for _ in pictures]
    if stores:  # all together, so that none is evicted for the sake of another
        try:
            urls = await state.save(pictures, body.picture_format)
        finally:
            served.answer_bytes = 0
        data, pictures = [ImageData(url=url) for url in urls], []
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


def partial_rows(count: int, grid: int) -> tuple[int, ...]:
    """Rows of the grid at which so many previews of an image are made, evenly spaced."""
    return tuple(sorted({max(1, grid * (index + 1) // (count + 1)) for index in range(count)}))


@dataclass(frozen=True)
class OpenAIEvents:
    """OpenAI's events of a streamed request, each with the index of its image."""

    state: AppState
    served: ServedRequest
    body: ImageRequest

    async def next_event(self) -> bytes:
        """As `event_stream` wants it.

        The pixels are freed when it returns, so a slow reader of the event does not hold them.
        """
        state, request = self.state, self.served.request
        match await self.served.next_event(KEEP_ALIVE_SECONDS):
            case None:
                return SILENCE
            case Preview() as preview:
                picture = await state.preview_text(preview, self.body.picture_format)
                number = request.preview_rows.index(preview.rows)
                return self._event(
                    "partial_image", picture, preview.index, partial_image_index=number
                )
            case Image() as image:
                picture = await state.picture_text(request, image, self.body)
                usage = Usage.of(1, state.model.tokens_of_image).model_dump()
                return self._event("completed", picture, image.index, usage=usage)
            case Ended() as ended if ended.outcome != "finished":
                return event_bytes("error", **state.failure(ended).body)
            case _:
                return b""

    def _event(self, kind: str, picture: bytes, index: int, **fields: Any) -> bytes:
        return event_bytes(
            f"image_generation.{kind}",
            picture,
            image_index=index,
            created_at=int(time.time()),
            background="opaque",
            output_format=self.body.picture_format,
            quality="auto",
            size=self.state.model.size,
            seed=self.served.request.params.seed,
            **fields,
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
        length = str(sum(map(len, self._parts)))
        super().__init__(headers={"Content-Length": length}, media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        while self._parts:
            part = self._parts.popleft()  # the server counts it from now on
            self._served.answer_bytes = sum(map(len, self._parts))
            await send({"type": "http.response.body", "body": part, "more_body": bool(self._parts)})
