"""When the service ends, and with what status: accepted work first; told twice, at once; with status 1 if an engine is lost."""

from collections.abc import Callable

from autoregressive.serve.web.dispatcher import Dispatcher

_LAST_ANSWERS_SECONDS = 3.0  # after an engine is lost: for waiting clients to get their errors, and probes a 503


class Ending:
    """Looked at again and again by whoever runs the service.

    Attributes:
        status: that the process is to end with.
        at_once: without waiting for anything any more.
        hurry: called when that comes true.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.status = 0
        self.at_once = False
        self.hurry: Callable[[], None] = lambda: None
        self._dispatcher = dispatcher
        self._lost_at: float | None = None

    def signal(self) -> None:
        """The first drains, the second ends."""
        if not self._dispatcher.draining:
            self._dispatcher.drain()
            return
        self.status = 0 if self._dispatcher.idle else 1
        self.at_once = True
        self.hurry()

    def due(self, now: float) -> bool:
        """Whether to end, at that moment."""
        dispatcher = self._dispatcher
        if dispatcher.unable is not None:
            self.status = 2
            return True
        if dispatcher.failure is not None:
            self.status = 1
            self._lost_at = self._lost_at or now
            if now - self._lost_at > _LAST_ANSWERS_SECONDS:
                return True
        if dispatcher.draining and dispatcher.overdue(now):
            self.status = 1
            return True
        return self.at_once or (dispatcher.draining and dispatcher.idle)
