"""A stand-in of the HTTP service for the page's tests: the real page, and an API that draws, waits
and fails as it is told.
"""

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.types import Receive

from autoregressive.models.demo_classes import DEMO_EMOJI
from autoregressive.serve.web.schema import StreamRequest

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "autoregressive" / "serve" / "web" / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SIZE, GRID = 128, 16
# not those of the page itself
DEFAULTS = {
    "cfg_scale": 4.0,
    "cfg_interval": -1,
    "temperature": 1.0,
    "top_k": 20,
    "top_p": 1.0,
}


@dataclass
class Refusal:
    """An answer of status 400 and above."""

    status: int
    message: str = "no"
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    html: bool = False  # a proxy's page in the place of the API's JSON


@dataclass
class Behaviour:
    """What the service does, to be changed while it runs; and what it has seen."""

    ready: bool = True
    why_not: str = "the model is being loaded (3 of 40 graphs captured): try again soon"
    key: str | None = None
    facts_held: bool = False  # no word yet of what it draws
    trained: bool = True
    class_pictures: str | None = None  # where the picture of all classes is
    ahead: int = 0  # requests before this one; they never end
    row_seconds: float = 0.0
    preview_every: int = 1  # rows
    hold_at_row: int | None = None  # draw so many rows, then wait
    hold_at_image: int | None = None  # send so many pictures, then wait
    refusal: Refusal | None = None  # the answer to a request to draw
    cut_at_row: int | None = None  # break off without a word
    cuts_left: int = 1000  # so often
    fail_at_row: int | None = None  # an `error` event
    described: bool = True  # there is an openapi.json
    forgets: bool = False  # a drawing whose reader has left is not found again
    requests: list[dict[str, Any]] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # requests by id
    followed: list[str] = field(default_factory=list)  # ids
    cancelled: list[str] = field(default_factory=list)  # ids
    disconnects: int = 0
    sent: list[bytes] = field(default_factory=list)  # the pictures' bytes


