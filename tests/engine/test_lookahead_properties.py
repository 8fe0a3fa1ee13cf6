"""Whatever windows an engine computes, and however many guesses hold: codes are those of one token
a pass, the forecast holds, nothing is lost, and nobody starts later.
"""

import random
from itertools import cycle
from unittest.mock import patch

import pytest
from fake_runner import LateCopies, fake_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_properties import TOKENS, Moment, Record, configs, moments

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine_config import EngineConfig, LookaheadSetting
from autoregressive.serve.engine.request import Request

LONG = 49  # tokens of the images that run ahead far
WINDOWS = [1, 2, 3, 4, 8, 16]


@settings(max_examples=300, deadline=None, print_blob=True, derandomize=True)
@given(
    config=configs,
    script=st.lists(moments, max_size=8),
    delay=st.integers(0, 3),
    longest_span=st.integers(1, 16),
    windows=st.lists(st.sampled_from(WINDOWS), min_size=1, max_size=4),
    right_share=st.sampled_from([None, 0.0, 0.5, 0.9, 1.0]),
)
def test_every_request_ends_as_without_lookahead(
    config: EngineConfig,
    script: list[Moment],
    delay: int,
    longest_span: int,
    windows: list[int],
    right_share: float | None,
) -> None:
    """Fails if a request is lost, never ends, is overtaken, draws other codes than alone, or if a
    page is lost, whatever windows follow each other.
    """
    engine, runner = fake_engine(config, tokens=TOKENS)
    runner.right_share = right_share
    record = Record(engine, runner)
    late_copies = LateCopies(engine.batch, delay)
    turns = cycle(windows)
    with (
        patch.object(engine._step_limiter, "span_limit", return_value=longest_span),
        patch.object(engine.lookahead, "window", lambda rows: next(turns)),
        patch.object(engine.batch, "fetch", late_copies.fetch),
        patch.object(engine.batch, "fetch_lengths", late_copies.fetch_lengths),
        patch.object(runner, "before_span", record.check_forecast),
    ):
        for moment in script:
            record.ask(moment)
            record.step()
        for _ in range((TOKENS + delay + 1) * len(record.asked) + 1):
            if not engine.wait_for_work(timeout=0):
                break
            record.step()
    assert not engine.wait_for_work(timeout=0), "the engine does not come to an end"
    record.check_ends()


def random_requests(generator: random.Random, equal: bool) -> list[SamplingParams]:
    """Requests that differ in the seed alone, or in all that matters to the scheduler."""
    if equal:
        return [SamplingParams(seed=seed, top_k=0) for seed in range(generator.randint(2, 10))]
    return [
        SamplingParams(
            cfg_scale=generator.choice([1.0, 3.0]),
            cfg_interval=generator.choice([-1, generator.randint(0, LONG)]),
            n=generator.choice([1, 1, 2]),
            top_k=0,
            seed=seed,
        )
        for seed in range(generator.randint(2, 10))
    ]


def config_for(
    wanted: list[SamplingParams], page_size: int, lookahead: LookaheadSetting
) -> EngineConfig:
    """A pool of a quarter of what the requests would hold together."""
    pages_per_row = -(-LONG // page_size)
    pages = sum(params.rows for params in wanted) * pages_per_row // 4
    pages = max(pages, max(params.rows for params in wanted) * pages_per_row)
    return EngineConfig(64, page_size=page_size, num_pages=pages, lookahead=lookahead)


def passes_at_starts(
    wanted: list[SamplingParams],
    config: EngineConfig,
    *,
    right_share: float,
    delay: int = 0,
    longest_span: int = 1,
) -> tuple[list[int], int]:
    """After how many passes each request starts, and how many passes all take."""
    engine, runner = fake_engine(config, tokens=LONG)
    runner.right_share = right_share
    record = Record(engine, runner)
    late_copies = LateCopies(engine.batch, delay)
    record.asked = [engine.submit(1, params) for params in wanted]
    starts: dict[Request, int] = {}
    with (
        patch.object(engine._step_limiter, "span_limit", return_value=longest_span),
        patch.object(engine.batch, "fetch_lengths", late_copies.fetch_lengths),
        patch.object(runner, "before_span", record.check_forecast),
    ):
        while engine.wait_for_work(timeout=0):
            passes = sum(runner.spans)
            record.step()
            for request in record.asked:
                if request.images:
                    starts.setdefault(request, passes)
    record.check_ends(LONG)
    return [starts[request] for request in record.asked], sum(runner.spans)


# With the last four, requests start later if nobody looks after the head of the queue.
@pytest.mark.parametrize("seed", [*range(20), 54, 70, 103, 116])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "mixed"])
def test_lookahead_lets_nobody_start_later(seed: int, equal: bool) -> None:
    """Fails if pages that are granted ahead keep others from starting: admission would no longer be
    as good as exact, whether guesses hold or not.
    """
    generator = random.Random(seed)
    wanted, page_size = random_requests(generator, equal), generator.choice([1, 2, 4, 16])
    delay, share = generator.randint(0, 2), generator.choice([0.0, 0.3, 0.7, 0.9, 1.0])
    off, passes_off = passes_at_starts(wanted, config_for(wanted, page_size, "off"), right_share=0)
    ahead = config_for(wanted, page_size, generator.choice([2, 3, 4, 8, 16]))
    starts, passes = passes_at_starts(wanted, ahead, right_share=share, delay=delay)
    assert all(later <= start for later, start in zip(starts, off, strict=True))
    assert passes <= passes_off


@pytest.mark.parametrize("seed", range(10))
def test_long_spans_and_late_copies_cost_little(seed: int) -> None:
    """Fails if passes are wasted, or images are held back, because the host knows positions
    late.
    """
    generator = random.Random(seed)
    wanted = random_requests(generator, equal=False)
    config = config_for(wanted, generator.choice([2, 4]), 4)
    at_best = passes_at_starts(wanted, config, right_share=0.8)[1]
    late = passes_at_starts(wanted, config, right_share=0.8, delay=2, longest_span=8)[1]
    assert late <= 1.6 * at_best


@pytest.mark.parametrize(("window", "passes"), [(2, 25), (4, 13), (8, 7), (16, 4)])
def test_right_guesses_are_worth_their_window(window: int, passes: int) -> None:
    """Fails if an image whose guesses all hold takes more passes than its windows."""
    wanted = [SamplingParams(seed=1, top_k=0)]
    config = EngineConfig(2, page_size=4, num_pages=26, lookahead=window)
    assert passes_at_starts(wanted, config, right_share=1.0)[1] == passes
    assert passes_at_starts(wanted, config, right_share=0.0)[1] == LONG
