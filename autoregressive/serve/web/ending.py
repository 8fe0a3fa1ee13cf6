"""When the service ends, and with what status: accepted work first; told twice, at once; with
status 1 if an engine is lost.
"""

import logging
from collections.abc import Callable

from autoregressive.serve.web.dispatcher import Dispatcher

_log = logging.getLogger("llamagen.service")
_LAST_ANSWERS_SECONDS = (
    3.0  # after an engine is lost: for waiting clients to get their errors, and probes a 503
)


class Ending:
    """Looked at again and again by whoever runs the service.

    Attributes:
        status: that the process is to end with.
        at_once: without waiting for anything any more.
        hurry: called when that comes true.

    Args:
        announce: tells people, who may wait at a terminal.
    """

    def __init__(self, dispatcher: Dispatcher, announce: Callable[[str], None]) -> None:
        self.status = 0
        self.at_once = False
        self.hurry: Callable[[], None] = lambda: None
        self._dispatcher, self._announce = dispatcher, announce
        self._lost_at: float | None = None

    def signal(self) -> None:
        """The first drains. The second ends the service with status 1, for clients may still wait
        for answers.
        """
        if not self._dispatcher.draining:
            self._dispatcher.drain()
            self._say(self._waits_for())
            return
        self.status = 1
        self.at_once = True
        self._say("told again: the service ends now")
        self.hurry()

    def _waits_for(self) -> str:
        count, seconds = self._dispatcher.unfinished, self._dispatcher.patience.shutdown
        if count == 0:
            return "the service is stopping"
        requests = "1 request is" if count == 1 else f"{count} requests are"
        return (
            f"the service is stopping: {requests} being finished, for {seconds:g} s at most; "
            "Ctrl-C or SIGTERM again ends it now"
        )

    def _say(self, message: str) -> None:
        self._announce(message)
        _log.info(message)

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
