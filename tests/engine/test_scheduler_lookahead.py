"""How far images may run ahead, and what the scheduler makes of what the device tells."""

from unittest.mock import patch

import pytest
from test_scheduler import GUIDED, PLAIN, limits, run_span, submitted

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.request import ImageState, Request, RequestState
from autoregressive.serve.engine.scheduler import Scheduler


def staggered(num_pages: int, lead: int) -> tuple[Scheduler, ImageState, ImageState]:
    """Two images of four pages, of which the second starts so many passes after the first, because
    the pool holds no more.
    """
    scheduler = Scheduler(limits(num_pages=num_pages))
    first, second = submitted(scheduler, PLAIN, PLAIN)
    scheduler.admit()
    while second.state is RequestState.WAITING:
        run_span(scheduler, 1)
        scheduler.admit()
    assert (first.steps, second.steps) == (lead, 0)
    return scheduler, first.images[0], second.images[0]


def run_ahead(scheduler: Scheduler, passes: int, window: int) -> list[Request]:
    assert scheduler.plan_span(passes, window) == passes
    scheduler.allocate(passes, window)
    assert (scheduler.forecast <= scheduler.pool.num_pages).all()
    complete = scheduler.advance(passes)
    scheduler.audit()
    return complete


def learn(scheduler: Scheduler, bounds: dict[ImageState, tuple[int, int]]) -> list[Request]:
    complete = scheduler.learn(bounds)
    scheduler.audit()
    return complete


@pytest.mark.parametrize(
    ("num_pages", "lead", "window", "granted"),
    [
        (8, 0, 4, (8, 8)),  # of two passes
        (7, 4, 4, (12, 8)),
        (7, 4, 8, (12, 8)),  # half: all would be 4 + 4 pages
        (5, 12, 16, (16, 4)),  # a quarter: 4 + 1 pages; half of it would be 4 + 2
        (5, 12, 32, (13, 1)),  # none
    ],
)
def test_limits_go_as_far_as_the_pool(
    num_pages: int, lead: int, window: int, granted: tuple[int, int]
) -> None:
    """Fails if images may not run ahead where there is room, or may where there is none: the pool
    would run dry.
    """
    scheduler, first, second = staggered(num_pages, lead)
    passes = scheduler.plan_span(2, window)
    run_ahead(scheduler, passes, window)
    assert (first.limit, second.limit) == granted
    assert (first.position, second.position) == (lead + passes, passes)


def test_passes_behind_the_expected_end_are_not_planned() -> None:
    """Fails if an image that has probably ended is computed for many passes more, or the last
    passes of one that has not are planned one at a time.
    """
    scheduler = Scheduler(limits())  # 16 tokens
    submitted(scheduler, PLAIN)
    scheduler.admit()
    # two thirds of 4 passes, of 8, and of 16
    assert [scheduler.plan_span(100, 4, pace) for pace in (None, 2.0, 1.0)] == [3, 6, 11]
    run_ahead(scheduler, 2, 4)
    (image,) = scheduler.images
    assert (image.position, image.limit) == (2, 8)
    # At that pace 8, 12 and 14 tokens are missing.
    assert [scheduler.plan_span(100, 4, pace) for pace in (4.0, 2.0, 1.0)] == [2, 4, 10]
    run_ahead(scheduler, 2, 4)
    assert (image.position, image.limit) == (4, 16)
    assert scheduler.plan_span(100, 4) == 1  # until the device tells where it is
    assert scheduler.plan_span(100) == 1
    learn(scheduler, {image: (4, 7)})
    assert scheduler.plan_span(100, 4) == 2
    assert scheduler.plan_span(100) == 9


def test_limits_come_down_to_what_the_device_tells() -> None:
    """Fails if pages that an image cannot have come to stay with it."""
    scheduler = Scheduler(limits())
    submitted(scheduler, GUIDED)
    scheduler.admit()
    (image,) = scheduler.images
    run_ahead(scheduler, 2, 8)
    assert (image.limit, scheduler.pool.used_pages) == (16, 8)
    assert learn(scheduler, {image: (3, 7)}) == []
    assert (image.position, image.limit, scheduler.pool.used_pages) == (3, 7, 4)


def test_what_the_device_has_ended_leaves_at_once() -> None:
    """Fails if an image that is complete, or an unconditional row whose interval is over, stays in
    the batch until its passes are counted.
    """
    scheduler = Scheduler(limits())
    (request,) = submitted(scheduler, SamplingParams(cfg_interval=3, n=2))
    scheduler.admit()
    first, second = scheduler.images
    run_ahead(scheduler, 2, 8)
    scheduler.take_changed()
    assert learn(scheduler, {first: (16, 16), second: (5, 9)}) == []
    assert scheduler.take_changed()
    assert scheduler.images == [second]
    assert (len(second.rows), scheduler.num_rows, scheduler.pool.used_pages) == (1, 1, 3)
    assert (request.steps, request.tokens) == (5, 21)
    run_ahead(scheduler, 1, 8)
    assert learn(scheduler, {second: (16, 16)}) == [request]
    assert (scheduler.running, scheduler.pool.used_pages) == ([], 0)
    assert request.slots == [first.slot, second.slot]
    assert not set(request.slots) & set(scheduler.free_slots)


def test_an_image_that_runs_into_anothers_pages_is_held_back() -> None:
    """Fails if an image is noted to be where its pages are not there in time: the pool would run
    dry. Or if it stays held back when the other one is further on, too.
    """
    scheduler, first, second = staggered(7, 4)
    run_ahead(scheduler, 1, 4)
    assert (first.limit, second.limit) == (8, 4)
    learn(scheduler, {first: (5, 5), second: (4, 4)})  # the last page of both at once would be 8
    assert (second.position, second.limit) == (1, 4)
    run_ahead(scheduler, 1, 4)
    learn(scheduler, {first: (8, 8), second: (4, 4)})
    assert (first.position, second.position, second.limit) == (8, 4, 4)


def test_a_complete_image_is_not_held_back() -> None:
    """Fails if an image stays for passes that it does not need, because another one is held
    back.
    """
    scheduler = Scheduler(limits())
    ending, _ = submitted(scheduler, PLAIN, PLAIN)
    scheduler.admit()
    first, second = scheduler.images
    run_ahead(scheduler, 1, 16)
    with patch.object(scheduler, "_is_as_good", return_value=False):
        assert learn(scheduler, {first: (16, 16), second: (4, 9)}) == [ending]
    assert (second.position, second.limit) == (1, 9)


def test_a_cancel_takes_granted_pages_along() -> None:
    """Fails if pages that were granted ahead stay taken, or in the forecast."""
    scheduler = Scheduler(limits())
    gone, staying = submitted(scheduler, GUIDED, GUIDED)
    scheduler.admit()
    run_ahead(scheduler, 1, 8)
    assert scheduler.pool.used_pages == 8
    assert scheduler.cancel(gone)
    scheduler.audit()
    assert scheduler.pool.used_pages == 4
    assert learn(scheduler, {staying.images[0]: (1, 1)}) == []
