"""What lookahead costs and gains: the time of a pass by its window, and of whole images whose
passes keep a chosen number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from autoregressive.benchmarks.guessing import (
    GuessingRunner,
    draw_all,
    kept_a_pass,
    seed_for,
    share_for,
)
from autoregressive.benchmarks.harness import seconds_of
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.request import Request

FEWER_PASSES = (2.0, 3.0)  # tokens that a pass is made to keep
_GUESSES = 100  # in one graph, so that the host is not what is timed


@dataclass(frozen=True)
class Timing:
    """A job whose passes keep so many tokens on average."""

    tokens_a_pass: float  # as counted
    seconds: float  # median of the repeats
    repeats: list[float]


@dataclass(frozen=True)
class WindowTimes:
    """The same job with one window."""

    no_guess_holds: Timing  # as many passes as with lookahead off
    fewer: dict[float, Timing]  # by the tokens that a pass was to keep


def time_window(
    engine: Engine, labels: Sequence[int], params: SamplingParams, repeats: int
) -> WindowTimes:
    """Times a job of one image a label, which all run at once.

    Args:
        engine: with a `GuessingRunner`, or with lookahead off, and then only the first is timed.
            With "auto" the guesses are those that suit the largest window that it may choose.
    """
    draw = partial(draw_all, engine, labels, [params] * len(labels))
    runner = engine.runner
    recorded = draw()  # warms up too
    if not isinstance(runner, GuessingRunner):
        return WindowTimes(_timed(draw, engine.device, repeats), {})
    window = max(engine.lookahead.windows(len(labels) * params.rows))
    runner.offer(recorded, 0.0)
    no_guess_holds, fewer = _timed(draw, engine.device, repeats), {}
    for tokens in FEWER_PASSES:
        if tokens <= window:
            seed = seed_for((len(labels), engine.shape.tokens), tokens, window)
            runner.offer(recorded, share_for(tokens, window), seed)
            fewer[tokens] = _timed(draw, engine.device, repeats)
    return WindowTimes(no_guess_holds, fewer)


def _timed(draw: "partial[list[Request]]", device: torch.device, repeats: int) -> Timing:
    drawn: list[Request] = []
    times = [seconds_of(lambda: drawn.extend(draw()), device) for _ in range(repeats)]
    return Timing(kept_a_pass(drawn), median(times), times)


def guess_ms(engine: Engine) -> float | None:
    """The time that the guesses themselves take at the end of each pass on a GPU. No other pass has
    them. What `GuessingRunner.run` does before a span comes on top.
    """
    runner = engine.runner
    if not isinstance(runner, GuessingRunner) or engine.device.type != "cuda":
        return None
    runner.guess(engine.batch)
    torch.cuda.synchronize(engine.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_GUESSES):
            runner.guess(engine.batch)
    graph.replay()
    times = [seconds_of(graph.replay, engine.device) for _ in range(5)]
    return median(times) / _GUESSES * 1e3
