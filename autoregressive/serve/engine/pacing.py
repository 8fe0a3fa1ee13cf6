"""How long a span may be, and how far the host may run ahead of the device.

A request to cancel waits for the spans that are already on the device, so all spans in flight
together are at most 16 steps or 0.25 s, whichever is less. Durations are measured behind spans that
have ended; nothing waits in the middle of one.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch

_CANCEL_STEPS = 16
_CANCEL_SECONDS = 0.25


class Moment:
    """The device has done all that it was given: a GPU's event; on a CPU, where calls return when
    they are done, the time.
    """

    def __init__(self, device: torch.device) -> None:
        self._host_seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record()

    def wait(self) -> None:
        """Until it has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_until(self, later: "Moment") -> float:
        """By the device's clock; both have come."""
        if self._event is not None and later._event is not None:
            return self._event.elapsed_time(later._event) / 1000
        return later._host_seconds - self._host_seconds


@dataclass(frozen=True)
class _Span:
    begun: Moment
    ended: Moment
    steps: int
    rows: int


class Pacer:
    """Measures spans on the current stream of a device. On a GPU two spans are in flight, so that
    it never waits for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most_in_flight = 2 if device.type == "cuda" else 1
        self._most_steps = _CANCEL_STEPS // self._most_in_flight
        self._most_seconds = _CANCEL_SECONDS / self._most_in_flight
        self._in_flight: deque[_Span] = deque()
        self._measured: tuple[float, int] | None = None  # seconds of a step, and its rows

    def span_limit(self, rows: int) -> int:
        """Steps that the next span may have; 1 while no step has been measured."""
        if self._measured is None:
            return 1
        seconds, measured_rows = self._measured
        # A step's time grows at most in proportion to its rows, so a batch that has just grown is
        # not underestimated.
        seconds *= max(1.0, rows / measured_rows)
        return max(1, min(self._most_steps, int(self._most_seconds / max(seconds, 1e-9))))

    def begin(self) -> Moment:
        """Comes before a span is enqueued; what it returns is for `end`."""
        return Moment(self._device)

    def end(self, begun: Moment, steps: int, rows: int) -> None:
        """Comes after a span is enqueued; on a GPU it waits until the one before has ended."""
        self._in_flight.append(_Span(begun, Moment(self._device), steps, rows))
        if len(self._in_flight) == self._most_in_flight:
            span = self._in_flight.popleft()
            span.ended.wait()
            self._measured = (span.begun.seconds_until(span.ended) / span.steps, span.rows)
