"""Sends messages from a thread of its own: an engine's loop never waits for whoever is to read them."""

import contextlib
import queue
import socket
import threading
from collections import deque
from typing import Any

from autoregressive.serve.worker.messages import encode, next_batch


class Outbox:
    """A queue of messages and the thread that writes them to a connection, until that is closed.

    What has come together while the last frame was written goes into the next one.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name=name, daemon=True)
        self._thread.start()

    def put(self, message: Any) -> None:
        """Queues a message; without effect once nobody reads any more."""
        if self._thread.is_alive():
            self._messages.put(message)

    def put_if_silent(self, message: Any) -> None:
        """Queues a message unless others wait: they show as well that this process lives, and so none pile up unread."""
        if self._messages.empty():
            self.put(message)

    def close(self, timeout: float) -> None:
        """Waits until what was queued is written, at most `timeout` seconds."""
        self._messages.put(None)
        self._thread.join(timeout)

    def _write(self) -> None:
        waiting: deque[Any] = deque()
        ended = False
        while waiting or not ended:
            with contextlib.suppress(queue.Empty):
                while not ended:
                    message = self._messages.get(block=not waiting)
                    if message is None:
                        ended = True
                    else:
                        waiting.append(message)
            if waiting:
                try:
                    self._connection.sendall(encode(next_batch(waiting)))
                except OSError:  # nobody reads any more: what follows is for nobody
                    return
