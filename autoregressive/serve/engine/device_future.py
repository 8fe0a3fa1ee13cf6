"""What the device has been given to do and has not done yet: moments of its work, and results.

Nothing here waits but `DeviceEvent.synchronize` and `DeviceFuture.result`.
"""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

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


class DeviceFuture(Generic[T]):
    """A result that the device is still working on, or copying to the host.

    Args:
        ready: whether `result` would return at once.
        result: waits where it has to.
    """

    def __init__(self, ready: Callable[[], bool], result: Callable[[], T]) -> None:
        self._ready, self._result = ready, result

    @classmethod
    def done(cls, value: T) -> "DeviceFuture[T]":
        """A result that is there already."""
        return cls(lambda: True, lambda: value)

    def ready(self) -> bool:
        """Whether `result` would return at once. Never waits."""
        return self._ready()

    def result(self) -> T:
        """The result. The host waits for what lies on the host. For what lies on the device, the
        current stream does.

        Raises:
            RuntimeError: the device has failed; its errors may show only here.
        """
        return self._result()

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
