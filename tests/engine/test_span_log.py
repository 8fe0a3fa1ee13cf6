"""What the host makes of copies of lengths that arrive late."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.request import ImageState
from autoregressive.serve.engine.span_log import SpanLog


def image(slot: int, position: int = 0, limit: int = 0) -> ImageState:
    return ImageState(SamplingParams(), 0, slot, position=position, limit=limit)


@dataclass
class Copy:
    """A copy of lengths that arrives when it is told to."""

    lengths: list[int]
    arrived: bool = False
    reads: list[Tensor] = field(default_factory=list)

    def fetch(self) -> DeviceFuture[Tensor]:
        return DeviceFuture(lambda: self.arrived, self._result)

    def _result(self) -> Tensor:
        assert self.arrived, "the host would wait"
        return torch.tensor(self.lengths, dtype=torch.int32)


def note(log: SpanLog, images: list[ImageState], passes: int, window: int, copy: Copy) -> None:
    """Notes a span, and counts its passes as the scheduler does."""
    log.note(images, passes, window, copy.fetch)
    for one in images:
        one.position += passes


def note_known(log: SpanLog, one: ImageState, passes: int, window: int) -> None:
    """Notes a span that takes an image to its limit at any rate."""

    def no_copy() -> DeviceFuture[Tensor]:
        raise AssertionError("positions are known")

    log.note([one], passes, window, no_copy)
    one.position += passes


def test_a_copy_bounds_positions_behind_later_spans() -> None:
    """Fails if passes since the copy are not counted, counted as if all their guesses held, or
    counted beyond a limit.
    """
    first, second = image(slot=2, limit=16), image(slot=0, limit=16)
    log, copies = SpanLog(), [Copy([9, -7, 5]), Copy([]), Copy([])]
    note(log, [first, second], 4, 4, copies[0])
    first.limit, second.limit = 24, 17
    note(log, [first, second], 2, 4, copies[1])
    first.limit, second.limit = 30, 18
    note(log, [first, second], 3, 2, copies[2])
    assert log.take() is None
    copies[0].arrived = True
    arrival = log.take()
    assert arrival is not None
    assert arrival.bounds == {first: (5 + 2 + 3, 5 + 8 + 6), second: (9 + 2 + 3, 18)}
    assert log.take() is None, "a copy tells the same twice"


def test_the_newest_copy_counts() -> None:
    """Fails if the host reads copies that a newer one has made useless, or goes back to one."""
    one = image(slot=0, limit=8)
    log, copies = SpanLog(), [Copy([3]), Copy([6]), Copy([9])]
    for number, copy in enumerate(copies):
        one.limit = 8 * (number + 1)
        note(log, [one], 2, 4, copy)
    copies[0].arrived = copies[1].arrived = True
    arrival = log.take()
    assert arrival is not None
    assert arrival.bounds == {one: (8, 14)}
    copies[2].arrived = True
    arrival = log.take()
    assert arrival is not None
    assert arrival.bounds == {one: (9, 9)}


def test_nothing_is_copied_where_nothing_can_be_learned() -> None:
    """Fails if a token a pass costs a copy, or spans whose positions are known pile up."""
    one, log = image(slot=0, limit=8), SpanLog()
    note(log, [one], 2, 1, Copy([]))
    for limit in range(8, 100):  # the spans that take it to its limit at any rate
        one.limit = limit
        note_known(log, one, one.limit - one.position, 1 + limit % 2)
    assert log.take() is None
    assert not log._spans


def test_what_a_trial_kept_is_told_after_a_span_to_the_limit() -> None:
    """Fails if auto never hears of its trials of two positions: the next span, of a token a pass,
    ends at the limit that the trial was granted.
    """
    one, log, copy = image(slot=0, limit=16), SpanLog(), Copy([11])
    note(log, [one], 8, 2, copy)
    note_known(log, one, 8, 1)
    assert log.take() is None
    copy.arrived = True
    arrival = log.take()
    assert arrival is not None
    assert arrival.kept == (2, 8, 11)
    assert arrival.bounds == {one: (16, 16)}
    one.limit = 24
    note_known(log, one, 8, 1)
    one.limit = 26
    last = Copy([25], arrived=True)
    note(log, [one], 1, 2, last)
    arrival = log.take()
    assert arrival is not None
    assert (arrival.bounds, arrival.kept) == ({one: (25, 25)}, (2, 1, 1))


def test_a_newcomer_in_a_slot_is_not_taken_for_the_one_before() -> None:
    """Fails if the length of a cancelled image is taken for that of the next one in its slot."""
    gone, staying = image(slot=1, limit=8), image(slot=0, limit=8)
    log, copies = SpanLog(), [Copy([4, 7]), Copy([6, 1])]
    note(log, [gone, staying], 2, 4, copies[0])
    newcomer = image(slot=1, limit=4)
    staying.limit = 12
    note(log, [staying, newcomer], 1, 4, copies[1])
    copies[0].arrived = True
    arrival = log.take()
    assert arrival is not None
    assert newcomer not in arrival.bounds
    assert arrival.bounds[staying] == (5, 8)
    copies[1].arrived = True
    arrival = log.take()
    assert arrival is not None
    assert arrival.bounds == {staying: (6, 6), newcomer: (1, 1)}


def test_what_windows_bring_is_counted() -> None:
    """Fails if tokens are counted twice or for the wrong passes, if images that were held back
    count, or spans of two windows as one.
    """
    first, second = image(slot=0, limit=16), image(slot=1, limit=16)
    log = SpanLog()

    def kept(
        images: list[ImageState], passes: int, window: int, lengths: list[int]
    ) -> tuple[int, int, int] | None:
        copy = Copy(lengths, arrived=True)
        note(log, images, passes, window, copy)
        arrival = log.take()
        assert arrival is not None
        return arrival.kept

    assert kept([first, second], 4, 4, [7, 5]) == (4, 8, 12)
    second.limit = 12
    assert kept([first, second], 2, 4, [9, 12]) == (4, 2, 2)  # the second came to its limit
    first.limit = 12
    assert kept([first], 1, 4, [10]) == (4, 1, 1)  # and the first did not come to such a one
    first.limit = 16
    note(log, [first], 1, 4, Copy([12]))
    assert kept([first], 1, 2, [13]) is None
    third = image(slot=1, limit=16)
    assert kept([first, third], 1, 2, [15, 2]) == (2, 2, 4)


def test_a_copy_that_fails_is_asked_once() -> None:
    """Fails if requests that come later are told of the same failure again."""
    one, log = image(slot=0, limit=8), SpanLog()

    def broken() -> bool:
        raise RuntimeError("an illegal address")

    log.note([one], 2, 4, lambda: DeviceFuture(broken, lambda: torch.zeros(1)))
    try:
        log.take()
    except RuntimeError:
        assert log.take() is None
    else:
        raise AssertionError("the failure is not told")
