"""What the engine does when a span cannot be run: the requests concerned fail, nothing leaks, and it goes on."""

import pytest
import torch
from fake_runner import FakeRunner, expected_codes, tiny_gpt

from autoregressive.serve.engine.batch import CodesOnTheWay
from autoregressive.serve.engine.config import EngineConfig
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.request import Request, RequestState, SamplingParams

TOKENS = 64


def make_engine() -> tuple[Engine, FakeRunner]:
    engine = Engine(tiny_gpt(TOKENS), None, EngineConfig(max_num_seqs=4, page_size=4, num_pages=64), FakeRunner)
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
    """Out of memory in a step: its requests are told, their pages and slots come back, and the queue is served."""
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


def test_a_copy_that_cannot_be_made_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory runs out after the last step: the request must not stay running for ever, nor its slot be lost."""
    engine, _ = make_engine()
    request = engine.submit(3, SamplingParams(top_k=0))

    def no_memory(slots: object) -> None:
        raise RuntimeError("no pinned memory")

    monkeypatch.setattr(engine.batch, "fetch", no_memory)
    with pytest.raises(RuntimeError, match="pinned"):
        until_ended(engine, [request])
    monkeypatch.undo()
    assert until_ended(engine, [request]) == [request]
    assert request.state is RequestState.FAILED


@pytest.mark.parametrize("method", ["arrived", "wait"])
def test_a_copy_that_fails_on_its_way_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A kernel's error may show only when the codes arrive: the request would be running for ever, and its slot lost."""
    engine, _ = make_engine()
    requests = [engine.submit(3, SamplingParams(top_k=0)), engine.submit(4, SamplingParams(top_k=0))]

    def broken(on_the_way: CodesOnTheWay) -> None:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(CodesOnTheWay, method, broken)
    with pytest.raises(RuntimeError, match="illegal address"):
        until_ended(engine, requests)
    monkeypatch.undo()
    engine.audit()
    later = engine.submit(5, SamplingParams(top_k=0))
    returned = until_ended(engine, [*requests, later])
    assert set(returned) >= {*requests, later}
    assert any("an illegal address" in (request.error or "") for request in requests)
    assert later.state is RequestState.FINISHED
    assert not engine.wait_for_work(timeout=0)


def test_cancels_are_returned_also_when_their_step_fails() -> None:
    """A client that waits for its cancelled request would wait for ever."""
    engine, runner = make_engine()
    other, cancelled = engine.submit(3, SamplingParams(top_k=0)), engine.submit(4, SamplingParams(top_k=0))
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
        engine.cancel(engine.scheduler.running[0].request)

    runner.before_span = cancel
    with pytest.raises(RuntimeError, match="cancelled"):
        engine.generate([1, 2], SamplingParams(top_k=0), decode=False)


def test_a_pool_of_billions_of_pages_costs_nothing() -> None:
    """A typo in --num-pages must not fill the host's memory before it is refused."""
    engine = Engine(tiny_gpt(TOKENS), None, EngineConfig(max_num_seqs=4, page_size=4, num_pages=64), FakeRunner)
    pool = type(engine.scheduler.pool)(2**31 - 1)
    assert pool.allocate(3) == [0, 1, 2]
    with pytest.raises(ValueError, match="max_num_seqs"):
        EngineConfig(max_num_seqs=10**9)
