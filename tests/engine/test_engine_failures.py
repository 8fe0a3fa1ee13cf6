"""What the engine does when a span cannot be run: the requests concerned fail, nothing leaks, and
it goes on.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from fake_runner import FakeRunner, expected_codes, tiny_gpt
from torch import Tensor

import autoregressive.serve.engine.engine as engine_module
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.request import Request, RequestState

TOKENS = 64


SMALL = EngineConfig(max_num_seqs=4, page_size=4, num_pages=64)


def make_engine(config: EngineConfig = SMALL) -> tuple[Engine, FakeRunner]:
    engine = Engine(tiny_gpt(TOKENS), None, config, FakeRunner)
    assert isinstance(engine.runner, FakeRunner)
    return engine, engine.runner


def until_ended(engine: Engine, requests: list[Request]) -> list[Request]:
    """What `step` returns until all have ended; the audit holds after each."""
    returned = []
    for _ in range(200):
        returned += engine.step()
        engine.audit()
        if all(request.ended for request in requests):
            return returned
    raise AssertionError("the requests do not end")


@pytest.mark.parametrize("spans_before", [0, 1, 2])
def test_running_requests_fail_and_waiting_ones_go_on(spans_before: int) -> None:
    """Out of memory in a step: its requests are told, their pages and slots come back, and the
    queue is served.
    """
    engine, runner = make_engine()
    params = [SamplingParams(seed=seed, top_k=0, n=2) for seed in range(2)]
    running, waiting = (engine.submit(3, one) for one in params)

    def out_of_memory(steps: int) -> None:
        if len(runner.spans) == spans_before:
            raise torch.OutOfMemoryError("no memory is left")

    runner.before_span = out_of_memory
    for _ in range(spans_before):
        engine.step()
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    engine.audit()
    runner.before_span = lambda steps: None
    returned = until_ended(engine, [waiting])
    assert returned == [running, waiting]
    assert running.state is RequestState.FAILED
    assert "no memory is left" in (running.error or "")
    assert waiting.state is RequestState.FINISHED
    assert waiting.codes is not None
    assert waiting.codes.tolist() == expected_codes(waiting, TOKENS)
    assert engine.scheduler.pool.used_pages == 0
    assert not engine.wait_for_work(timeout=0)


def test_a_copy_that_cannot_be_made_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if a neighbour in the middle of its image dies of another's copy."""
    engine, _ = make_engine()
    request = engine.submit(3, SamplingParams(top_k=0))
    for _ in range(3):
        engine.step()
    neighbour = engine.submit(4, SamplingParams(top_k=0))

    def no_memory(slots: object) -> None:
        raise RuntimeError("no pinned memory")

    monkeypatch.setattr(engine.batch, "fetch", no_memory)
    with pytest.raises(RuntimeError, match="pinned"):
        until_ended(engine, [request])
    monkeypatch.undo()
    assert set(until_ended(engine, [request, neighbour])) == {request, neighbour}
    assert (request.state, neighbour.state) == (RequestState.FAILED, RequestState.FINISHED)


@pytest.mark.parametrize("method", ["ready", "result"])
def test_a_copy_that_fails_on_its_way_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A kernel's error may show only when the codes arrive: the request would be running for ever,
    and its slot lost.
    """
    engine, _ = make_engine()
    request = engine.submit(3, SamplingParams(top_k=0))
    for _ in range(3):
        engine.step()
    neighbour = engine.submit(4, SamplingParams(top_k=0))

    def broken() -> None:
        raise RuntimeError("an illegal address")

    damaged: dict[str, Any] = {method: broken}
    fetch = engine.batch.fetch

    def broken_fetch(slots: Sequence[int]) -> DeviceFuture[tuple[Tensor, ...]]:
        return replace(fetch(slots), **damaged)

    monkeypatch.setattr(engine.batch, "fetch", broken_fetch)
    with pytest.raises(RuntimeError, match="illegal address"):
        until_ended(engine, [request])
    monkeypatch.undo()
    engine.audit()
    assert set(until_ended(engine, [request, neighbour])) == {request, neighbour}
    assert "an illegal address" in (request.error or "")
    assert neighbour.state is RequestState.FINISHED
    assert not engine.wait_for_work(timeout=0)


@pytest.mark.parametrize("method", ["fetch", "ready", "result"])
def test_a_copy_of_lengths_that_fails_fails_what_runs(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Fails if requests whose positions nobody learns are lost, their pages or slots are, or a
    later request is told of the old failure.
    """
    engine, runner = make_engine(replace(SMALL, lookahead=4))
    runner.right_share = 0.5
    running = [engine.submit(3, SamplingParams(seed=seed, top_k=0)) for seed in range(2)]
    waiting = engine.submit(3, SamplingParams(seed=2, top_k=0))
    engine.step()

    def broken() -> NoReturn:
        raise RuntimeError("an illegal address")

    def broken_fetch() -> DeviceFuture[Tensor]:
        damaged: dict[str, Any] = {method: broken}
        return broken() if method == "fetch" else replace(fetch_lengths(), **damaged)

    fetch_lengths = engine.batch.fetch_lengths
    monkeypatch.setattr(engine.batch, "fetch_lengths", broken_fetch)
    with pytest.raises(RuntimeError, match="illegal address"):
        until_ended(engine, running)
    monkeypatch.undo()
    engine.audit()
    assert set(until_ended(engine, [*running, waiting])) == {*running, waiting}
    assert {request.state for request in running} == {RequestState.FAILED}
    assert waiting.codes is not None
    assert waiting.codes.tolist() == expected_codes(waiting, TOKENS)
    assert not engine.wait_for_work(timeout=0)


