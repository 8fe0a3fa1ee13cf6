"""Bursts of requests that draw, and of their answers, do not stand before whoever asks
for little.
"""

import asyncio
import base64
import gc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

from fake_service import fake_model
from fastapi import Request

from autoregressive.serve.engine.request import SamplingParams
from autoregressive.serve.web.app import build_app
from autoregressive.serve.web.desk import Desk
from autoregressive.serve.web.generation import DRAWING_PATHS, Studio, _event_stream, _OpenAIEvents
from autoregressive.serve.web.guards import OneDrawingATurn
from autoregressive.serve.web.jobs import Job
from autoregressive.serve.web.served_model import ServedModel
from autoregressive.serve.web.turns import Turns
from autoregressive.serve.worker.messages import Preview, Submit

MANY, SIZE = 50, 8
PREVIEW = Preview(0, 0, 4, bytes(SIZE * SIZE * 3))


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

        guard = OneDrawingATurn(app, Turns())
        paths = [DRAWING_PATHS[who % len(DRAWING_PATHS)] for who in range(MANY)] + ["/health"]
        await asyncio.gather(*(guard({"type": "http", "path": path}, None, None) for path in paths))  # type: ignore[arg-type]
        return served

    served = asyncio.run(run())
    assert len(served) == MANY + 1
    assert served.index("/health") <= 3


def test_pictures_that_are_ready_at_once_are_written_one_at_a_turn() -> None:
    async def run() -> list[int]:
        turn_of_the_loop = 0
        moments: list[int] = []

        async def write(studio: Studio) -> None:
            assert base64.b64decode(await studio.preview_text(PREVIEW, "png")).startswith(
                b"\x89PNG"
            )
            moments.append(turn_of_the_loop)

        with ThreadPoolExecutor(4) as encoders:
            studio = Studio(
                cast(ServedModel, SimpleNamespace(image_size=SIZE)),
                cast(Desk, None),
                encoders,
                None,
            )
            tasks = [asyncio.create_task(write(studio)) for _ in range(MANY)]
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
    """Fails if the job is let go of only when the garbage collector comes by."""

    class NobodysTurn(Turns):
        async def take(self) -> None:
            waits.set()
            await asyncio.Event().wait()

    waits = asyncio.Event()
    abandoned: list[Job] = []

    async def run() -> None:
        order = Submit(0, 1, 1, SamplingParams(), True, preview_rows=(4,))
        job = Job(order, 0.0)
        job.take(PREVIEW)
        desk = cast(Desk, SimpleNamespace(abandon=abandoned.append))
        sent: list[str] = []

        async def receive() -> dict[str, str]:
            await waits.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        with ThreadPoolExecutor(1) as encoders:
            studio = Studio(
                cast(ServedModel, SimpleNamespace(image_size=SIZE)),
                desk,
                encoders,
                None,
                NobodysTurn(),
            )
            request = Request({"type": "http", "state": {}})
            response = _event_stream(studio, request, job, _OpenAIEvents(studio, job, "png", None))
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
    """Fails if the guard is left out, or has turns of its own."""
    desk = cast(Desk, SimpleNamespace(count=None))
    studio = Studio(fake_model("fake"), desk, ThreadPoolExecutor(1), None)
    part: Any = build_app(studio, version="0", docs=False, api_keys=())
    while not isinstance(part, OneDrawingATurn):
        part = part._app
    assert part._turns is studio.turns