@cache
def demo_pictures() -> list[Image.Image]:
    """The pictures of docs/images/classes.png, by class."""
    with Image.open(ROOT / "docs" / "images" / "classes.png") as opened:
        sheet = opened.convert("RGB")
    pitch = SIZE + 2
    corners = [
        (2 + pitch * (label % 16), 2 + pitch * (label // 16)) for label in range(len(DEMO_EMOJI))
    ]
    return [sheet.crop((left, top, left + SIZE, top + SIZE)) for left, top in corners]


def picture_of(label: int, index: int) -> Image.Image:
    """Picture `index` of a request: the class's own, every second one mirrored."""
    picture = demo_pictures()[label]
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if index % 2 else picture


def png_of(label: int, index: int, body: dict[str, Any]) -> bytes:
    """The file that the service sends: with its settings in it."""
    stream, notes = io.BytesIO(), PngInfo()
    notes.add_text("parameters", json.dumps({**body, "image_index": index}))
    record = {name: body[name] for name in ("seed", *DEFAULTS)}
    record |= {"images": body["n"], "image": index}
    record |= {"label": label, "class_name": DEMO_EMOJI[label][0]}
    notes.add_text("llamagen", json.dumps(record))
    picture_of(label, index).save(stream, "PNG", pnginfo=notes)
    return stream.getvalue()


@cache
def preview_of(label: int, index: int, rows: int) -> bytes:
    """A preview: the top is drawn, what is below it is loud filler that nobody should see."""
    picture = Image.new("RGB", (SIZE, SIZE), (255, 0, 255))
    picture.paste(picture_of(label, index).crop((0, 0, SIZE, SIZE * rows // GRID)), (0, 0))
    stream = io.BytesIO()
    picture.save(stream, "WEBP", lossless=True, method=0)
    return stream.getvalue()


def error(
    status: int,
    message: str,
    kind: str,
    param: str | None = None,
    headers: dict[str, str] | None = None,
    code: str | None = None,
) -> JSONResponse:
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers=headers)


def event(name: str, **content: object) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **content})}\n\n"


async def drawn(behaviour: Behaviour, body: dict[str, Any], job: str) -> AsyncIterator[str]:
    """The events of a request, all of whose pictures grow at once."""
    label, count, started = body["class_label"], body.get("n", 1), time.monotonic()
    tokens = count * GRID * GRID
    facts = {
        "id": job,
        "seed": body["seed"],
        "n": count,
        "class_label": label,
        "class_name": DEMO_EMOJI[label][0],
    }
    yield event("queued", ahead=behaviour.ahead, **facts, size=f"{SIZE}x{SIZE}", grid=GRID)
    while behaviour.ahead:
        yield ": still there\n\n"
        await asyncio.sleep(0.01)
    yield event("started")
    for row in range(1, GRID + 1):
        await asyncio.sleep(behaviour.row_seconds)
        left = (GRID - row) * behaviour.row_seconds
        yield event("progress", tokens_drawn=tokens * row // GRID, tokens=tokens, seconds_left=left)
        for index in range(count if row % behaviour.preview_every == 0 else 0):
            content = base64.b64encode(preview_of(label, index, row)).decode()
            yield event(
                "preview",
                image_index=index,
                rows=row,
                grid=GRID,
                b64_json=content,
                output_format="webp",
            )
        while behaviour.hold_at_row is not None and row >= behaviour.hold_at_row:
            yield ": still there\n\n"
            await asyncio.sleep(0.01)
        if row == behaviour.cut_at_row and behaviour.cuts_left:
            behaviour.cuts_left -= 1
            return
        if row == behaviour.fail_at_row:
            failure = {
                "message": "logits were not finite",
                "type": "server_error",
                "param": None,
                "code": "failed",
            }
            yield event("error", error=failure)
            return
    for index in range(count):
        while behaviour.hold_at_image is not None and index >= behaviour.hold_at_image:
            yield ": still there\n\n"
            await asyncio.sleep(0.01)
        content_bytes = png_of(label, index, body)
        behaviour.sent.append(content_bytes)
        content = base64.b64encode(content_bytes).decode()
        yield event(
            "image", image_index=index, b64_json=content, output_format="png", seed=body["seed"]
        )
    yield event("done", seconds=time.monotonic() - started, usage={"total_tokens": tokens})


def build_app(behaviour: Behaviour) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def policy(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    def refused(request: Request) -> Response | None:
        if (
            behaviour.key is not None
            and request.headers.get("Authorization") != f"Bearer {behaviour.key}"
        ):
            return error(401, "a key is needed", "authentication_error")
        return None

    async def facts() -> None:
        while behaviour.facts_held:
            await asyncio.sleep(0.01)

    @app.get("/")
    async def page() -> Response:
        return FileResponse(STATIC / "index.html")

    @app.get("/ready")
    async def ready() -> Response:
        if behaviour.ready:
            return JSONResponse({"status": "ready"})
        return error(503, behaviour.why_not, "server_error")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        await facts()
        model: dict[str, Any] = {
            "id": "GPT-demo",
            "object": "model",
            "created": 1700000000,
            "owned_by": "llamagen",
        }
        model |= {
            "image_size": SIZE,
            "grid": GRID,
            "tokens_per_image": GRID * GRID,
            "codebook_size": 1024,
            "num_classes": len(DEMO_EMOJI),
        }
        model |= {
            "trained": behaviour.trained,
            "class_pictures": behaviour.class_pictures,
            "defaults": DEFAULTS,
        }
        return refused(request) or JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/classes")
    async def classes(request: Request, search: str = "", limit: int = 1000) -> Response:
        await facts()
        found = [
            {"id": label, "name": name}
            for label, (name, _) in enumerate(DEMO_EMOJI)
            if search in name
        ]
        return refused(request) or JSONResponse(
            {"object": "list", "data": found[:limit], "total": len(found)}
        )

    @app.post("/v1/images/stream")
    async def stream(request: Request) -> Response:
        if (no := refused(request)) is not None:
            return no
        body = await request.json()
        keep_seconds = body.pop("keep_seconds")
        assert keep_seconds > 0
        behaviour.requests.append(body)
        if (refusal := behaviour.refusal) is not None:
            if refusal.html:
                return Response("<h1>Bad Gateway</h1>", refusal.status, media_type="text/html")
            kind = "invalid_request_error"
            return error(
                refusal.status, refusal.message, kind, refusal.param, refusal.headers, refusal.code
            )

        job = f"job-{len(behaviour.requests)}"
        behaviour.jobs[job] = body
        return watched(drawn(behaviour, body, job))

    @app.get("/v1/images/stream/{job}")
    async def follow(job: str) -> Response:
        behaviour.followed.append(job)
        if behaviour.forgets or job not in behaviour.jobs:
            return error(404, "there is no such drawing", "invalid_request_error")
        return watched(drawn(behaviour, behaviour.jobs[job], job))

    @app.delete("/v1/images/stream/{job}")
    async def cancel(job: str) -> Response:
        behaviour.cancelled.append(job)
        return Response(status_code=204)

    @app.get("/openapi.json")
    async def describe() -> Response:
        if not behaviour.described:
            return error(404, "there is no such path", "invalid_request_error")
        schemas = {"StreamRequest": StreamRequest.model_json_schema()}
        return JSONResponse({"components": {"schemas": schemas}})

    def watched(events: AsyncIterator[str]) -> Response:
        class Watched(StreamingResponse):
            async def listen_for_disconnect(self, receive: Receive) -> None:
                await super().listen_for_disconnect(receive)
                behaviour.disconnects += 1

        return Watched(events, media_type="text/event-stream")

    app.mount("/static", StaticFiles(directory=STATIC))
    return app


class StandIn:
    """The service on a free port of loopback, in a thread."""

    def __init__(self) -> None:
        self.behaviour = Behaviour()
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        config = uvicorn.Config(
            build_app(self.behaviour), log_level="warning", timeout_graceful_shutdown=1, ws="none"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True
        )
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def reset(self) -> None:
        """As new: whatever still waits for a picture goes on and ends."""
        for name, value in vars(Behaviour()).items():
            setattr(self.behaviour, name, value)

    def close(self) -> None:
        self.reset()
        self.server.should_exit = True
        self.thread.join(timeout=5)
        self.socket.close()
