"""Messages that wait to be sent to another process, which may be slow or stopped."""

import itertools
from typing import Any

_MOST_MESSAGES = 16  # in a frame
_ENOUGH_BYTES = 2**20  # of pictures or codes in a frame: nothing is added behind them
_FAR_BEHIND = (
    64  # messages that wait: from then on, only the newest of those that supersede each other
)


def _bytes_of(message: Any) -> int:
    """Of pixels, codes or text that a message holds."""
    return sum(len(value) for value in vars(message).values() if isinstance(value, bytes))


class Backlog:
    """Messages that wait to be sent, in order.

    The other side may be stopped for as long as --step-timeout, while the engine goes on. Once more
    than 64 messages wait, a new message removes the one that it supersedes. What then waits is
    bounded by the work that was accepted.

    Attributes:
        bytes: of pixels, codes and text in these messages.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._messages: dict[int, Any] = {}
        self._newest: dict[
            tuple[Any, ...], int
        ] = {}  # of the waiting messages that may be superseded
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """How many."""
        return len(self._messages)

    def put(self, message: Any) -> None:
        """Adds one at the end."""
        number = next(self._numbers)
        self._messages[number] = message
        self.bytes += _bytes_of(message)
        if (key := _superseding_key(message)) is None:
            return
        older = self._newest.get(key)
        self._newest[key] = number
        if older is not None and len(self._messages) > _FAR_BEHIND:
            self.bytes -= _bytes_of(self._messages.pop(older))

    def next_batch(self) -> list[Any]:
        """Takes from the front what makes a frame; nothing if nothing waits."""
        batch: list[Any] = []
        size = 0
        while self._messages and len(batch) < _MOST_MESSAGES and size < _ENOUGH_BYTES:
            number = next(iter(self._messages))
            message = self._messages.pop(number)
            key = _superseding_key(message)
            if key is not None and self._newest[key] == number:
                del self._newest[key]
            batch.append(message)
            size += _bytes_of(message)
        self.bytes -= size
        return batch

    def clear(self) -> None:
        """Drops all."""
        self.bytes = 0
        self._messages.clear()
        self._newest.clear()


def _superseding_key(message: Any) -> tuple[Any, ...] | None:
    """What messages that supersede each other have in common; None: it supersedes nothing."""
    fields = getattr(message, "SUPERSEDES", None)
    return (
        None if fields is None else (type(message), *(getattr(message, field) for field in fields))
    )
