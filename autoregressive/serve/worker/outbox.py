"""Sends messages from a thread of its own: an engine's loop never waits for whoever is to read
them.
"""

import socket
import threading
from typing import Any

from autoregressive.serve.worker.backlog import Backlog
from autoregressive.serve.worker.messages import encode


class Outbox:
    """Messages that wait, and the thread that writes them to a connection, until that is closed.

    What has come together while the last frame was written goes into the next one. A reader that is
    far behind gets only the newest of the messages that supersede each other.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._waiting = Backlog()
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name=name, daemon=True)
        self._thread.start()

    def put(self, message: Any) -> None:
        """Queues a message; without effect once nobody reads any more."""
        with self._changed:
            if self._thread.is_alive():
                self._waiting.put(message)
                self._changed.notify()

    def put_if_silent(self, message: Any) -> None:
        """Queues a message unless others wait: they show as well that this process lives, and so
        none pile up unread.
        """
        with self._changed:
            if not self._waiting:
                self.put(message)

    def close(self, timeout: float) -> None:
        """Waits until what was queued is written, at most `timeout` seconds."""
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
            except OSError:  # nobody reads any more: what follows is for nobody
                return
