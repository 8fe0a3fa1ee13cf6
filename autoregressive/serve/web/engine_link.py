"""The service's end of the connection to one engine's process."""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable

from autoregressive.serve.web.channel import SILENT_SECONDS, AwakeClock, Channel
from autoregressive.serve.web.clients import WaitingPlaces
from autoregressive.serve.web.served_request import ServedRequest
from autoregressive.serve.worker.messages import (
    KINDS,
    Cancel,
    Ended,
    Event,
    Heartbeat,
    Image,
    LoopStats,
    Preparing,
    Preview,
    Progress,
    Ready,
    Started,
    StartFailed,
    Stop,
)
from autoregressive.serve.worker.process import ChildProcess

_EXIT_SECONDS = 0.2  # from the end of the connection to the process's exit code


def _how_it_ended(exit_code: int | None) -> str:
    """A process's exit code, for people."""
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}" if exit_code is not None else "no exit status yet"


class EngineLink:
    """One engine: what is known of it, and the requests that it has. Used in the event loop.

    Args:
        on_ended: called in the event loop with each request that has come to its end.
        places: of the service's queue; requests with rows reserved do not take one.
        clock: which this event loop keeps.
    """

    def __init__(
        self,
        process: ChildProcess,
        connection: socket.socket,
        on_ended: Callable[[ServedRequest], None],
        places: WaitingPlaces,
        clock: AwakeClock,
    ) -> None:
        self.process = process
        self.ready: Ready | None = None
        self.prepared = (0, 0)  # how much, of how much
        self.start_failure: str | None = None  # why it could not be built, for the user
        self.lost: str | None = None  # why, once it has died or was given up
        self.requests: dict[int, ServedRequest] = {}
        self.rows = 0  # that its requests take, running or not
        self.used_pages = 0
        self._clock = clock
        self._heard_at = self._loop_heard_at = clock.now()
        self._on_ended, self._places = on_ended, places
        self._stopped = False
        self._channel = Channel(connection, KINDS, self._take, self._died)

    @property
    def silent(self) -> bool:
        """Whether a built engine's process sends nothing, not even its heartbeat."""
        return self.ready is not None and self._clock.now() - self._heard_at > SILENT_SECONDS

    @property
    def loop_silent_seconds(self) -> float:
        """How long the engine's loop has not been heard of, once it runs: a step may take long, or
        hang.
        """
        return self._clock.now() - self._loop_heard_at if self.ready is not None else 0.0

    def submit(self, served: ServedRequest) -> None:
        """Gives it a request."""
        self.requests[served.request_id] = served
        self.rows += served.rows
        if not served.reserved:
            self._places.take(served.request.client)
        self._channel.put(served.request)

    def cancel(self, served: ServedRequest) -> None:
        """Asks it to end a request early; the request stays until the engine says so."""
        self._channel.put(Cancel(served.request_id))

    def give_up(self, why: str) -> None:
        """Kills the process, and ends its requests; without effect once it is lost or stopped."""
        if self.lost is not None or self._stopped:
            return
        self.lost = why
        self.process.kill()
        for request_id in list(self.requests):
            self._take(Ended(request_id, "engine_lost", time.monotonic()))

    def begin_to_stop(self) -> None:
        """Tells the process to end; its results are not wanted any more.

        From now on its messages are dropped, because waiting for the process may hold up the loop.
        """
        self._stopped = True
        self._channel.put(Stop())
        self._channel.flush()
        self._channel.stop_reading()

    def stop(self, deadline: float) -> None:
        """Waits for the process until that moment; then kills it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        self.process.kill()
        self.process.wait()
        self._channel.close()

    def _died(self) -> None:
        """The connection has ended. An engine that was not ready yet would end in the same way
        again.
        """
        if self.ready or self.start_failure or self.lost or self._stopped:
            self.give_up("an engine's process has died")
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_SECONDS)
        self.start_failure = (
            "an engine's process died while it loaded the model "
            f"({_how_it_ended(self.process.poll())}); "
            "check the checkpoints and the memory, and what it wrote before"
        )

    def _take(self, event: Event) -> None:
        self._heard_at = self._clock.now()
        if not isinstance(event, Heartbeat):
            self._loop_heard_at = self._heard_at
        match event:
            case Heartbeat():
                pass
            case Preparing(done=done, total=total):
                self.prepared = (done, total)
            case Ready():
                self.ready = event
            case StartFailed(message=message):
                self.start_failure = message
            case LoopStats(used_pages=used_pages):
                self.used_pages = used_pages
            case Started() | Progress() | Preview() | Image() | Ended():
                served = self.requests.get(event.request_id)
                if served is None:
                    return
                waited = served.started_at is None
                served.take(event)
                if waited and not served.reserved and isinstance(event, (Started, Ended)):
                    self._places.give_back(served.request.client)
                if isinstance(event, Ended):
                    if event.used_pages is not None:
                        self.used_pages = event.used_pages
                    self.rows -= served.rows
                    del self.requests[event.request_id]
                    self._on_ended(served)
