"""What a front does for its clients while the dispatcher's process does not respond."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import pytest
from fake_service import running_service
from test_awake import ORDER, Front, until

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.fronts import FRONT_KINDS, State, Up
from autoregressive.serve.worker.messages import Heartbeat
from autoregressive.serve.worker.transport import SILENT_SECONDS, receive


class Clock:
    """The broker's, which stands still until a test moves it."""

    def __init__(self) -> None:
        self.moment = 0.0

    def now(self) -> float:
        return self.moment


def with_silent_dispatcher(visit: Callable[[Front, Clock], Awaitable[None]]) -> None:
    """Visits a front whose dispatcher was ready, and has been silent for too long since."""

    async def go() -> None:
        front, clock = Front(timeout=60), Clock()
        await front.get_ready()
        await until(lambda: front.broker._channel.idle)
        front.broker._clock = clock  # type: ignore[assignment]
        front.broker._heard_at = 0.0
        clock.moment = SILENT_SECONDS + 0.1
        await visit(front, clock)
        await front.close()

    asyncio.run(go())


def test_a_dispatcher_known_to_be_silent_is_not_asked() -> None:
    """Fails if a drawing or /metrics waits for its 503, or leaves messages that nobody reads."""

    async def visit(front: Front, _: Clock) -> None:
        for asking in (front.broker.accept, lambda order: front.broker.metrics_text()):
            with pytest.raises(ApiError) as refusal:
                await asyncio.wait_for(asking(ORDER), 0.5)
            assert refusal.value.status == 503
            assert refusal.value.retry_after is not None
        assert front.broker._requests == {}
        front.broker._watching.cancel()
        assert front.broker._channel.idle

    with_silent_dispatcher(visit)


def test_answers_are_counted_together() -> None:
    """Fails if each answered request is a message of its own, or if one is not counted.

    The messages would pile up while the dispatcher is stopped.
    """

    async def visit(front: Front, clock: Clock) -> None:
        for outcome in ("invalid", "success", "invalid") * 1000:
            front.broker.count(outcome)
        assert front.broker._channel.idle
        clock.moment += 1
        told: list[Up] = []
        while not any(up.answered for up in told):
            told += await asyncio.to_thread(receive, front.dispatcher, FRONT_KINDS)
        assert told[-1].answered == {"invalid": 2000, "success": 1000}
        front.say(Heartbeat())

    with_silent_dispatcher(visit)


def test_metrics_are_asked_for_while_an_engine_is_lost() -> None:
    """Fails if a service that is not well, but responds, does not say what it has measured."""

    async def visit(front: Front, clock: Clock) -> None:
        clock.moment = 0.0
        front.say(State("the engine has stopped", "the engine has stopped", 10, 1, (), ()))
        await until(lambda: front.broker.unhealthy is not None)
        asking = asyncio.create_task(front.broker.metrics_text())
        await until(lambda: front.broker._replies != {})
        asking.cancel()

    with_silent_dispatcher(visit)


@pytest.mark.timing
def test_a_drawing_gets_its_503_at_once(tmp_path: Path) -> None:
    """Fails if a client waits for a dispatcher of which the probes say already that it does not
    respond.
    """
    with running_service(tmp_path, "--api-server-count", "2") as service:
        os.kill(service.process.pid, signal.SIGSTOP)
        try:
            service.wait_for(lambda: httpx2.get(f"{service.url}/health").status_code == 503, 3)
            for method, path in (("POST", "/v1/images/generations"), ("GET", "/metrics")):
                body = {"prompt": "cat"} if method == "POST" else None
                begun = time.monotonic()
                answer = httpx2.request(method, service.url + path, json=body, timeout=10)
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) >= 1
                assert time.monotonic() - begun < 1
        finally:
            os.kill(service.process.pid, signal.SIGCONT)
        service.wait_until_ready()
        assert service.draw().status_code == 200
