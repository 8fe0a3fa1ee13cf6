"""What waits for a process that is stopped."""

import asyncio
import socket
import time
from types import SimpleNamespace
from typing import cast

import pytest

from autoregressive.serve.web import fronts
from autoregressive.serve.web.connections import ConnectionStats
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.fronts import FrontLink, State, Up
from autoregressive.serve.worker.messages import (
    KINDS,
    Ended,
    Image,
    LoopStats,
    Preview,
    Progress,
    Started,
)
from autoregressive.serve.worker.process import ChildProcess, connect
from autoregressive.serve.worker.transport import SILENT_SECONDS, Backlog, Channel, Outbox, receive

REQUESTS, IMAGES, ROUNDS, PIXELS = 3, 2, 200, bytes(2**12)
LARGE = Image(99, 0, 1.0, 1.0, 0.5, bytes(2**24))  # more than a connection holds
IMAGE = Image(1, 0, 9.0, 9.0, 0.5, PIXELS)


def rounds() -> list[object]:
    """What an engine says of watched requests as they are drawn."""
    said: list[object] = [Started(request_id, 1.0) for request_id in range(REQUESTS)]
    for step in range(ROUNDS):
        for request_id in range(REQUESTS):
            said.append(Progress(request_id, step, float(step)))
            said += [Preview(request_id, index, step, PIXELS) for index in range(IMAGES)]
        said.append(LoopStats(step))
    return [*said, IMAGE, Ended(1, "finished", 9.0)]


def taken(backlog: Backlog) -> list[object]:
    messages: list[object] = []
    while batch := backlog.next_batch():
        messages += batch
    return messages


def check(heard: list[object]) -> None:
    """What a reader gets that was far behind: bounded, the newest of all progress, and all of the
    rest.
    """
    assert len(heard) <= 64 + REQUESTS * (2 + IMAGES) + 3
    for request_id in range(REQUESTS):
        progress = (one for one in heard if isinstance(one, Progress))
        drawn = [one.tokens for one in progress if one.request_id == request_id]
        assert drawn == sorted(drawn)
        assert drawn[-1] == ROUNDS - 1
        for index in range(IMAGES):
            of_image = (
                one
                for one in heard
                if isinstance(one, Preview) and one.request_id == request_id and one.index == index
            )
            rows = [one.rows for one in of_image]
            assert rows[-1] == ROUNDS - 1
    assert [one for one in heard if isinstance(one, LoopStats)][-1] == LoopStats(ROUNDS - 1)
    assert [one for one in heard if isinstance(one, (Started, Image, Ended))] == [
        *(Started(request_id, 1.0) for request_id in range(REQUESTS)),
        IMAGE,
        Ended(1, "finished", 9.0),
    ]


def test_progress_that_waits_is_superseded_and_nothing_else_is() -> None:
    """Fails if a stopped reader costs memory with each step, or misses an image, an end, or the
    newest progress.
    """
    backlog = Backlog()
    for message in rounds():
        backlog.put(message)
    assert backlog.bytes <= (64 + REQUESTS * IMAGES + 1) * len(PIXELS)
    check(taken(backlog))
    assert (len(backlog), backlog.bytes, backlog._newest) == (0, 0, {})


def test_few_messages_all_arrive() -> None:
    """Fails if a reader that keeps up misses progress: the first tells when the first
    token came.
    """
    backlog = Backlog()
    sent = [Progress(1, step, float(step)) for step in range(64)]
    for message in sent:
        backlog.put(message)
    assert taken(backlog) == sent


def test_states_supersede_each_other() -> None:
    """Fails if a stopped front is kept every place in the queue that its clients have had."""
    backlog = Backlog()
    for ahead in range(1000):
        backlog.put(State(None, None, 0, 1, (1,), (ahead,)))
    messages = taken(backlog)
    assert len(messages) <= 64
    assert messages[-1] == State(None, None, 0, 1, (1,), (999,))


def test_a_channel_to_a_stopped_process_is_bounded() -> None:
    """Fails if the dispatcher grows while a front is stopped."""

    async def go() -> list[object]:
        ours, other = connect()
        channel = Channel(ours, KINDS, lambda message: None, lambda: None)
        channel.put(LARGE)
        channel.flush()
        for message in rounds():
            channel.put(message)
        assert channel.waiting_bytes < len(LARGE.data) + 2**20
        reading = asyncio.create_task(asyncio.to_thread(read_to_the_end, other))
        heard = await reading
        assert channel.waiting_bytes == 0
        channel.close()
        other.close()
        return heard

    check(asyncio.run(go()))


def test_an_outbox_to_a_stopped_process_is_bounded() -> None:
    """Fails if an engine's process grows while the dispatcher is stopped."""
    other, theirs = connect()
    outbox = Outbox(theirs, "events")
    outbox.put(LARGE)
    deadline = time.monotonic() + 10
    while outbox._waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for message in rounds():
        outbox.put(message)
    check(read_to_the_end(other))
    outbox.close(5)
    for end in (other, theirs):
        end.close()


def read_to_the_end(connection: socket.socket) -> list[object]:
    """What comes after `LARGE`, up to the end of the request."""
    connection.settimeout(20)
    assert receive(connection) == [LARGE]
    heard: list[object] = []
    while not (heard and isinstance(heard[-1], Ended)):
        heard += receive(connection)
    return heard


@pytest.mark.parametrize(
    ("silent", "waiting", "hangs"),
    [
        (SILENT_SECONDS + 1, 2**20 + 1, True),
        (SILENT_SECONDS + 1, 2**20, False),
        (SILENT_SECONDS - 1, 2**24, False),  # it reads, though slowly
        (61.0, 0, True),
    ],
)
def test_a_stopped_front_for_which_too_much_waits_is_given_up(
    monkeypatch: pytest.MonkeyPatch, silent: float, waiting: int, hangs: bool
) -> None:
    """Fails if pictures pile up for a front that does not respond until --step-timeout
    has passed.
    """
    monkeypatch.setattr(fronts, "_MOST_BEHIND_BYTES", 2**20)

    async def go() -> None:
        ours, theirs = connect()
        moment = 0.0
        clock = SimpleNamespace(now=lambda: moment)
        dispatcher = SimpleNamespace(clock=clock, timeouts=SimpleNamespace(step=60.0))
        front = FrontLink(
            cast(ChildProcess, None), ours, cast(Dispatcher, dispatcher), lambda: None
        )
        front._take(Up(ConnectionStats(), {}))
        front._forward(1, Image(5, 0, 1.0, 1.0, 0.5, bytes(waiting)))
        moment = silent
        assert front.hangs == hangs
        front.channel.close()
        theirs.close()

    asyncio.run(go())
