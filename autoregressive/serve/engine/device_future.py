"""What the device has been given to do and has not done yet: moments of its work, results, and how
much that may be.

Nothing here waits but `DeviceEvent.synchronize`, `DeviceFuture.result` and `StepLimiter.end`.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

_CANCEL_STEPS = 16
_CANCEL_SECONDS = 0.25
T = TypeVar("T")
U = TypeVar("U")


class DeviceEvent:
    """The moment at which a device has done all that its current stream was given so far.

    On a GPU this is a CUDA event. On a CPU, where calls return when they are done, it is now.

    Args:
        timed: for `seconds_until`.
    """

    def __init__(self, device: torch.device, *, timed: bool = False) -> None:
        self._host_seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=timed, blocking=True)
            self._event.record(torch.cuda.current_stream(device))

    def ready(self) -> bool:
        """Whether the moment has come."""
        return self._event is None or self._event.query()

    def synchronize(self) -> None:
        """Waits until the moment has come."""
        if self._event is not None:
            self._event.synchronize()

    def hold_back(self, tensor: Tensor) -> Tensor:
        """Lets the current stream wait for the moment before it uses a tensor of another stream.
        The host does not wait.
        """
        if self._event is not None:
            current = torch.cuda.current_stream(tensor.device)
            current.wait_event(self._event)
            # its memory, the other stream's, must not be reused while this one reads
            tensor.record_stream(current)
        return tensor

    def seconds_until(self, later: "DeviceEvent") -> float:
        """Seconds between two moments that have come, by the device's clock."""
        if self._event is not None and later._event is not None:
            return self._event.elapsed_time(later._event) / 1000
        return later._host_seconds - self._host_seconds


@dataclass(frozen=True)
class DeviceFuture(Generic[T]):
    """A result that the device is still working on, or copying to the host."""

    ready: Callable[[], bool]  # whether `result` would return at once; never waits
    # The host waits for a result on the host; for one on the device, the current stream does.
    # Raises RuntimeError if the device has failed: its errors may show only here.
    result: Callable[[], T]

    @classmethod
    def done(cls, value: T) -> "DeviceFuture[T]":
        """A result that is there already."""
        return cls(lambda: True, lambda: value)

    def then(self, function: Callable[[T], U]) -> "DeviceFuture[U]":
        """What the function makes of the result, when it is asked for."""
        return DeviceFuture(self.ready, lambda: function(self.result()))


def copy_to_host(*tensors: Tensor) -> DeviceFuture[tuple[Tensor, ...]]:
    """Begins to copy tensors of one device to the host, behind all that the current stream was
    given.
    """
    # Copies to pinned memory do not wait; the device's side of them lives on until its stream has
    # passed.
    copies = tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(
            tensor, non_blocking=True
        )
        for tensor in tensors
    )
    event = DeviceEvent(tensors[0].device)

    def result() -> tuple[Tensor, ...]:
        event.synchronize()
        return copies

    return DeviceFuture(event.ready, result)


@dataclass(frozen=True)
class _Span:
    begun: DeviceEvent
    ended: DeviceEvent
    steps: int
    rows: int
    window: int


@dataclass(frozen=True)
class StepTime:
    """How long a step has taken."""

    seconds: float
    rows: int
    window: int  # positions of each row


class StepLimiter:
    """How long a span may be, and how far the host may run ahead of the device.

    A request to cancel waits for the spans that are already on the device. So all spans in flight
    together are at most 16 steps or 0.25 s, whichever is less. On a GPU two spans are in flight, so
    that the GPU never waits for the host. A span is measured on the current stream of the device,
    when it has ended; nothing waits in the middle of one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most_in_flight = 2 if device.type == "cuda" else 1
        self._most_steps = _CANCEL_STEPS // self._most_in_flight
        self._most_seconds = _CANCEL_SECONDS / self._most_in_flight
        self._in_flight: deque[_Span] = deque()
        self._measured: StepTime | None = None

    def span_limit(self, rows: int, window: int = 1) -> int:
        """Steps that the next span may have; 1 while no step has been measured."""
        if self._measured is None:
            return 1
        # A step's time grows at most in proportion to its positions, so a batch that has just grown
        # is not underestimated.
        measured_positions = self._measured.rows * self._measured.window
        seconds = self._measured.seconds * max(1.0, rows * window / measured_positions)
        return max(1, min(self._most_steps, int(self._most_seconds / max(seconds, 1e-9))))

    def begin(self) -> DeviceEvent:
        """To be called before a span is enqueued. Returns what `end` takes."""
        return DeviceEvent(self._device, timed=True)

    def end(self, begun: DeviceEvent, steps: int, rows: int, window: int = 1) -> StepTime | None:
        """To be called after a span is enqueued. On a GPU it waits until the span before has
        ended. Returns how long a step of the span that has ended has taken.
        """
        ended = DeviceEvent(self._device, timed=True)
        self._in_flight.append(_Span(begun, ended, steps, rows, window))
        if len(self._in_flight) < self._most_in_flight:
            return None
        span = self._in_flight.popleft()
        span.ended.synchronize()
        seconds = span.begun.seconds_until(span.ended) / span.steps
        self._measured = StepTime(seconds, span.rows, span.window)
        return self._measured
