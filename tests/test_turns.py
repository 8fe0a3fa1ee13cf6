"""A burst of requests that draw does not stand before whoever asks for little."""

import asyncio
from typing import Any

from autoregressive.serve.web.generation import DRAWING_PATHS
from autoregressive.serve.web.guards import OneDrawingATurn
from autoregressive.serve.web.turns import Turns

MANY = 50


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

        guard = OneDrawingATurn(app)
        paths = [DRAWING_PATHS[who % len(DRAWING_PATHS)] for who in range(MANY)] + ["/health"]
        await asyncio.gather(*(guard({"type": "http", "path": path}, None, None) for path in paths))  # type: ignore[arg-type]
        return served

    served = asyncio.run(run())
    assert len(served) == MANY + 1
    assert served.index("/health") <= 3


def test_a_probe_passes_a_burst_of_answers() -> None:
    """Pictures that are ready at once are written one at a turn; a probe that comes then is served when a few of them have been."""

    async def run() -> list[str]:
        written: list[str] = []
        ready = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] != "/health":
                await ready.wait()
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": scope["path"].encode()})

        async def send(message: Any) -> None:
            if "body" in message:
                written.append(message["body"].decode())

        guard = OneDrawingATurn(app)
        burst = [{"type": "http", "path": DRAWING_PATHS[0]} for _ in range(MANY)]
        drawing = [asyncio.create_task(guard(scope, None, send)) for scope in burst]  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        ready.set()
        await asyncio.sleep(0)
        await asyncio.gather(guard({"type": "http", "path": "/health"}, None, send), *drawing)  # type: ignore[arg-type]
        return written

    written = asyncio.run(run())
    assert len(written) == MANY + 1
    assert written.index("/health") <= 3
