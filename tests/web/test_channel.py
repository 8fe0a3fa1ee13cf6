"""The event loop's end of a connection to another process."""

import asyncio
import errno
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.serve.worker.messages import (
    KINDS,
    Cancel,
    Ended,
    Image,
    LoopStats,
    Preview,
    Stop,
)
from autoregressive.serve.worker.process import connect
from autoregressive.serve.worker.transport import Channel, encode, receive

LARGE = Image(0, 0, 1.0, 1.0, 0.5, bytes(2**24))  # more than a connection holds


class Heard:
    """A channel, its other end, and what came."""

    def __init__(self) -> None:
        ours, self.other = connect()
        self.other.settimeout(20)  # a test that waits in vain fails
        self.messages: list[Any] = []
        self.gone_after: list[int] = []  # how many messages
        self.channel = Channel(
            ours, KINDS, self._take, lambda: self.gone_after.append(len(self.messages))
        )
        self.number = ours.fileno()

    def _take(self, message: Any) -> None:
        if message == Cancel(13):
            raise ValueError("a bug")
        if message == Stop():
            self.channel.close()
        self.messages.append(message)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                await asyncio.sleep(0.005)

    def close(self) -> None:
        self.channel.close()
        self.other.close()


def test_what_is_put_arrives_in_order_and_shares_frames() -> None:
    """Fails if messages are lost or turned round, or each goes alone, or a frame holds more than
    sixteen.
    """

    async def go() -> None:
        heard = Heard()
        sent = [LoopStats(number) for number in range(40)]
        for message in sent:
            heard.channel.put(message)
        await asyncio.sleep(0)
        assert len(heard.channel._waiting) == 40 - 16  # a frame a turn
        await heard.channel.drain(5)
        frames = [receive(heard.other) for _ in range(3)]
        assert [message for frame in frames for message in frame] == sent
        assert [len(frame) for frame in frames] == [16, 16, 8]
        heard.close()

    asyncio.run(go())


def test_what_is_urgent_goes_before_what_waits() -> None:
    """Fails if an answer for a supervisor waits behind all pictures."""

    async def go() -> None:
        heard = Heard()
        heard.channel.put(LoopStats(1))
        heard.channel.put(LoopStats(2))
        heard.channel.put(LoopStats(3), urgent=True)
        heard.channel.put(LoopStats(4), urgent=True)
        await heard.channel.drain(5)
        assert receive(heard.other) + receive(heard.other) == [
            LoopStats(3),
            LoopStats(4),
            LoopStats(1),
            LoopStats(2),
        ]
        heard.close()

    asyncio.run(go())


def test_a_slow_reader_holds_up_nobody() -> None:
    """Fails if the loop waits for a reader, if `drain` waits for ever, or if what waits is lost."""

    async def go() -> None:
        heard = Heard()
        begun = time.monotonic()
        heard.channel.put(LARGE)
        heard.channel.flush()
        await heard.channel.drain(0.2)
        assert 0.2 <= time.monotonic() - begun < 2
        assert heard.channel._unsent
        reading = asyncio.create_task(
            asyncio.to_thread(lambda: [receive(heard.other), receive(heard.other)])
        )
        await heard.channel.drain(10)
        assert heard.channel._unsent.obj == b""  # a picture that is written is not kept
        heard.channel.put(LoopStats(1))
        assert await reading == [[LARGE], [LoopStats(1)]]
        writes: list[None] = []
        heard.channel._write = lambda: writes.append(None)  # type: ignore[method-assign]
        await asyncio.sleep(0.05)
        assert writes == []  # the loop does not spin because there is room to write
        heard.close()

    asyncio.run(go())


def test_flush_writes_before_the_loop_goes_on() -> None:
    """Fails if an engine is not told to stop, because the loop that is to write it waits for the
    engine's end.
    """

    async def go() -> None:
        heard = Heard()
        sent = [LoopStats(number) for number in range(40)]
        for message in sent:
            heard.channel.put(message)
        heard.channel.flush()
        heard.other.setblocking(False)
        assert [message for _ in range(3) for message in receive(heard.other)] == sent
        await asyncio.sleep(0.05)
        with pytest.raises(BlockingIOError):  # nothing came after it
            heard.other.recv(1)
        heard.close()

    asyncio.run(go())


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 200), max_size=12))
def test_frames_may_come_in_pieces(cuts: list[int]) -> None:
    """Fails if a head or a body that arrives in parts is misread."""
    sent = [
        Image(1, 0, 1.0, 1.0, 0.5, b"first"),
        Ended(1, "finished", 2.0),
        Preview(2, 0, 7, b"\x00\xff"),
    ]
    stream = encode(sent[:2]) + encode(sent[2:])

    async def go() -> None:
        heard, place = Heard(), 0
        for cut in cuts:
            heard.other.sendall(stream[place : place + cut])
            place += cut
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        heard.other.sendall(stream[place:])
        await heard.until(lambda: len(heard.messages) == len(sent))
        assert heard.messages == sent
        heard.close()

    asyncio.run(go())


