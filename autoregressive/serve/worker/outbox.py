"""Sends messages from a thread of its own: whoever has something to say never waits for whoever is to read it."""

import queue
import threading
from multiprocessing.connection import Connection
from typing import Any

from autoregressive.serve.worker.messages import encode


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
        while (message := self._messages.get()) is not None:
            try:
                self._connection.send_bytes(encode(message))
            except (OSError, ValueError):  # nobody reads any more: what follows is for nobody
                return
