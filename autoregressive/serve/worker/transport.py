"""How messages go from one process to another: as frames, after waiting in a backlog; and the
thread that sends an engine's.

Messages go over a pair of sockets in frames of one or several, so that each costs less when there
are many. A frame is two lengths, then names and fields as JSON, then the messages' bytes as they
are (pixels, codes). There is no pickle: neither side runs what the other sends. An engine's loop
never waits for a reader, which may be slow or stopped.
"""

import itertools
import json
import socket
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, cast

from autoregressive.serve.worker.messages import KINDS
from autoregressive.serve.worker.process import receive_bytes

_HEAD = struct.Struct("<II")  # bytes of the JSON part, and of what is behind it
HEAD_BYTES = _HEAD.size
_MOST_MESSAGES = 16  # in a frame
_ENOUGH_BYTES = 2**20  # of pictures or codes in a frame: nothing is added behind them
_FAR_BEHIND = 64  # with more waiting messages, only the newest of those that supersede each other
_as_json = json.JSONEncoder(default=vars).encode  # of a dataclass within a message: its fields


def encode(messages: Iterable[Any]) -> bytes:
    """Messages, dataclasses with at most one field of bytes each, as one frame."""
    told: list[tuple[str, dict[str, Any], int]] = []
    parts: list[bytes] = []
    for message in messages:
        fields, size = dict(vars(message)), 0
        for name, value in fields.items():
            if isinstance(value, bytes):
                parts.append(value)
                size, fields[name] = len(value), None
        told.append((type(message).__name__, fields, size))
    text = _as_json(told).encode()
    return b"".join((_HEAD.pack(len(text), sum(map(len, parts))), text, *parts))


def frame_bytes(head: bytes | bytearray) -> int:
    """The length of a whole frame, its head included, from its head."""
    return HEAD_BYTES + sum(_HEAD.unpack_from(head))


def decode(frame: bytes | bytearray, kinds: Mapping[str, type] = KINDS) -> list[Any]:
    """The messages of a frame that `encode` has made.

    Args:
        kinds: the kinds that they may be of, by name.
    """
    length, _ = _HEAD.unpack_from(frame)
    place = HEAD_BYTES + length
    messages = []
    for name, fields, size in json.loads(frame[HEAD_BYTES:place]):
        kind = kinds[name]
        for field, annotation in kind.__annotations__.items():
            if annotation is bytes:
                fields[field] = bytes(memoryview(frame)[place : place + size])
            elif is_dataclass(annotation):
                fields[field] = cast(type, annotation)(**fields[field])
            elif isinstance(fields.get(field), list):
                fields[field] = tuple(fields[field])
        place += size
        messages.append(kind(**fields))
    return messages


def receive(connection: socket.socket, kinds: Mapping[str, type] = KINDS) -> list[Any]:
    """Waits for the next frame; its messages, which are of these kinds.

    Raises:
        EOFError: the other side has gone.
    """
    head = receive_bytes(connection, HEAD_BYTES)
    return decode(head + receive_bytes(connection, frame_bytes(head) - HEAD_BYTES), kinds)


class Backlog:
    """Messages that wait to be sent, in order.

    The other side may be stopped for as long as --step-timeout, while the engine goes on. Once more
    than 64 messages wait, a new message removes the one that it supersedes. What then waits is
    bounded by the work that was accepted.
    """

    def __init__(self) -> None:
        self._messages: dict[int, Any] = {}
        # superseding key -> number of the newest waiting message that has it
        self._newest: dict[tuple[Any, ...], int] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def bytes(self) -> int:
        """Bytes of pixels, codes and text in these messages."""
        return sum(map(_bytes_of, self._messages.values()))

    def put(self, message: Any) -> None:
        """Adds a message at the end."""
        number = next(self._numbers)
        key = _superseding_key(message) or (number,)
        older = self._newest.get(key)
        self._messages[number], self._newest[key] = message, number
        if older is not None and len(self._messages) > _FAR_BEHIND:
            del self._messages[older]

    def next_batch(self) -> list[Any]:
        """Takes the messages of one frame from the front; an empty list if no message waits."""
        batch: list[Any] = []
        while (
            self._messages
            and len(batch) < _MOST_MESSAGES
            and sum(map(_bytes_of, batch)) < _ENOUGH_BYTES
        ):
            number = next(iter(self._messages))
            message = self._messages.pop(number)
            key = _superseding_key(message) or (number,)
            if self._newest[key] == number:
                del self._newest[key]
            batch.append(message)
        return batch

    def clear(self) -> None:
        """Drops all messages."""
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

    def put_if_silent(self, message: Any) -> bool:
        """Queues a message unless others wait, which show as well that this process lives.

        Returns:
            Whether there is a reader.
        """
        with self._changed:
            if not self._waiting:
                self.put(message)
            return self._thread.is_alive()

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
