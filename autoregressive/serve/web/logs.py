"""What a request's answer and its line in the log have in common; a warning instead of
many lines.
"""

import asyncio
import logging
import secrets

REQUESTS = "llamagen.requests"  # the logger that writes a line a request


def new_request_id() -> str:
    """The number of a request, for its answer and its line in the log."""
    return f"req_{secrets.token_hex(12)}"


class CountedWarning:
    """A warning a second, which says how often something has happened; used in one event loop.

    Args:
        field: the name of the count.
    """

    def __init__(self, log: logging.Logger, message: str, field: str, seconds: float = 1.0) -> None:
        self._log, self._message, self._field, self._seconds = log, message, field, seconds
        self._count = 0

    def count(self) -> None:
        """It has happened once more."""
        self._count += 1
        if self._count == 1:
            asyncio.get_running_loop().call_later(self._seconds, self._write)

    def _write(self) -> None:
        count, self._count = self._count, 0
        self._log.warning(self._message, extra={"fields": {self._field: count}})
