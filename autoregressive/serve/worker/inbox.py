"""Receives messages in a thread of its own, for an event loop."""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from autoregressive.serve.worker.messages import receive

_log = logging.getLogger("llamagen.messages")


class Inbox:
    """Hands messages to the event loop in which it is made, which is woken once for all that have come by the time it looks.

    Args:
        kinds: of messages that the other side sends, by name.
        take: called in the event loop with each message.
        gone: called in the event loop after the last message, when the other side has closed the connection.
    """

    def __init__(
        self, connection: Connection, kinds: Mapping[str, type], take: Callable[[Any], None], gone: Callable[[], None]
    ) -> None:
        self._connection, self._kinds, self._take, self._gone = connection, kinds, take, gone
        self._loop = asyncio.get_running_loop()
        self._messages: deque[Any] = deque()
        self._told = False  # whether the event loop knows that there is something
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            while True:
                try:
                    messages = receive(self._connection, self._kinds)
                except Exception as error:  # the other side has gone, or sends what it should not
                    if not isinstance(error, EOFError):
                        _log.exception("messages could not be read")
                    self._loop.call_soon_threadsafe(self._gone)
                    return
                self._messages.extend(messages)
                if not self._told:
                    self._told = True
                    self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        self._told = False  # first: what comes from now on wakes the loop again
        while self._messages:
            try:
                self._take(self._messages.popleft())
            except Exception:  # a bug, which must not cost the messages behind
                _log.exception("a message could not be dealt with")
