"""How long a span may be, by a clock that the test moves."""

from collections.abc import Callable

import pytest
import torch

from autoregressive.serve.engine import device_future
from autoregressive.serve.engine.device_future import StepLimiter

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], StepLimiter]:
    """Makes a limiter that has seen a span of two steps: seconds of a step, and its rows."""
    clock = [100.0]
    monkeypatch.setattr(device_future.time, "perf_counter", lambda: clock[0])

    def make(step_seconds: float, rows: int) -> StepLimiter:
        limiter = StepLimiter(CPU)
        begun = limiter.begin()
        clock[0] += 2 * step_seconds
        limiter.end(begun, steps=2, rows=rows)
        return limiter

    return make


def test_the_first_span_is_one_step() -> None:
    """Fails if a request to cancel waits for steps of which nobody knows how long they take."""
    assert StepLimiter(CPU).span_limit(8) == 1


def test_a_batch_that_has_just_grown_gets_shorter_spans(
    measured: Callable[[float, int], StepLimiter],
) -> None:
    """Fails if spans are planned by the smaller batch's steps: a request to cancel would wait
    longer than 0.25 s.
    """
    limiter = measured(1 / 32, 8)
    assert limiter.span_limit(8) == 8  # of 0.25 s
    assert limiter.span_limit(16) == 4
    assert limiter.span_limit(24) == 2
    assert limiter.span_limit(800) == 1


def test_a_batch_that_has_shrunk_is_not_taken_for_a_faster_one(
    measured: Callable[[float, int], StepLimiter],
) -> None:
    """Fails if time is taken to shrink with the rows: few rows read all weights just the same."""
    assert measured(1 / 32, 8).span_limit(2) == 8


def test_a_span_is_never_longer_than_the_steps_that_a_cancel_may_wait_for(
    measured: Callable[[float, int], StepLimiter],
) -> None:
    """Fails if fast steps make a span that only its duration limits, or a clock that stands still
    ends in a division by zero.
    """
    assert measured(1e-4, 8).span_limit(8) == 16
    assert measured(0.0, 8).span_limit(8) == 16
    assert measured(3.0, 8).span_limit(8) == 1
