"""The engine's owner and what passes between it and the service, without HTTP and without a
process.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from fake_runner import (
    CLASSES,
    FakeRunner,
    LateCopies,
    expected_codes,
    fake_engine,
    tiny_gpt,
)
from fake_service import TOKENS, FakeDecoder, Faults
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.output.images import picture_grid
from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.pixel_decoder import PixelDecoder, _as_pictures
from autoregressive.serve.engine.request import Request, RequestState
from autoregressive.serve.web.clients import WaitingPlaces
from autoregressive.serve.web.dispatcher import EngineLink
from autoregressive.serve.worker import messages
from autoregressive.serve.worker.messages import (
    Cancel,
    Command,
    Ended,
    EngineRequest,
    Event,
    Image,
    LoopStats,
    Preview,
    Progress,
    Ready,
    ServedRequest,
    Started,
    Stop,
)
from autoregressive.serve.worker.previews import Previewer, fill_undrawn
from autoregressive.serve.worker.process import ChildProcess, connect, start_child
from autoregressive.serve.worker.transport import AwakeClock, Outbox, decode, encode, receive
from autoregressive.serve.worker.worker import serve

GRID = round(TOKENS**0.5)


def order(request_id: int = 0, *, seed: int = 5, **fields: Any) -> EngineRequest:
    params = SamplingParams(cfg_scale=2.0, top_k=0, seed=seed)
    wanted: dict[str, Any] = {"class_label": 1, "n": 1, "params": params, "pixels": True}
    return EngineRequest(request_id=request_id, **(wanted | fields))


@pytest.mark.parametrize(
    "message",
    [
        order(preview_rows=(1, 2), start_by=1.5, seed=2**62),
        Cancel(3),
        Stop(),
        Ready(4, 5, 6),
        Ended(1, "refused", 2.5, "why \u2713"),
        Ended(1, "finished", 2.5, tokens=64, drafted=90, accepted=40, used_pages=0),
        Image(1, 2, 3.25, 3.25, 0.5, bytes(range(256)) * 9),
        Image(1, 2, 3.25, 3.25, 0.5, b""),
        Preview(1, 0, 7, b"\x00\xff"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_arrive_as_they_were_sent(message: Command | Event) -> None:
    """Fails if a field, its type, or a byte is lost on the way."""
    assert decode(encode([message])) == [message]


def test_messages_share_a_frame() -> None:
    """Each has its own bytes, and they keep their order."""
    sent = [
        Image(1, 0, 1.0, 1.0, 0.5, b"first"),
        Ended(1, "finished", 2.0),
        Preview(2, 0, 7, b""),
        Image(3, 1, 3.0, 3.0, 0.5, b"last"),
    ]
    assert decode(encode(sent)) == sent


def test_what_waits_shares_frames_of_sixteen_at_most() -> None:
    """All that was put while the thread wrote, in order, before `close` returns."""
    ours, theirs = connect()
    outbox = Outbox(theirs, "events")
    # more than the connection holds: the thread waits for its reader
    large = Image(0, 0, 1.0, 1.0, 0.5, bytes(2**24))
    outbox.put(large)
    time.sleep(0.2)  # it is on its way
    small = [LoopStats(number) for number in range(40)]
    for message in small:
        outbox.put(message)
    closing = threading.Thread(target=outbox.close, args=(20,))
    closing.start()
    assert receive(ours) == [large]
    frames = [receive(ours) for _ in range(3)]
    assert [message for frame in frames for message in frame] == small
    assert [len(frame) for frame in frames] == [16, 16, 8]
    closing.join(20)
    theirs.close()
    with pytest.raises(EOFError):
        receive(ours)


def test_every_kind_of_message_can_be_sent() -> None:
    """Fails if a kind is added that the other side does not know."""
    kinds = {
        kind
        for kind in vars(messages).values()
        if isinstance(kind, type)
        and kind.__module__ == messages.__name__
        # what takes them, what it notes, and their base
        and kind not in (ServedRequest, messages.RequestPhase, messages._OfRequest)
    }
    assert kinds == set(messages.KINDS.values())


@given(rows=st.integers(1, 8), grid=st.just(8))
def test_a_filling_leaves_what_is_drawn_and_adds_nothing_new(rows: int, grid: int) -> None:
    """Fails if a drawn code is changed, or rows are filled with anything but drawn ones, mirrored
    at the last.
    """
    codes = torch.arange(2 * grid * grid, dtype=torch.int32).view(2, -1)
    filled = fill_undrawn(codes, rows, grid).view(2, grid, grid)
    original = codes.view(2, grid, grid)
    assert torch.equal(filled[:, :rows], original[:, :rows])
    for row in range(rows, grid):
        mirrored = 2 * rows - 1 - row if row < 2 * rows else row - 2 * rows
        if 0 <= mirrored < rows:
            assert torch.equal(filled[:, row], original[:, mirrored])
        assert any(torch.equal(filled[:, row], original[:, drawn]) for drawn in range(rows))


def test_pictures_are_rounded_as_the_commands_are() -> None:
    """Fails if the service's pixels differ from those that the command saves, or a broken picture
    passes for whole.
    """
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels[0, 0, 0, :4] = torch.tensor([-1.0, 1.0, 0.0, 1 / 255])
    pixels[2, 1, 3, 3] = torch.nan
    pictures, finite = _as_pictures(pixels)
    assert finite.tolist() == [True, True, False]
    for index in (0, 1):
        expected = picture_grid(pixels[index : index + 1]).permute(1, 2, 0)
        assert torch.equal(pictures[index], expected)


def test_a_glimpse_of_a_running_image_is_what_it_becomes() -> None:
    """Fails if `peek` copies another image's codes, or codes that are not drawn yet count
    as drawn.
    """
    engine, _ = fake_engine(EngineConfig(max_num_seqs=8), tokens=16)
    first = engine.submit(1, SamplingParams(seed=1, n=2, top_k=0))
    engine.step()
    second = engine.submit(2, SamplingParams(seed=2, top_k=0, cfg_scale=1.0))
    engine.step()
    waiting = engine.submit(3, SamplingParams(seed=3, top_k=0, n=4))
    seen = engine.peek([second, first, waiting]).result()
    assert seen
    assert waiting not in [part.request for part in seen]
    while not (first.ended and second.ended):
        engine.step()
    for part in seen:
        assert part.request.codes is not None
        assert part.steps > 0
        assert torch.equal(part.codes[:, : part.steps], part.request.codes[:, : part.steps])
    assert engine.peek([first]).result() == []


def run_worker(
    commands: Callable[["Side"], None],
    tmp_path: Any,
    prepare: Callable[[Engine], None] = lambda engine: None,
    **config: Any,
) -> list[Event]:
    """What a worker says to commands, until it stops.

    Args:
        prepare: is given the engine before it runs.
    """

    def make_engine(on_progress: Callable[[int, int], None]) -> Engine:
        engine = Engine(tiny_gpt(TOKENS), None, EngineConfig(**config), FakeRunner)
        engine.decoder = cast(PixelDecoder, FakeDecoder(Faults(tmp_path)))
        prepare(engine)
        return engine

    ours, theirs = connect()
    side = Side(ours)

    def run() -> None:
        serve(make_engine, theirs)
        theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    commands(side)
    side.send(Stop())
    thread.join(20)
    assert not thread.is_alive()
    side.read_all()
    return side.events


class Side:
    """The service's side of a worker's connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.events = connection, cast(list[Event], [])

    def send(self, *commands: Command) -> None:
        for command in commands:
            self.connection.sendall(encode([command]))

    def read_until_ended(self, *requests: int) -> None:
        left = set(requests)
        while left:
            assert wait([self.connection], 20), f"requests {left} did not end"
            for event in cast(list[Event], receive(self.connection)):
                self.events.append(event)
                if isinstance(event, Ended):
                    left.discard(event.request_id)

    def read_all(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                self.events += cast(list[Event], receive(self.connection))


def of_request(events: list[Event], request_id: int) -> list[Event]:
    return [event for event in events if getattr(event, "request_id", None) == request_id]


def test_a_request_is_told_of_in_order(tmp_path: Any) -> None:
    """Started, drawn, its images, the end; the end comes last and once, with every image
    before it.
    """

    def commands(side: Side) -> None:
        side.send(order(0, n=3, pixels=False, watched=True), order(1, n=2, seed=6))
        side.read_until_ended(0, 1)

    events = run_worker(commands, tmp_path, max_num_seqs=4)
    for request_id, n in ((0, 3), (1, 2)):
        told = of_request(events, request_id)
        assert isinstance(told[0], Started)
        assert isinstance(told[-1], Ended)
        assert told[-1].outcome == "finished"
        assert sum(isinstance(event, Ended) for event in told) == 1
        assert sorted(event.index for event in told if isinstance(event, Image)) == list(range(n))
        assert told[-1].tokens == n * TOKENS
        assert told[-1].used_pages is not None
    drawn = {
        request_id: [
            event.tokens for event in of_request(events, request_id) if isinstance(event, Progress)
        ]
        for request_id in (0, 1)
    }
    assert drawn[0][-1] == 3 * TOKENS
    assert len(drawn[1]) == 1, "of an unwatched request only the first token is told"
    params = SamplingParams(cfg_scale=2.0, top_k=0, seed=5, n=3)
    codes = {event.index: event.data for event in of_request(events, 0) if isinstance(event, Image)}
    wanted = expected_codes(Request(0, 1, params), TOKENS)
    assert [
        torch.frombuffer(bytearray(codes[image]), dtype=torch.int32).tolist() for image in range(3)
    ] == wanted


def guess_rightly(engine: Engine, *, late: int) -> None:
    """Has the device keep nearly all guesses, and positions come to the host after so many spans,
    as from a GPU.
    """
    runner = cast(FakeRunner, engine.runner)
    runner.right_share = 0.9
    copies = LateCopies(engine.batch, late)
    engine.batch.fetch_lengths = copies.fetch_lengths  # type: ignore[method-assign]


def test_the_end_says_what_guesses_were_worth(tmp_path: Any) -> None:
    """Fails if guesses are not those of all images, tokens or images differ from those of one token
    a pass, or progress goes back.
    """

    def commands(side: Side) -> None:
        side.send(order(0, n=3, pixels=False, watched=True))
        side.read_until_ended(0)

    ends = {}
    for lookahead in ("off", 8):
        events = run_worker(
            commands, tmp_path, lambda engine: guess_rightly(engine, late=2), lookahead=lookahead
        )
        ends[lookahead] = events[-1]
        drawn = [event.tokens for event in events if isinstance(event, Progress)]
        assert drawn == sorted(drawn)
        assert drawn[-1] == 3 * TOKENS
        params = SamplingParams(cfg_scale=2.0, top_k=0, seed=5, n=3)
        images = sorted((event.index, event.data) for event in events if isinstance(event, Image))
        assert [
            torch.frombuffer(bytearray(codes), dtype=torch.int32).tolist() for _, codes in images
        ] == expected_codes(Request(0, 1, params), TOKENS)
    off, ahead = (cast(Ended, ends[lookahead]) for lookahead in ("off", 8))
    assert (off.tokens, off.drafted, off.accepted) == (3 * TOKENS, 0, 0)
    passes = 3 * TOKENS - ahead.accepted
    assert ahead.tokens == 3 * TOKENS
    assert passes < TOKENS
    assert passes < ahead.drafted <= 7 * passes


def test_previews_show_what_is_drawn_where_images_run_ahead() -> None:
    """Fails if a preview shows a guess, a row that is not wanted or not drawn, another image's
    codes, or fewer rows than the copy holds; or if one image's previews go back.
    """
    engine, _ = fake_engine(EngineConfig(max_num_seqs=8, lookahead=3), tokens=256)
    engine.decoder = cast(PixelDecoder, SimpleNamespace(submit_to_host=codes_as_pictures))
    guess_rightly(engine, late=3)
    requests = [
        engine.submit(1, SamplingParams(top_k=0, seed=5), first_image=index) for index in range(4)
    ]
    previewer, wanted = Previewer(engine, most=4), (1, 2, 4, 5, 7, 9, 10, 13, 15)
    shown: dict[Request, list[int]] = {request: [] for request in requests}
    known: dict[Request, int] = {}
    more = 0
    while engine.wait_for_work(0):
        engine.step()
        previewer._next_at = 0.0  # it may take all of the time
        known |= {} if previewer.busy else {one: one.steps // 16 for one in requests}
        for request, rows, picture in previewer.advance(
            [(request, wanted) for request in requests], may_begin=True
        ):
            shown[request].append(rows)
            more += rows > known[request]
            drawn = expected_codes(request, 256)[0][: rows * 16]
            assert picture.flatten().tolist()[: rows * 16] == drawn
    assert more > 0, "no preview shows more than the host knew"
    for rows_shown in shown.values():
        assert len(rows_shown) >= 2
        assert rows_shown == sorted(set(rows_shown))
        assert set(rows_shown) <= set(wanted)


def codes_as_pictures(codes: torch.Tensor) -> DeviceFuture[tuple[torch.Tensor, ...]]:
    """A decoder that gives back what it is given."""
    return DeviceFuture.done((codes, torch.ones(len(codes), dtype=torch.bool)))


def test_what_cannot_be_drawn_is_refused_and_the_rest_goes_on(tmp_path: Any) -> None:
    """Fails if a request that no engine can take ends the worker."""

    def commands(side: Side) -> None:
        too_many = SamplingParams(n=3)  # six rows
        side.send(order(0, class_label=CLASSES), order(1, params=too_many), order(2), Cancel(99))
        side.read_until_ended(0, 1, 2)

    ends = {
        event.request_id: event
        for event in run_worker(commands, tmp_path, max_num_seqs=4)
        if isinstance(event, Ended)
    }
    assert [ends[number].outcome for number in (0, 1, 2)] == ["refused", "refused", "finished"]
    assert "class_label" in ends[0].message


def test_deadlines_are_kept_before_a_step_is_spent(tmp_path: Any) -> None:
    """A request whose time to start is over never starts, even if there is room. One that is
    cancelled twice ends once.
    """

    def commands(side: Side) -> None:
        side.send(order(0, start_by=time.monotonic() - 1), order(1, n=2), Cancel(1), Cancel(1))
        side.read_until_ended(0, 1)

    events = run_worker(commands, tmp_path, max_num_seqs=4)
    assert [event.outcome for event in events if isinstance(event, Ended)].count(
        "queue_timeout"
    ) == 1
    assert not any(isinstance(event, (Started, Image)) for event in of_request(events, 0))
    assert sum(isinstance(event, Ended) for event in of_request(events, 1)) == 1


def test_a_worker_whose_service_has_gone_ends(tmp_path: Any) -> None:
    """Fails if an engine outlives the service that was killed."""
    ours, theirs = connect()

    def make_engine(on_progress: Callable[[int, int], None]) -> Engine:
        return Engine(tiny_gpt(TOKENS), None, EngineConfig(max_num_seqs=2), FakeRunner)

    thread = threading.Thread(target=lambda: serve(make_engine, theirs))
    thread.start()
    time.sleep(0.2)
    ours.close()
    thread.join(5)
    assert not thread.is_alive()


def talk_until_stopped(connection: socket.socket) -> None:
    """An engine's process that has more pictures to send than a connection holds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
    outbox = Outbox(connection, "events")
    for number in range(60):
        outbox.put(Image(number, 0, 1.0, 1.0, 0.5, bytes(2**18)))
    while not any(isinstance(command, Stop) for command in receive(connection)):
        pass
    outbox.close(10)


def test_an_engine_with_much_to_say_ends_when_it_is_told_to() -> None:
    """Fails if it is not told before the loop waits for it, or cannot end because nobody reads what
    it still sends.
    """

    async def go() -> None:
        process, connection = start_child(talk_until_stopped, "engine")
        assert wait([connection], 60)  # it writes, and the loop does not read
        link = EngineLink(
            process, connection, lambda request: None, WaitingPlaces(8, shared=True), AwakeClock()
        )
        link.begin_to_stop()
        link.stop(time.monotonic() + 3)
        assert process.poll() == 0

    asyncio.run(go())


def test_a_slow_reader_gets_the_newest_and_every_image() -> None:
    """Fails if old previews pile up, an image is lost, or the end overtakes an image."""

    async def read() -> list[Any]:
        served = ServedRequest(order(0, n=2, watched=True), time.monotonic())
        served.take(Started(0, 1.0))
        for rows in range(1, 8):
            served.take(Progress(0, rows * 8, 1.0))
            served.take(Preview(0, 0, rows, bytes([rows])))
            served.take(Preview(0, 1, rows, bytes([rows])))
        served.take(Image(0, 0, 2.0, 2.0, 0.1, b"a"))
        served.take(Image(0, 1, 2.0, 2.0, 0.1, b"b"))
        served.take(Ended(0, "finished", 2.0))
        events = []
        while not isinstance(event := await served.next_event(), Ended):
            events.append(event)
        assert not served.has_news
        return events

    events = asyncio.run(read())
    assert [event.data for event in events if isinstance(event, Image)] == [b"a", b"b"]
    assert not any(isinstance(event, Preview) for event in events), (
        "a finished image needs no preview"
    )
    assert [event.tokens for event in events if isinstance(event, Progress)] == [56]


def test_a_reader_who_does_not_watch_is_not_woken_for_progress() -> None:
    """Fails if a plain request wakes for what it does not show, or its tokens and moments are not
    known all the same.
    """

    async def read() -> ServedRequest:
        served = ServedRequest(order(0), 0.0)
        served.take(Started(0, 1.0))
        served.take(Progress(0, 8, 1.5))
        assert not served.has_news
        served.take(Ended(0, "finished", 2.0, tokens=64, used_pages=0))
        assert isinstance(await served.next_event(), Ended)
        return served

    served = asyncio.run(read())
    assert (served.started_at, served.first_token_at, served.tokens) == (1.0, 1.5, 64)


@settings(max_examples=50)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["submit", "start", "end"]), st.booleans()),
        max_size=60,
    )
)
def test_what_an_engine_has_is_counted_as_it_comes_and_goes(
    steps: list[tuple[int, str, bool]],
) -> None:
    """Fails if the rows or the queue of an engine, which say who is let in, differ from those of
    its requests.
    """

    async def go() -> None:
        ours, theirs = connect()
        ended: list[ServedRequest] = []
        places = WaitingPlaces(8, shared=True)
        link = EngineLink(cast(ChildProcess, None), ours, ended.append, places, AwakeClock())
        for number, what, reserved in steps:
            if what == "submit" and number not in link.requests:
                link.submit(
                    ServedRequest(
                        order(number, n=number + 1, client=str(number % 2)), 0.0, reserved=reserved
                    )
                )
            elif what == "start":
                link._take(Started(number, 1.0))
            elif what == "end":
                link._take(Ended(number, "finished", 2.0, tokens=1, used_pages=number))
            requests = link.requests.values()
            assert link.rows == sum(served.rows for served in requests)
            waiting = Counter(
                served.request.client
                for served in requests
                if served.started_at is None and not served.reserved
            )
            assert places.taken == waiting.total()
            assert all(places.taken_by(client) == waiting[client] for client in "01")
        link.begin_to_stop()
        link._channel.close()
        theirs.close()
        assert all(served.ended is not None for served in ended)

    asyncio.run(go())


def test_nothing_is_kept_for_a_reader_who_has_left() -> None:
    """Fails if the pictures of an abandoned request stay in memory."""

    async def abandon() -> None:
        served = ServedRequest(order(0), time.monotonic())
        served.take(Image(0, 0, 2.0, 2.0, 0.1, b"a"))
        served.abandon()
        served.take(Preview(0, 0, 3, b"b"))
        assert not served.has_news

    asyncio.run(abandon())


def test_requests_that_fail_say_by_what() -> None:
    """Fails if the worker cannot tell NaN from an engine in trouble."""
    engine, runner = fake_engine(EngineConfig(max_num_seqs=4), tokens=16)
    runner.fails = {(7, 0, 3)}
    request = engine.submit(1, SamplingParams(seed=7, top_k=0))
    while not request.ended:
        engine.step()
    assert request.state is RequestState.FAILED
    assert type(request.cause).__name__ == "NonFiniteLogitsError"