def test_a_copy_behind_a_failed_span_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if requests that come after a failure are told of copies that were made before it."""
    engine, runner = make_engine(replace(SMALL, lookahead=4))
    arrived = False

    def broken() -> NoReturn:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(
        engine.batch, "fetch_lengths", lambda: DeviceFuture(lambda: arrived, broken)
    )
    failing = engine.submit(3, SamplingParams(top_k=0))
    engine.step()

    def out_of_memory(passes: int) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    runner.before_span = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    monkeypatch.undo()
    runner.before_span = lambda passes: None
    arrived = True
    later = engine.submit(3, SamplingParams(top_k=0))
    assert until_ended(engine, [later]) == [failing, later]
    assert later.state is RequestState.FINISHED


def test_of_two_requests_in_a_copy_the_finished_one_stays_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out while the second request is given its codes: neither may be lost,
    nor a slot.
    """
    engine, _ = make_engine(replace(SMALL, lookahead="off"))
    first, second = (
        engine.submit(label, SamplingParams(top_k=0, cfg_scale=1.0)) for label in (3, 4)
    )
    finish = engine_module._finish

    def out_of_memory_at_the_second(request: Request, codes: Tensor, slot_state: Tensor) -> None:
        if request is second:
            raise MemoryError("no memory is left")
        finish(request, codes, slot_state)

    monkeypatch.setattr(engine_module, "_finish", out_of_memory_at_the_second)
    with pytest.raises(MemoryError):
        until_ended(engine, [first, second])
    monkeypatch.undo()
    engine.audit()
    assert set(engine.step()) == {first, second}
    assert (first.state, second.state) == (RequestState.FINISHED, RequestState.FAILED)
    assert not engine.wait_for_work(timeout=0)


def test_a_request_interrupted_while_it_starts_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C between its start and its leaving the queue: it would fail, and then run all
    the same.
    """
    engine, _ = make_engine()
    request = engine.submit(3, SamplingParams(top_k=0))
    start = engine.scheduler._start

    def interrupted(started: Request) -> None:
        start(started)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.scheduler, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    assert engine.step() == [request]
    assert request.state is RequestState.FAILED
    assert not engine.wait_for_work(timeout=0)


def test_cancels_are_returned_also_when_their_step_fails() -> None:
    """A client that waits for its cancelled request would wait for ever."""
    engine, runner = make_engine()
    other, cancelled = (
        engine.submit(3, SamplingParams(top_k=0)),
        engine.submit(4, SamplingParams(top_k=0)),
    )
    engine.step()
    engine.cancel(cancelled)

    def fail(steps: int) -> None:
        raise RuntimeError("once")

    runner.before_span = fail
    with pytest.raises(RuntimeError, match="once"):
        engine.step()
    assert set(engine.step()) == {other, cancelled}


@pytest.mark.parametrize("first_image", [-1, 2**31 - 1, 2**40, 0.5])
def test_image_numbers_that_no_kernel_can_hold_are_refused(first_image: int) -> None:
    """They would raise in the middle of a step, for everybody."""
    engine, _ = make_engine()
    with pytest.raises(ValueError, match="first_image"):
        engine.submit(3, SamplingParams(top_k=0, n=2), first_image=first_image)


def test_a_request_cancelled_under_generate_is_an_error() -> None:
    """Fewer images than labels, in silence, would be taken for the others'."""
    engine, runner = make_engine()

    def cancel(steps: int) -> None:
        engine.cancel(engine.scheduler.running[0])

    runner.before_span = cancel
    with pytest.raises(RuntimeError, match="cancelled"):
        engine.generate([1, 2], SamplingParams(top_k=0), decode=False)


def test_a_pool_of_billions_of_pages_costs_nothing() -> None:
    """A typo in --num-pages must not fill the host's memory before it is refused."""
    engine = Engine(
        tiny_gpt(TOKENS), None, EngineConfig(max_num_seqs=4, page_size=4, num_pages=64), FakeRunner
    )
    pool = type(engine.scheduler.pool)(2**31 - 1)
    assert pool.allocate(3) == [0, 1, 2]
    with pytest.raises(ValueError, match="max_num_seqs"):
        EngineConfig(max_num_seqs=10**9)
