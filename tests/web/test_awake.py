"""How long another process has been silent, and what a front does when the dispatcher is."""

import asyncio
import socket
import time
from collections.abc import Callable

import pytest

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.web import fronts
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.fronts import Accepted, RemoteBroker, State
from autoregressive.serve.worker.messages import Ended, EngineRequest, Heartbeat
from autoregressive.serve.worker.process import connect
from autoregressive.serve.worker.transport import SILENT_SECONDS, AwakeClock, encode

ORDER = EngineRequest(-1, 1, 1, SamplingParams(), True)
READY = State(None, None, 0, 1, (), ())


def test_time_in_which_this_process_stood_still_is_not_the_others_silence() -> None:
    """Fails if a process that was stopped blames others, or if ordinary ticks are not counted in
    full.
    """
    moment = 100.0
    clock = AwakeClock(lambda: moment)
    heard_at = clock.now()
    for _ in range(10):
        moment += 0.1
        clock.now()
    assert clock.now() - heard_at == pytest.approx(1.0)
    moment += 3600
    assert clock.now() - heard_at < 1.0 + SILENT_SECONDS
    for _ in range(20):
        moment += 0.1
        clock.now()
    assert clock.now() - heard_at > SILENT_SECONDS


async def until(holds: Callable[[], bool], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


class Front:
    """A front's broker, and the dispatcher's end of its connection."""

    def __init__(self, timeout: float) -> None:
        ours, self.dispatcher = connect()
        self.finished: list[bool] = []
        self.broker = RemoteBroker(ours, self.finished.append, lambda: None, timeout)

    def say(self, *messages: object) -> None:
        self.dispatcher.sendall(encode(messages))

    async def get_ready(self) -> None:
        """Until it has heard that requests are accepted."""
        self.say(READY)
        await until(lambda: self.broker._state == READY)

    async def close(self) -> None:
        self.dispatcher.shutdown(socket.SHUT_RDWR)
        self.dispatcher.close()
        await self.broker.close()


@pytest.mark.timing
def test_a_front_judges_the_dispatcher_by_its_silence() -> None:
    """Fails if it is ready or well while the dispatcher is stopped, or stays unwell when that goes
    on.
    """

    async def go() -> None:
        front = Front(timeout=60)
        front.say(State(None, None, 0, 1, (), ()))
        await asyncio.sleep(0.1)
        front.broker.require_ready()
        begun = time.monotonic()
        await until(lambda: front.broker.unhealthy is not None)
        assert SILENT_SECONDS - 0.2 <= time.monotonic() - begun <= 2
        with pytest.raises(ApiError, match="does not respond"):
            front.broker.require_ready()
        front.say(Heartbeat())
        await until(lambda: front.broker.unhealthy is None)
        front.broker.require_ready()
        await front.close()

    asyncio.run(go())


def test_what_is_asked_of_the_dispatcher_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a request, or /metrics, waits for ever for a dispatcher that does not answer; a late
    answer harms nothing.
    """
    monkeypatch.setattr(fronts, "_REPLY_SECONDS", 0.1)

    async def go() -> None:
        front = Front(timeout=60)
        await front.get_ready()
        for asking in (front.broker.accept(ORDER), front.broker.metrics_text()):
            with pytest.raises(ApiError) as refusal:
                await asyncio.wait_for(asking, 5)
            assert refusal.value.status == 503
            assert refusal.value.retry_after is not None
        front.say(Accepted(0, 0), Ended(0, "cancelled", 1.0))
        await until(lambda: not front.broker._requests)
        assert front.broker._replies == {}
        await front.close()

    asyncio.run(go())


def test_a_front_gives_up_a_dispatcher_that_stays_silent() -> None:
    """Fails if clients wait for ever for a dispatcher that hangs, or the front stays."""

    async def go() -> None:
        front = Front(timeout=0.5)
        await front.get_ready()
        accepting = asyncio.create_task(front.broker.accept(ORDER))
        await until(lambda: 0 in front.broker._replies)
        front.say(Accepted(0, 0))
        served = await accepting
        event = await served.next_event(5)
        assert isinstance(event, Ended)
        assert event.outcome == "engine_lost"
        await until(lambda: front.finished == [False])
        await front.close()

    asyncio.run(go())
