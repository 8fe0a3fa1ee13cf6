"""What the host learns of positions that only the device knows exactly.

A small copy of the slots' lengths follows every span. When it arrives, more spans may be on the
device already. So the copy bounds the position of an image: each pass since then has kept a token
at least, and a window's worth at most, up to the limit.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.request import ImageState


@dataclass(frozen=True)
class _Span:
    passes: int
    window: int
    limits: dict[ImageState, int]  # of the images that ran
    # int32 [slots], as they are when the span has ended; None: they are known without a copy
    lengths: DeviceFuture[Tensor] | None

    @property
    def has_arrived(self) -> bool:
        return self.lengths is not None and self.lengths.ready()


@dataclass(frozen=True)
class Arrival:
    """What a copy has told."""

    # by image that ran: the least and the most that its position may be, after all spans that the
    # device was given
    bounds: dict[ImageState, tuple[int, int]]
    # What spans up to the copy have brought: their window, their passes over all images, and the
    # tokens that these kept. Images that their limits have held back are not counted. None if
    # there is nothing to count, or the windows differed.
    kept: tuple[int, int, int] | None


class SpanLog:
    """The spans behind the newest copy of lengths that has arrived. Only the engine's thread uses
    it.
    """

    def __init__(self) -> None:
        self._spans: deque[_Span] = deque()
        self._lengths: dict[ImageState, int] = {}  # where the spans in `_spans` began

    def note(
        self,
        images: Sequence[ImageState],
        passes: int,
        window: int,
        fetch_lengths: Callable[[], DeviceFuture[Tensor]],
    ) -> None:
        """Notes a span that was given to the device, before the scheduler counts its passes.

        Where every image is at its limit behind the span, positions are known and nothing is
        copied. Earlier spans with guesses stay, because what they kept is not known yet: a trial of
        two positions a pass may be followed by a token a pass up to the very limit.

        Args:
            images: those that run, with their limits for the span.
            fetch_lengths: begins to copy the lengths, as they are behind the span.
        """
        limits = {image: image.limit for image in images}
        known = all(image.position + passes == image.limit for image in images)
        guesses = any(span.window > 1 and span.lengths is not None for span in self._spans)
        if known and not guesses:
            self._spans.clear()
            self._lengths = limits
        else:
            lengths = None if known else fetch_lengths()
            self._spans.append(_Span(passes, window, limits, lengths))

    def clear(self) -> None:
        """Drops all spans, because their images run no more."""
        self._spans.clear()

    def take(self) -> Arrival | None:
        """What the newest copy that has arrived tells; None if none has since the last call. Never
        waits.

        Raises:
            RuntimeError: the device has failed; the log is empty then.
        """
        spans = [*self._spans]
        self._spans.clear()
        newest = next(
            (index for index in reversed(range(len(spans))) if spans[index].has_arrived), None
        )
        if newest is None:
            self._spans.extend(spans)
            return None
        past, later = spans[: newest + 1], spans[newest + 1 :]
        assert past[-1].lengths is not None
        of_slots = past[-1].lengths.result().tolist()
        lengths = {image: of_slots[image.slot] for image in past[-1].limits}
        kept = _kept(past, self._lengths, lengths)
        self._spans.extend(later)
        self._lengths = lengths
        return Arrival({image: _bounds(image, at, later) for image, at in lengths.items()}, kept)


def _bounds(image: ImageState, length: int, later: Sequence[_Span]) -> tuple[int, int]:
    """The bounds of an image's position behind spans that began with a known one."""
    least = most = length
    for span in later:
        limit = span.limits.get(image, length)  # an image that has ended is in no later span
        least = min(least + span.passes, limit)
        most = min(most + span.window * span.passes, limit)
    return least, most


def _kept(
    spans: Sequence[_Span], before: dict[ImageState, int], after: dict[ImageState, int]
) -> tuple[int, int, int] | None:
    """As in `Arrival`: spans, and the lengths of images before the first and after the last."""
    window = spans[-1].window
    if any(span.window != window for span in spans):
        return None
    all_passes = all_kept = 0
    for image, length in after.items():
        start = before.get(image, 0)
        passes = sum(span.passes for span in spans if image in span.limits)
        limit = spans[-1].limits[image]
        if length < limit or limit >= start + window * passes:
            all_passes += passes
            all_kept += length - start
    return (window, all_passes, all_kept) if all_passes else None
