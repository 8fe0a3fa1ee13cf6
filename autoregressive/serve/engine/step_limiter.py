"""How long a span may be, and how far the host may run ahead of the device.

A request to cancel waits for the spans that are already on the device. So all spans in flight
together are at most 16 steps or 0.25 s, whichever is less. A span is measured when it has ended;
nothing waits in the middle of one.
"""

from collections import deque
from dataclasses import dataclass

import torch

from autoregressive.serve.engine.device_future import DeviceEvent

_CANCEL_STEPS = 16
_CANCEL_SECONDS = 0.25


@dataclass(frozen=True)
class _Span:
    begun: DeviceEvent
    ended: DeviceEvent
    steps: int
    rows: int


class StepLimiter:
    """Measures spans on the current stream of a device. On a GPU two spans are in flight, so that
    the GPU never waits for the host.
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

    def begin(self) -> DeviceEvent:
        """To be called before a span is enqueued. Returns what `end` takes."""
        return DeviceEvent(self._device, timed=True)

    def end(self, begun: DeviceEvent, steps: int, rows: int) -> None:
        """To be called after a span is enqueued. On a GPU it waits until the span before has
        ended.
        """
        self._in_flight.append(_Span(begun, DeviceEvent(self._device, timed=True), steps, rows))
        if len(self._in_flight) == self._most_in_flight:
            span = self._in_flight.popleft()
            span.ended.synchronize()
            self._measured = (span.begun.seconds_until(span.ended) / span.steps, span.rows)
