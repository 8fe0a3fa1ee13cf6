"""Bursts of requests that draw, and of their answers, do not stand before whoever asks
for little.
"""

import asyncio
import base64
import gc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import httpx2
from fake_service import IMAGE_SIZE, fake_model
from fastapi import Request

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.web.app import build_app
from autoregressive.serve.web.app_state import DRAWING_PATHS, AppState, RequestBroker, Turns
from autoregressive.serve.web.guards import Guards
from autoregressive.serve.web.openai_routes import event_stream, openai_event, preview_of
from autoregressive.serve.web.schema import ImageRequest, ServedModel
from autoregressive.serve.worker.messages import EngineRequest, Preview, ServedRequest

MANY, SIZE = 50, 8
PREVIEW = Preview(0, 0, 4, bytes(SIZE * SIZE * 3))
PREVIEW_OF_32 = Preview(0, 0, 4, bytes(IMAGE_SIZE * IMAGE_SIZE * 3))  # of the fake model's size


def test_one_passes_at_each_turn_in_the_order_of_asking() -> None:
    passed: list[tuple[int, int]] = []  # (turn of the loop, who)
    turn_of_the_loop = 0

    async def pass_one(turns: Turns, who: int) -> None:
        await turns.take()
        passed.append((turn_of_the_loop, who))

    async def run() -> None:
        nonlocal turn_of_the_loop
        turns = Turns()
        for _ in range(2):  # the second time after everybody has gone
            passed.clear()
            tasks = [asyncio.create_task(pass_one(turns, who)) for who in range(MANY)]
            while not all(task.done() for task in tasks):
                turn_of_the_loop += 1
                await asyncio.sleep(0)
            assert [who for _, who in passed] == list(range(MANY))
            moments = [moment for moment, _ in passed]
            assert len(set(moments)) == MANY

    asyncio.run(run())


def test_who_is_cancelled_takes_no_turn() -> None:
    async def run() -> list[int]:
        turns, passed = Turns(), []

        async def pass_one(who: int) -> None:
            await turns.take()
            passed.append(who)

        tasks = [asyncio.create_task(pass_one(who)) for who in range(MANY)]
        await asyncio.sleep(0)
        for task in tasks[10:40]:
            task.cancel()
        await asyncio.wait(tasks, timeout=10)
        return passed

    assert asyncio.run(run()) == [*range(10), *range(40, MANY)]


def test_a_probe_passes_a_burst_of_drawings() -> None:
    """It comes last, and is served when a few of them have been."""

    async def run() -> list[str]:
        served: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            served.append(scope["path"])

        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        guards = Guards(app, lambda scope: None, Turns())
        paths = [DRAWING_PATHS[who % len(DRAWING_PATHS)] for who in range(MANY)] + ["/health"]
        scopes: list[dict[str, Any]] = [
            {"method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}
            | {"headers": [], "http_version": "1.1"}
            for path in paths
        ]
        await asyncio.gather(*(guards(scope, receive, cast(Any, None)) for scope in scopes))
        return served

    served = asyncio.run(run())
    assert len(served) == MANY + 1
    assert served.index("/health") <= 3


def test_pictures_that_are_ready_at_once_are_written_one_at_a_turn() -> None:
    async def run() -> list[int]:
        turn_of_the_loop = 0
        moments: list[int] = []

        async def write(state: AppState) -> None:
            assert base64.b64decode(
                await state.make_base64(preview_of(state, PREVIEW, "png"))
            ).startswith(b"\x89PNG")
            moments.append(turn_of_the_loop)

        with ThreadPoolExecutor(4) as encoders:
            state = AppState(
                cast(ServedModel, SimpleNamespace(image_size=SIZE)),
                cast(RequestBroker, None),
                encoders,
                None,
            )
            tasks = [asyncio.create_task(write(state)) for _ in range(MANY)]
            await asyncio.sleep(0)
            encoders.shutdown(wait=True)  # all are ready, and nobody has noticed yet
            while not all(task.done() for task in tasks):
                turn_of_the_loop += 1
                await asyncio.sleep(0)
        return moments

    moments = asyncio.run(run())
    assert len(moments) == MANY
    assert max(Counter(moments).values()) <= 2  # two where a queue ends


def test_a_reader_that_leaves_before_its_turn_ends_its_job_at_once() -> None:
    """Fails if the request is let go of only when the garbage collector comes by."""

    class NobodysTurn(Turns):
        async def take(self) -> None:
            waits.set()
            await asyncio.Event().wait()

    waits = asyncio.Event()
    abandoned: list[ServedRequest] = []

    async def run() -> None:
        order = EngineRequest(0, 1, 1, SamplingParams(), True, preview_rows=(4,))
        served = ServedRequest(order, 0.0)
        served.take(PREVIEW)
        broker = cast(RequestBroker, SimpleNamespace(abandon=abandoned.append))
        sent: list[str] = []

        async def receive() -> dict[str, str]:
            await waits.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        with ThreadPoolExecutor(1) as encoders:
            state = AppState(
                cast(ServedModel, SimpleNamespace(image_size=SIZE)),
                broker,
                encoders,
                None,
                NobodysTurn(),
            )
            request = Request({"type": "http", "state": {}})
            next_event = partial(openai_event, state, served, ImageRequest.model_validate({}))
            response = event_stream(state, request, served, next_event)
            scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
            await response(scope, receive, send)
        assert sent == ["http.response.start"]

    gc.disable()
    try:
        asyncio.run(asyncio.wait_for(run(), 20))
        assert len(abandoned) == 1
    finally:
        gc.enable()


def test_the_service_takes_its_turns() -> None:
    """Fails if requests that draw, or the writing of images, wait for no turn or have turns of
    their own.
    """
    asked: list[str] = []

    class WatchedQueue(Turns):
        async def take(self) -> None:
            asked.append("turn")

    async def run() -> None:
        broker = cast(RequestBroker, SimpleNamespace(count=lambda outcome: None))
        state = AppState(fake_model("fake"), broker, ThreadPoolExecutor(1), None, WatchedQueue())
        app = build_app(state, version="0", docs=False, api_keys=())
        transport = httpx2.ASGITransport(cast(Any, app))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for path in DRAWING_PATHS:
                await client.post(path, json={"no such field": 1})
            await client.get("/health/none")
        await state.make_base64(preview_of(state, PREVIEW_OF_32, "png"))

    asyncio.run(run())
    assert len(asked) == len(DRAWING_PATHS) + 1
