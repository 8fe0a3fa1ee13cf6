"""The service's end of the connection to one engine's process."""

import signal
import socket
import time
from collections.abc import Callable

from autoregressive.serve.web.awake import SILENT_SECONDS, AwakeClock
from autoregressive.serve.web.channel import Channel
from autoregressive.serve.web.jobs import Job
from autoregressive.serve.web.waiting_places import WaitingPlaces
from autoregressive.serve.worker.messages import (
    KINDS,
    Cancel,
    Drawn,
    Ended,
    Event,
    Heartbeat,
    Image,
    LoopStats,
    Preparing,
    Preview,
    Ready,
    Started,
    Stop,
    Unable,
)
from autoregressive.serve.worker.process import ChildProcess

_EXIT_SECONDS = 0.2  # from the end of the connection to the process's exit code


def _how_it_ended(exit_code: int | None) -> str:
    """A process's exit code, for people."""
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}" if exit_code is not None else "no exit status yet"


class EngineLink:
    """One engine: what is known of it, and the jobs that it has. Used in the event loop.

    Args:
        on_ended: called in the event loop with each job that has come to its end.
        places: of the service's queue; jobs with rows reserved do not take one.
        clock: which this event loop keeps.
    """

    def __init__(
        self,
        process: ChildProcess,
        connection: socket.socket,
        on_ended: Callable[[Job], None],
        places: WaitingPlaces,
        clock: AwakeClock,
    ) -> None:
        self.process = process
        self.ready: Ready | None = None
        self.prepared = (0, 0)  # how much, of how much
        self.unable: str | None = None  # why it could not be built, for the user
        self.lost: str | None = None  # why, once it has died or was given up
        self.jobs: dict[int, Job] = {}
        self.rows = 0  # that its jobs take, running or not
        self.used_pages = 0
        self._clock = clock
        self._heard_at = self._loop_heard_at = clock.now()
        self._on_ended, self._places = on_ended, places
        self._stopped = False
        self._channel = Channel(connection, KINDS, self._take, self._died)

    @property
    def silent(self) -> bool:
        """Whether nothing comes from the process, its heartbeat included; known of an engine that
        is built.
        """
        return self.ready is not None and self._clock.now() - self._heard_at > SILENT_SECONDS

    @property
    def loop_silent_seconds(self) -> float:
        """How long the engine's loop has not been heard of, once it runs: a step may take long, or
        hang.
        """
        return self._clock.now() - self._loop_heard_at if self.ready is not None else 0.0

    def submit(self, job: Job) -> None:
        """Gives it a job."""
        self.jobs[job.order.job] = job
        self.rows += job.rows
        if not job.reserved:
            self._places.take(job.order.client)
        self._channel.put(job.order)

    def cancel(self, job: Job) -> None:
        """Asks it to end a job early; the job stays until it says so."""
        self._channel.put(Cancel(job.order.job))

    def give_up(self, why: str) -> None:
        """Kills the process, and ends its jobs; without effect once it is lost or stopped."""
        if self.lost is not None or self._stopped:
            return
        self.lost = why
        self.process.kill()
        for job in list(self.jobs.values()):
            self._take(Ended(job.order.job, "engine_lost", time.monotonic()))

    def begin_to_stop(self) -> None:
        """Tells the process to end; it holds nothing that is still wanted.

        From now on nothing of it is read, for whoever waits for the process may hold up the loop.
        """
        self._stopped = True
        self._channel.put(Stop())
        self._channel.flush()
        self._channel.stop_reading()

    def stop(self, deadline: float) -> None:
        """Waits for the process, until that moment; then kills it."""
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._channel.close()

    def _died(self) -> None:
        """The connection has ended. Before the engine was ready, starting it anew would end in the
        same way.
        """
        if (
            self.ready is not None
            or self.unable is not None
            or self.lost is not None
            or self._stopped
        ):
            self.give_up("an engine's process has died")
            return
        self.process.join(_EXIT_SECONDS)
        self.unable = (
            "an engine's process died while it loaded the model "
            f"({_how_it_ended(self.process.exitcode)}); "
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
            case Unable(message=message):
                self.unable = message
            case LoopStats(used_pages=used_pages):
                self.used_pages = used_pages
            case Started() | Drawn() | Preview() | Image() | Ended():
                job = self.jobs.get(event.job)
                if job is None:
                    return
                waited = job.started_at is None
                job.take(event)
                if waited and not job.reserved and isinstance(event, (Started, Ended)):
                    self._places.give_back(job.order.client)
                if isinstance(event, Ended):
                    self.used_pages = (
                        self.used_pages if event.used_pages is None else event.used_pages
                    )
                    self.rows -= job.rows
                    del self.jobs[event.job]
                    self._on_ended(job)
