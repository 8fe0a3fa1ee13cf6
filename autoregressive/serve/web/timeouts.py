"""How long the service waits, and for what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timeouts:
    """How long each of these may last, in seconds; None: without a limit."""

    queue: float | None = 300.0  # from acceptance to the start
    run: float | None = 600.0  # from the start to the end
    step: float = 60.0  # an engine whose loop has not been heard of for so long hangs
    shutdown: float = 60.0  # for accepted requests to finish, once the service is to end
