"""The routes of our own: the page's stream of all that happens to a request, and codes."""

import time
from dataclasses import dataclass, replace

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from autoregressive.serve.web.app_state import CODES_PATH, STREAM_PATH, AppState, client_of
from autoregressive.serve.web.openai_routes import (
    DRAWING_ERRORS,
    EVENT_STREAM,
    begin_drawing,
    event_bytes,
    event_stream,
    picture_of,
    preview_of,
    until_drawn,
)
from autoregressive.serve.web.schema import (
    CodesAnswer,
    CodesData,
    CodesRequest,
    StreamRequest,
    Usage,
)
from autoregressive.serve.worker.messages import (
    Ended,
    Image,
    Preview,
    Progress,
    ServedRequest,
    Started,
)

_QUEUE_LOOK_SECONDS = 0.5  # between two looks at a waiting request's place in the queue


def add_page_routes(app: FastAPI, state: AppState) -> None:
    """Adds the routes, to the application itself as `add_openai_routes` does."""
    model = state.model

    @app.post(
        STREAM_PATH,
        responses={**DRAWING_ERRORS, **EVENT_STREAM},
        response_class=StreamingResponse,
        tags=["images"],
    )
    async def stream_images(body: StreamRequest, request: Request) -> Response:
        """The page's events: queued, started, progress, preview, image, then done or error."""
        wanted = model.engine_request(body, pixels=True, client=client_of(request.scope))
        wanted = replace(wanted, preview_rows=tuple(range(1, model.grid)), watched=True)
        served = await begin_drawing(state, wanted, request)
        return event_stream(state, request, served, PageEvents(state, served, body).next_event)

    @app.post(CODES_PATH, response_model=CodesAnswer, responses=DRAWING_ERRORS, tags=["images"])
    async def draw_codes(body: CodesRequest, request: Request) -> Response:
        """The tokens of images, for clients that have a decoder of their own."""
        wanted = model.engine_request(body, pixels=False, client=client_of(request.scope))
        served = await begin_drawing(state, wanted, request)

        async def read_codes(image: Image) -> CodesData:
            await state.turns.take()
            return CodesData(codes=np.frombuffer(image.data, dtype=np.int32).tolist())

        answer = CodesAnswer(
            data=await until_drawn(state, request, served, read_codes),
            created=int(time.time()),
            grid=model.grid,
            codebook_size=model.codebook_size,
            usage=Usage.of(wanted.n, model.tokens_of_image),
            model=model.name,
            seed=wanted.params.seed,
        )
        return Response(answer.model_dump_json(), media_type="application/json")


@dataclass
class PageEvents:
    """What the page shows, as it happens."""

    state: AppState
    served: ServedRequest
    body: StreamRequest
    ahead: int | None = None  # in the queue, as last told

    async def next_event(self) -> bytes:
        """As `event_stream` wants it."""
        state, served, request = self.state, self.served, self.served.request
        tokens = state.model.tokens_of_image
        if self.ahead is None:
            return self._queued(state.broker.ahead_of(served))
        match await served.next_event(_QUEUE_LOOK_SECONDS):
            case None:
                ahead = state.broker.ahead_of(served)
                waits = served.started_at is None and ahead != self.ahead
                return self._queued(ahead) if waits else b""
            case Started():
                return event_bytes("started")
            case Progress(tokens=drawn):
                return event_bytes(
                    "progress",
                    tokens_drawn=drawn,
                    tokens=request.n * tokens,
                    seconds_left=served.seconds_left(tokens),
                )
            case Preview() as preview:
                return event_bytes(
                    "preview",
                    await state.make_base64(preview_of(state, preview, "webp")),
                    image_index=preview.index,
                    rows=preview.rows,
                    grid=state.model.grid,
                    output_format="webp",
                )
            case Image() as image:
                return event_bytes(
                    "image",
                    await state.make_base64(picture_of(state, request, image, self.body)),
                    image_index=image.index,
                    output_format=self.body.picture_format,
                    seed=request.params.seed,
                )
            case Ended() as ended if ended.outcome == "finished":
                return event_bytes(
                    "done",
                    seconds=round(ended.at - served.accepted_at, 3),
                    usage=Usage.of(request.n, tokens).model_dump(),
                )
            case Ended() as ended:
                return event_bytes("error", **state.failure(ended).body)

    def _queued(self, ahead: int) -> bytes:
        self.ahead, model, request = ahead, self.state.model, self.served.request
        return event_bytes(
            "queued",
            ahead=ahead,
            seed=request.params.seed,
            n=request.n,
            class_label=request.class_label,
            class_name=model.classes[request.class_label],
            size=model.size,
            grid=model.grid,
        )
