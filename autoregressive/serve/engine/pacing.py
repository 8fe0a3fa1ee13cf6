"""How long a span may be, and how far the host may run ahead of the device.

A request to cancel waits for the spans that are already on the device, so all spans in flight together are at most 16 steps or
0.25 s, whichever is less. Durations are measured behind spans that have ended; nothing waits in the middle of one.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch

_CANCEL_STEPS = 16
_CANCEL_SECONDS = 0.25


@dataclass(frozen=True)
class _Span:
    begun: torch.cuda.Event
    ended: torch.cuda.Event
    steps: int
    rows: int


class Pacer:
    """Measures spans on the current stream of a device. On a GPU two spans are in flight, so that it never waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        spans_in_flight = 2 if self._is_cuda else 1
        self._most_steps = _CANCEL_STEPS // spans_in_flight
        self._most_seconds = _CANCEL_SECONDS / spans_in_flight
        self._in_flight: deque[_Span] = deque()
        self._begun: torch.cuda.Event | float = 0.0
        self._measured: tuple[float, int] | None = None  # seconds of a step, and its rows

    def span_limit(self, rows: int) -> int:
        """Steps that the next span may have; 1 while no step has been measured."""
        if self._measured is None:
            return 1
        seconds, measured_rows = self._measured
        # A step's time grows at most in proportion to its rows, so a batch that has just grown is not underestimated.
        seconds *= max(1.0, rows / measured_rows)
        return max(1, min(self._most_steps, int(self._most_seconds / max(seconds, 1e-9))))

    def begin(self) -> None:
        """Comes before a span is enqueued."""
        self._begun = _recorded_event() if self._is_cuda else time.perf_counter()

    def end(self, steps: int, rows: int) -> None:
        """Comes after a span is enqueued; waits until the one before it has ended."""
        if isinstance(self._begun, float):
            self._measured = ((time.perf_counter() - self._begun) / steps, rows)
            return
        self._in_flight.append(_Span(self._begun, _recorded_event(), steps, rows))
        if len(self._in_flight) > 1:
            span = self._in_flight.popleft()
            span.ended.synchronize()
            self._measured = (span.begun.elapsed_time(span.ended) / 1000 / span.steps, span.rows)


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event
