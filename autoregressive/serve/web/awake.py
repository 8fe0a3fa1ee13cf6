"""How long another process has been silent, as far as this one could have heard it."""

import time
from collections.abc import Callable

SILENT_SECONDS = (
    1.5  # a process that has not been heard of for so long is not well; within 2 s all others know
)
TICK_SECONDS = 0.1  # between two looks at an `AwakeClock`
_LONGEST_TICK_SECONDS = 0.5


class AwakeClock:
    """Seconds in which this process's event loop has gone round.

    If the process is stopped, or the machine is frozen, it has not read what others said meanwhile:
    that their messages are old says nothing about them. So of a long time between two looks only
    the first half of a second counts. Somebody has to look every `TICK_SECONDS`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        self._awake = 0.0

    def now(self) -> float:
        """Seconds since it was made; looks at the clock."""
        before, self._looked_at = self._looked_at, self._clock()
        self._awake += min(self._looked_at - before, _LONGEST_TICK_SECONDS)
        return self._awake
