"""The routes of our own: the page's stream of all that happens to a request, and codes."""

import time
from dataclasses import dataclass, replace

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from autoregressive.serve.web.api_errors import described
from autoregressive.serve.web.app_state import (
    CODES_PATH,
    STREAM_PATH,
    AppState,
    client_of,
    context_of,
)
from autoregressive.serve.web.kept_drawings import KeptDrawing, KeptDrawings
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

_FOLLOWING_ERRORS = described(
    {
        401: "The key is missing or wrong.",
        404: "There is no such drawing of this client, or not any more.",
        429: "Too many wrong keys came from this address.",
    }
)


def add_page_routes(app: FastAPI, state: AppState) -> None:
    """Adds the routes, to the application itself as `add_openai_routes` does."""
    model, kept_drawings = state.model, KeptDrawings(state.broker)

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
        return read_events(kept_drawings.keep(served, body), request)

    @app.get(
        f"{STREAM_PATH}/{{drawing_id}}",
        responses={**_FOLLOWING_ERRORS, **EVENT_STREAM},
        response_class=StreamingResponse,
        tags=["images"],
    )
    async def follow_stream(drawing_id: str, request: Request) -> Response:
        """The events from now on of a drawing whose reader has left. `queued` told its id."""
        kept = await kept_drawings.follow(drawing_id, client_of(request.scope))
        context_of(request.scope).served = kept.served
        return read_events(kept, request)

    @app.delete(
        f"{STREAM_PATH}/{{drawing_id}}",
        status_code=204,
        responses=_FOLLOWING_ERRORS,
        tags=["images"],
    )
    async def cancel_stream(drawing_id: str, request: Request) -> Response:
        """Ends a drawing, whether or not somebody reads its events."""
        kept_drawings.cancel(drawing_id, client_of(request.scope))
        return Response(status_code=204)

    def read_events(kept: KeptDrawing, request: Request) -> Response:
        events = PageEvents(state, kept)

        def leave(served: ServedRequest) -> None:
            if events.untold is not None:
                served.give_back(events.untold)
            kept_drawings.leave(kept)

        return event_stream(state, request, kept.served, events.next_event, leave)

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
    kept: KeptDrawing
    ahead: int | None = None  # in the queue, as last told
    untold: Image | None = None  # was taken, and may not have been sent
    has_started: bool = False  # has been told

    async def next_event(self) -> bytes:
        """As `event_stream` wants it."""
        state, served, body = self.state, self.kept.served, self.kept.body
        request, tokens = served.request, state.model.tokens_of_image
        self.untold = None  # the last event has been sent
        if self.ahead is None:
            return self._queued(state.broker.ahead_of(served))
        if served.started_at is not None and not self.has_started:
            self.has_started = True
            return event_bytes("started")
        match await served.next_event(_QUEUE_LOOK_SECONDS):
            case None:
                ahead = state.broker.ahead_of(served)
                waits = served.started_at is None and ahead != self.ahead
                return self._queued(ahead) if waits else b""
            case Started():
                return b""  # it was told, or is told next
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
                self.untold = image
                return event_bytes(
                    "image",
                    await state.make_base64(picture_of(state, served, image, body)),
                    image_index=image.index,
                    output_format=body.picture_format,
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
        self.ahead, model, request = ahead, self.state.model, self.kept.served.request
        self.kept.told = True
        return event_bytes(
            "queued",
            id=self.kept.drawing_id,
            ahead=ahead,
            seed=request.params.seed,
            n=request.n,
            class_label=request.class_label,
            class_name=model.classes[request.class_label],
            size=model.size,
            grid=model.grid,
        )
