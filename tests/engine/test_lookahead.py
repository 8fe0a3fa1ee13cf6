"""The windows that a setting means, and what an engine reports of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import pytest
from fake_runner import LateCopies, fake_engine

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import Batch
from autoregressive.serve.engine.device_future import StepTime
from autoregressive.serve.engine.engine_config import EngineConfig, LookaheadSetting
from autoregressive.serve.engine.lookahead import Lookahead
from autoregressive.serve.engine.model_runner import row_buckets


@pytest.mark.parametrize("setting", ["auto", "off", 1, 3, 16, 64])
def test_every_window_that_may_be_chosen_is_one_of_those_captured(
    setting: LookaheadSetting,
) -> None:
    """Fails if a span may have a window that no graph was captured for: nothing could run it."""
    lookahead, buckets = Lookahead(setting), row_buckets(256)
    for rows in range(1, 257):
        bucket = min(size for size in buckets if size >= rows)
        assert set(lookahead.windows(rows)) <= set(lookahead.windows(bucket))


def test_settings_mean_windows() -> None:
    """Fails if "off" looks ahead, a number is not kept, or "auto" has more positions than those up
    to which tokens do not depend on the window.
    """
    assert {Lookahead("off").window(rows) for rows in (1, 2, 512)} == {1}
    assert {Lookahead(3).window(rows) for rows in (1, 2, 512)} == {3}
    auto = Lookahead("auto")
    largest = [max(auto.windows(rows)) for rows in (1, 8, 9, 16, 17, 32, 33, 512)]
    assert largest == [8, 8, 4, 4, 2, 2, 1, 1]


# Milliseconds of a pass of GPT-XL on an H200 at half of the context, by rows and window.
COSTS = {
    2: {1: 0.678, 2: 0.695, 4: 0.696, 8: 0.788},
    8: {1: 0.745, 2: 0.785, 4: 0.930, 8: 1.277},
    16: {1: 0.853, 2: 0.963, 4: 1.246},
    32: {1: 1.153, 2: 1.421},
}


def seconds_of_auto(
    lookahead: Lookahead, rows: int, kept: Callable[[int], float], spans_late: int = 3
) -> tuple[float, list[int]]:
    """What a token of an image of 576 costs, and the window of each span of eight passes.

    It counts what a pass costs at half of the context. What is observed grows with the context, as
    on a GPU. What a span has kept is known some spans later.
    """
    seconds, tokens, chosen = 0.0, 0.0, []
    while tokens < 576:
        window = lookahead.window(rows)
        chosen.append(window)
        context = 0.76 + 0.48 * tokens / 576  # as measured with 16 rows
        seconds += 8 * COSTS[rows][window]
        tokens += 8 * kept(window)
        lookahead.observe_seconds(rows, window, context * COSTS[rows][window])
        if len(chosen) > spans_late:
            past = chosen[-1 - spans_late]
            lookahead.observe_kept(past, 8 * rows // 2, round(8 * rows // 2 * kept(past)))
    return seconds / tokens, chosen


@pytest.mark.parametrize("rows", COSTS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8, 1.0])
def test_auto_finds_the_fastest_window(rows: int, share: float) -> None:
    """Fails if auto stays with a slower window, its trials cost more than 2 % of what the fastest
    one takes, or those of the first image more than 4 % where nothing is kept.
    """

    def kept(window: int) -> float:
        return sum(share**guesses for guesses in range(window))

    lookahead = Lookahead("auto")
    fastest = min(cost / kept(window) for window, cost in COSTS[rows].items())
    first, _ = seconds_of_auto(lookahead, rows, kept)
    later = [seconds_of_auto(lookahead, rows, kept)[0] for _ in range(20)]
    assert sum(later) / len(later) < 1.02 * fastest
    assert share > 0 or first < 1.04 * fastest


def test_auto_settles_where_windows_cost_much() -> None:
    """Fails if auto takes no notice of a window that costs more than its positions, and tries it
    for ever.
    """
    lookahead = Lookahead("auto")
    with patch.dict(COSTS, {4: {1: 1.0, 2: 2.5, 4: 5.0, 8: 10.0}}):
        times = [seconds_of_auto(lookahead, 4, lambda window: 1.0)[0] for _ in range(10)]
    assert sum(times[1:]) / 9 < 1.03


def test_auto_follows_a_change() -> None:
    """Fails if auto never finds out that guesses hold now, or no longer."""
    lookahead = Lookahead("auto")
    most_chosen = []
    for kept in (lambda window: 1.0, lambda window: (1 + window) / 2) * 2:
        for _ in range(12):
            _, chosen = seconds_of_auto(lookahead, 2, kept)
        most_chosen.append(max(set(chosen), key=chosen.count))
    assert most_chosen == [1, 8, 1, 8]


@pytest.mark.parametrize("rows", COSTS)
@pytest.mark.parametrize(("before", "after"), [(0.0, 0.8), (0.8, 0.0)])
def test_auto_follows_a_change_within_an_image(rows: int, before: float, after: float) -> None:
    """Fails if a whole image is drawn with a window that suited the images before."""
    lookahead = Lookahead("auto")

    def kept(share: float, window: int) -> float:
        return sum(share**guesses for guesses in range(window))

    for _ in range(5):
        seconds_of_auto(lookahead, rows, partial(kept, before))
    found = [seconds_of_auto(lookahead, rows, partial(kept, after))[0] for _ in range(3)]
    fastest = min(cost / kept(after, window) for window, cost in COSTS[rows].items())
    print("times as long as the fastest window:", [seconds / fastest for seconds in found])
    assert found[0] < 1.45 * fastest
    assert found[2] < 1.1 * fastest


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_auto_follows_a_change_on_a_device_that_is_behind(delay: int) -> None:
    """Fails if what a trial kept is not told, because the next span begins before its copy arrives,
    as on a GPU: auto would stay with a token a pass for ever.
    """
    config = EngineConfig(2, page_size=64, num_pages=18, lookahead="auto")
    engine, runner = fake_engine(config, tokens=576)

    def time_of_step(_: object, steps: int, rows: int, window: int) -> StepTime:
        return StepTime(COSTS[rows][window], rows, window)

    most_chosen = []
    with (
        patch.object(engine._step_limiter, "span_limit", return_value=8),
        patch.object(engine._step_limiter, "end", time_of_step),
        patch.object(engine.batch, "fetch_lengths", LateCopies(engine.batch, delay).fetch_lengths),
    ):
        for runner.right_share in (0.0, 1.0):
            for seed in range(6):
                runner.windows.clear()
                engine.submit(1, SamplingParams(top_k=0, seed=seed))
                while engine.wait_for_work(timeout=0):
                    engine.step()
            most_chosen.append(max(set(runner.windows), key=runner.windows.count))
    assert most_chosen == [1, 4]  # on a CPU two rows have four positions each at most


def test_auto_on_a_cpu_is_for_few_rows() -> None:
    """Fails if "auto" looks ahead on a CPU where it was measured not to gain."""
    lookahead = fake_engine(EngineConfig(8), tokens=64)[0].lookahead
    largest = [max(lookahead.windows(rows)) for rows in (1, 2, 3, 4, 5, 8)]
    assert largest == [8, 4, 2, 2, 1, 1]
    assert fake_engine(EngineConfig(8, lookahead=64), tokens=64)[0].lookahead.windows(8) == [64]


@pytest.mark.parametrize("setting", ["on", 0, 65, 2.5, None, True])
def test_other_settings_are_refused(setting: object) -> None:
    """Fails if a window that no kernel has is found out later, and not in one line at once."""
    with pytest.raises(ValueError, match=r"^lookahead .*: must be auto, off or .*, 1 .* to 64$"):
        EngineConfig(lookahead=cast(LookaheadSetting, setting))


@pytest.mark.parametrize(("window", "right_share"), [(1, 1.0), (4, 1.0), (8, 0.0), (8, 0.6)])
def test_a_request_says_what_its_guesses_were_worth(window: int, right_share: float) -> None:
    """Fails if guesses are counted for the wrong request, or an image's passes do not follow from
    them.
    """
    engine, runner = fake_engine(EngineConfig(8, page_size=4, lookahead=window), tokens=64)
    runner.right_share = right_share
    passes: dict[int, int] = {}
    draw = runner._pass

    def counted(batch: Batch, image: Any, window: int) -> None:
        slot = image.slot
        before = int(batch.lengths[slot])
        draw(batch, image, window)
        passes[slot] = passes.get(slot, 0) + (int(batch.lengths[slot]) > before)

    runner._pass = counted  # type: ignore[method-assign]
    requests = [engine.submit(1, SamplingParams(top_k=0, seed=seed)) for seed in range(2)]
    requests.append(engine.submit(2, SamplingParams(top_k=0, n=2, seed=5)))
    while engine.wait_for_work(timeout=0):
        engine.step()
    for request in requests:
        taken = sum(passes[slot] for slot in request.slots)
        assert request.passes == 64 * request.params.n - request.accepted == taken
        assert request.accepted <= request.drafted <= (window - 1) * taken
        if right_share in (0.0, 1.0):
            assert request.accepted == right_share * request.drafted
    totals = engine.totals
    assert totals.drafted == sum(request.drafted for request in requests)
    assert totals.accepted == sum(request.accepted for request in requests)
    assert totals.passes == sum(runner.spans)
    assert (totals.drafted > 0) == (window > 1)


def test_the_engine_tells_what_windows_are_worth_and_how_much_they_compute() -> None:
    """Fails if "auto" would learn nothing of what passes keep, or a span of wide windows is planned
    as if each computed a token a row.
    """
    engine, runner = fake_engine(EngineConfig(8, page_size=4, lookahead=4), tokens=64)
    runner.right_share = 1.0
    engine.submit(1, SamplingParams(top_k=0, n=2))
    with (
        patch.object(engine.lookahead, "observe_kept") as observe,
        patch.object(engine._step_limiter, "span_limit", return_value=2) as span_limit,
    ):
        while engine.wait_for_work(timeout=0):
            engine.step()
    told = [call.args for call in observe.call_args_list]
    assert {window for window, _, _ in told} == {4}
    assert all(kept == 4 * passes for _, passes, kept in told)
    assert sum(passes for _, passes, _ in told) == 2 * 64 // 4
    assert {call.args for call in span_limit.call_args_list} >= {(4, 4)}


def test_a_glimpse_counts_what_was_copied() -> None:
    """Fails if `peek` tells what the host believes of positions, and not what the copy holds."""
    engine, runner = fake_engine(EngineConfig(8, page_size=4, lookahead=4), tokens=64)
    runner.right_share = 0.6
    request = engine.submit(1, SamplingParams(top_k=0, n=2))
    lengths = engine.batch.lengths[[0, 0]]
    while lengths.min() == lengths.max() or lengths.min() == request.steps:
        engine.step()
        lengths = engine.batch.lengths[request.slots]
    (seen,) = engine.peek([request]).result()
    assert seen.steps == lengths.min() > request.steps
    while engine.wait_for_work(timeout=0):
        engine.step()
    assert request.codes is not None
    assert seen.codes[:, : seen.steps].tolist() == request.codes[:, : seen.steps].tolist()


def test_nan_counts_at_kept_positions_only() -> None:
    """Fails if a guess that fell fails its image: off would have drawn it without an error."""
    for right_share, failed in ((0.0, False), (1.0, True)):
        engine, runner = fake_engine(EngineConfig(2, page_size=4, lookahead=4), tokens=16)
        runner.right_share = right_share
        request = engine.submit(1, SamplingParams(top_k=0, seed=6))
        runner.fails = {(6, 0, 2)}
        engine.step()
        if not failed:
            runner.fails = set()  # it was computed at position 0 and did not hold
        while engine.wait_for_work(timeout=0):
            engine.step()
        assert (request.error is not None) == failed
