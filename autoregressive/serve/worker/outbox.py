"""Sends messages from a thread of its own: whoever has something to say never waits for whoever is to read it.

What has come together while the last frame was written goes into the next one. So the more there is to say, the less each costs: a
frame wakes threads on both sides, and each of these wants its process's interpreter.
"""

import contextlib
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any

from autoregressive.serve.worker.messages import bytes_of, encode

_MOST_MESSAGES = 16  # in a frame
_ENOUGH_BYTES = 2**20  # of pictures or codes in a frame: nothing is added behind them


class Outbox:
    """A queue of messages and the thread that writes them to a connection, until that is closed."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name=name, daemon=True)
        self._thread.start()

    def put(self, message: Any) -> None:
        """Queues a message; without effect once nobody reads any more."""
        if self._thread.is_alive():
            self._messages.put(message)

    def close(self, timeout: float) -> None:
        """Waits until what was queued is written, at most `timeout` seconds."""
        self._messages.put(None)
        self._thread.join(timeout)

    def _write(self) -> None:
        ended = False
        while not ended:
            batch, ended = self._next_batch()
            try:
                if batch:
                    self._connection.send_bytes(encode(batch))
            except (OSError, ValueError):  # nobody reads any more: what follows is for nobody
                return

    def _next_batch(self) -> tuple[list[Any], bool]:
        """What there is to say, which is waited for, and whether that was all for ever."""
        batch: list[Any] = []
        size = 0
        with contextlib.suppress(queue.Empty):
            while len(batch) < _MOST_MESSAGES and size < _ENOUGH_BYTES:
                message = self._messages.get(block=not batch)
                if message is None:
                    return batch, True
                batch.append(message)
                size += bytes_of(message)
        return batch, False