def test_the_end_is_told_once_and_after_the_last_message() -> None:
    """Fails if what an engine said before it died is lost, or its death is told twice or not at
    all.
    """

    async def go() -> None:
        heard = Heard()
        for number in range(50):
            heard.other.sendall(encode([LoopStats(number)]))
        heard.other.sendall(encode([LoopStats(50)])[:-1])  # it died while it wrote
        heard.other.close()
        await heard.until(lambda: heard.gone_after != [])
        await asyncio.sleep(0.05)
        assert heard.gone_after == [50]
        heard.channel.put(LARGE)  # for nobody
        await heard.channel.drain(5)
        heard.channel.put(LARGE)
        assert not heard.channel._waiting
        heard.close()
        heard.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    "garbage",
    [b"\x02\x00\x00\x00\x00\x00\x00\x00[{", encode([LoopStats(1)]).replace(b"Loop", b"Loup")],
)
def test_whoever_sends_what_it_should_not_has_gone(
    garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails if a connection out of step is read on."""

    async def go() -> None:
        heard = Heard()
        heard.other.sendall(garbage + encode([LoopStats(1)]))
        await heard.until(lambda: heard.gone_after != [])
        await asyncio.sleep(0.05)
        assert heard.messages == []
        assert heard.gone_after == [0]
        heard.close()

    asyncio.run(go())
    assert "messages could not be read" in caplog.text


def test_a_bug_costs_its_own_message_only(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if what stands behind a message that could not be dealt with is lost."""

    async def go() -> None:
        heard = Heard()
        heard.other.sendall(encode([LoopStats(1), Cancel(13), LoopStats(2)]))
        await heard.until(lambda: len(heard.messages) == 2)
        assert heard.messages == [LoopStats(1), LoopStats(2)]
        heard.close()

    asyncio.run(go())
    assert "a message could not be dealt with" in caplog.text


def test_much_to_read_leaves_turns_to_others() -> None:
    """Fails if a probe waits until all that an engine has said is read."""

    async def go() -> None:
        heard = Heard()
        frames = 100
        for number in range(frames):
            heard.other.sendall(encode([LoopStats(number)]))
        seen = []
        while len(heard.messages) < frames:
            await asyncio.sleep(0)
            seen.append(len(heard.messages))
        steps = [after - before for before, after in pairwise(seen)]
        # and not one: an answer that is waited for may be behind many pictures
        assert max(steps) == 8
        heard.close()

    asyncio.run(go())


def test_nothing_is_done_after_close() -> None:
    """Fails if messages are taken, or the loop looks at a connection, once nobody is there for
    them.
    """

    async def go() -> None:
        heard = Heard()
        heard.other.sendall(encode([LoopStats(1), Stop(), LoopStats(2)]) + encode([LoopStats(3)]))
        heard.channel.put(LARGE)
        await heard.until(lambda: len(heard.messages) == 2)
        await asyncio.sleep(0.05)
        assert heard.messages == [LoopStats(1), Stop()]
        loop = asyncio.get_running_loop()
        assert not loop.remove_reader(heard.number)
        assert not loop.remove_writer(heard.number)
        assert heard.gone_after == []
        heard.close()

    asyncio.run(go())


def test_whoever_is_not_listened_to_any_more_need_not_wait() -> None:
    """Fails if an engine that is to end cannot, because it has pictures left to send that nobody
    reads.
    """

    async def go() -> None:
        heard = Heard()
        heard.other.settimeout(None)
        writing = asyncio.create_task(asyncio.to_thread(heard.other.sendall, encode([LARGE])))
        heard.channel._read = lambda: None  # type: ignore[method-assign]
        asyncio.get_running_loop().remove_reader(heard.number)
        # the loop is busy elsewhere
        asyncio.get_running_loop().add_reader(heard.number, heard.channel._read)
        await asyncio.sleep(0.2)
        assert not writing.done()
        heard.channel.put(LoopStats(1))
        heard.channel.flush()
        heard.channel.stop_reading()
        with pytest.raises(BrokenPipeError):
            await asyncio.wait_for(writing, 5)
        assert receive(heard.other) == [LoopStats(1)]
        heard.close()

    asyncio.run(go())


def test_a_message_that_cannot_be_sent_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a bug in one message silences the connection."""

    async def go() -> None:
        heard = Heard()
        for number in (1, object(), 2):
            heard.channel.put(LoopStats(number))  # type: ignore[arg-type]
        await heard.channel.drain(5)
        heard.channel.put(LoopStats(3))
        await heard.channel.drain(5)
        assert [receive(heard.other) for _ in range(3)] == [
            [LoopStats(1)],
            [LoopStats(2)],
            [LoopStats(3)],
        ]
        heard.close()

    asyncio.run(go())
    assert "a message could not be sent" in caplog.text


def test_a_connection_that_cannot_be_written_to_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if commands vanish while the other side passes for alive."""

    @dataclass(frozen=True)
    class Broken:
        connection: socket.socket

        def send(self, data: memoryview) -> int:
            raise OSError(errno.ENOBUFS, "No buffer space available")

        def fileno(self) -> int:
            return self.connection.fileno()

        def close(self) -> None:
            self.connection.close()

    async def go() -> None:
        heard = Heard()
        heard.channel._connection = cast(socket.socket, Broken(heard.channel._connection))
        heard.channel.put(LoopStats(1))
        await heard.until(lambda: heard.gone_after != [])
        heard.other.close()
        await asyncio.sleep(0.05)
        assert heard.gone_after == [0]
        heard.channel.close()

    asyncio.run(go())
    assert "messages could not be written" in caplog.text


def test_a_frame_of_pictures_is_written_at_once() -> None:
    """Fails if the two ends hold no more than by default, where the system allows more: each piece
    would wake both sides.
    """
    most = int(Path("/proc/sys/net/core/wmem_max").read_text())
    plain = socket.socketpair()
    wide = connect()
    for end, default in zip(wide, plain, strict=True):
        size = end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        # the system doubles what it is asked for, for what it keeps beside
        assert size == 2 * min(most, 2**22)
        assert size >= default.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    for end in (*plain, *wide):
        end.close()
