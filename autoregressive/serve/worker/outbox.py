"""Messages that wait to be sent to another process, and the thread that sends an engine's.

An engine's loop never waits for a reader, which may be slow or stopped.
"""

import itertools
import socket
import threading
from typing import Any

from autoregressive.serve.worker.messages import encode

_MOST_MESSAGES = 16  # in a frame
_ENOUGH_BYTES = 2**20  # of pictures or codes in a frame: nothing is added behind them
_FAR_BEHIND = 64  # with more waiting messages, only the newest of those that supersede each other


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
        # superseding key -> number of the newest waiting message that has it
        self._newest: dict[tuple[Any, ...], int] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Any) -> None:
        """Adds a message at the end."""
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
        """Takes the messages of one frame from the front; an empty list if no message waits."""
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
        """Drops all messages."""
        self.bytes = 0
        self._messages.clear()
        self._newest.clear()


class Outbox:
    """Messages that wait, and the thread that writes them to a connection until it is closed.

    The messages that are put while a frame is written go into the next frame. A reader that is far
    behind gets only the newest of the messages that supersede each other.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._waiting = Backlog()
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name=name, daemon=True)
        self._thread.start()

    def put(self, message: Any) -> None:
        """Queues a message; without effect once the reader has gone."""
        with self._changed:
            if self._thread.is_alive():
                self._waiting.put(message)
                self._changed.notify()

    def put_if_silent(self, message: Any) -> None:
        """Queues a message unless others wait, which show as well that this process lives."""
        with self._changed:
            if not self._waiting:
                self.put(message)

    def close(self, timeout: float) -> None:
        """Waits until the queued messages are written, at most `timeout` seconds."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(timeout)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                batch = self._waiting.next_batch()
            if not batch:
                return
            try:
                self._connection.sendall(encode(batch))
            except OSError:  # the reader has gone, so the rest need not be sent either
                return


def _bytes_of(message: Any) -> int:
    """The size of the pixels, codes or text that a message holds."""
    return sum(len(value) for value in vars(message).values() if isinstance(value, bytes))


def _superseding_key(message: Any) -> tuple[Any, ...] | None:
    """A newer message with the same key supersedes an older one. None: it supersedes nothing."""
    fields = getattr(message, "SUPERSEDES", None)
    if fields is None:
        return None
    return (type(message), *(getattr(message, field) for field in fields))
