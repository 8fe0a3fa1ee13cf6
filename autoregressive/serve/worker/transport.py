"""How messages go from one process to another: as frames, after waiting in a backlog. An engine's
are sent by a thread, `Outbox`; the service's event loops read and write through a `Channel`, and
`AwakeClock` says how long the other side has been silent.

Messages go over a pair of sockets in frames of one or several, so that each costs less when there
are many. A frame is two lengths, then names and fields as JSON, then the messages' bytes as they
are (pixels, codes). There is no pickle: neither side runs what the other sends. An engine's loop
never waits for a reader, which may be slow or stopped.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, cast

from autoregressive.serve.worker.messages import KINDS, Heartbeat
from autoregressive.serve.worker.process import receive_bytes

_HEAD = struct.Struct("<II")  # bytes of the JSON part, and of what is behind it
_MOST_MESSAGES = 16  # in a frame
_ENOUGH_BYTES = 2**20  # of pictures or codes in a frame: nothing is added behind them
_FAR_BEHIND = 64  # with more waiting messages, only the newest of those that supersede each other
# A process that has not been heard of for so long is not well; within 2 s all others know.
SILENT_SECONDS = 1.5
_HEARTBEAT_SECONDS = 0.25
TICK_SECONDS = 0.1  # between two looks at an `AwakeClock`
_FRAMES_A_TURN = 8  # of the event loop, at most
_NOTHING = memoryview(b"")
_log = logging.getLogger("llamagen.messages")
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
    return _HEAD.size + sum(_HEAD.unpack_from(head))


def decode(frame: bytes | bytearray, kinds: Mapping[str, type] = KINDS) -> list[Any]:
    """The messages of a frame that `encode` has made.

    Args:
        kinds: the kinds that they may be of, by name.
    """
    length, _ = _HEAD.unpack_from(frame)
    place = _HEAD.size + length
    messages = []
    for name, fields, size in json.loads(frame[_HEAD.size : place]):
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
    head = receive_bytes(connection, _HEAD.size)
    return decode(head + receive_bytes(connection, frame_bytes(head) - _HEAD.size), kinds)


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
        """Drops all messages that wait, because nobody reads them any more."""
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


def start_heartbeats(outbox: Outbox, alive: Callable[[], bool] = lambda: True) -> None:
    """Begins to send heartbeats, from a thread of its own: even while a step takes long, or hangs.

    Args:
        alive: whether all that this process needs lives; while it does not, nothing is sent.
    """

    def send() -> None:
        while not alive() or outbox.put_if_silent(Heartbeat()):
            time.sleep(_HEARTBEAT_SECONDS)

    threading.Thread(target=send, name="heartbeat", daemon=True).start()


def _bytes_of(message: Any) -> int:
    """The size of the pixels, codes or text that a message holds."""
    return sum(len(value) for value in vars(message).values() if isinstance(value, bytes))


def _superseding_key(message: Any) -> tuple[Any, ...] | None:
    """A newer message with the same key supersedes an older one. None: it supersedes nothing."""
    fields = getattr(message, "SUPERSEDES", None)
    return None if fields is None else (type(message), *(getattr(message, one) for one in fields))


class AwakeClock:
    """Seconds in which this process's event loop has gone round.

    While this process is stopped, or the machine is frozen, it reads no messages, so their age then
    says nothing about their sender. Of a long time between two looks only the first half of a
    second counts. Somebody has to look every `TICK_SECONDS`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        self._awake = 0.0

    def now(self) -> float:
        """Seconds since it was made; looks at the clock."""
        before, self._looked_at = self._looked_at, self._clock()
        self._awake += min(self._looked_at - before, 0.5)
        return self._awake


class Channel:
    """The event loop's end of a connection; used in the loop in which it is made.

    No thread stands between the event loop and the connection: each message would have to change
    from one to the other.

    Messages that are put in one turn of the loop go out at the next, in frames of several. Each
    turn writes one frame and reads a few, so that other work gets its turns. It reads more than it
    writes because the last message to come may be the most urgent one. Messages that cannot be
    written yet wait here, so only this channel waits for a slow reader. A reader that is far behind
    gets only the newest of the messages that supersede each other.

    Args:
        connection: one end of a pair of sockets.
        kinds: of messages that the other side sends, by name.
        take: called with each message.
        gone: called after the last message, when the other side has closed the connection, or sends
            what it should not.
    """

    def __init__(
        self,
        connection: socket.socket,
        kinds: Mapping[str, type],
        take: Callable[[Any], None],
        gone: Callable[[], None],
    ) -> None:
        connection.setblocking(False)
        self._connection, self._kinds, self._take, self._gone = connection, kinds, take, gone
        self._loop = asyncio.get_running_loop()
        self._urgent = Backlog()  # messages that are in no frame yet
        self._waiting = Backlog()  # and those that go after them
        self._unsent = _NOTHING  # of a frame
        self._about_to_write = False
        self._writable = True  # as far as is known
        self._frame = bytearray(_HEAD.size)  # that comes: its head, then all of it
        self._missing = memoryview(self._frame)
        self._loop.add_reader(connection, self._read)

    def put(self, message: Any, *, urgent: bool = False) -> None:
        """Queues a message; without effect once the reader has gone.

        Args:
            urgent: it overtakes all waiting messages that are not urgent, so it must not depend on
                any of them.
        """
        if not self._writable:
            return
        (self._urgent if urgent else self._waiting).put(message)
        if not self._about_to_write:
            self._about_to_write = True
            self._loop.call_soon(self._write)

    @property
    def idle(self) -> bool:
        """Whether all messages are written."""
        return not (self._urgent or self._waiting or self._unsent)

    @property
    def waiting_bytes(self) -> int:
        """The size of the pixels, codes and text in waiting messages, and of the frame that is
        being written.
        """
        return self._urgent.bytes + self._waiting.bytes + len(self._unsent)

    def flush(self) -> None:
        """Writes waiting messages, as far as that goes without waiting."""
        while self._write_frame():
            pass

    async def drain(self, timeout: float) -> None:
        """Waits until all messages are written, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self.idle:
                    await asyncio.sleep(0.01)

    def stop_reading(self) -> None:
        """Drops everything that the other side still writes, without making it wait."""
        if self._loop.remove_reader(self._connection):
            with contextlib.suppress(OSError):  # the other side has gone
                self._connection.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Stops reading and writing; `gone` is not called."""
        self._forget()
        if not self._closed:
            self._loop.remove_reader(self._connection)
            self._loop.remove_writer(self._connection)
            self._connection.close()

    @property
    def _closed(self) -> bool:
        return self._connection.fileno() < 0

    def _forget(self) -> None:
        """Drops the waiting messages and all later ones: the reader has gone."""
        self._writable, self._unsent = False, _NOTHING
        self._urgent.clear()
        self._waiting.clear()

    def _lose(self) -> None:
        if self._loop.remove_reader(self._connection):
            self._gone()

    def _write(self) -> None:
        more = self._write_frame()
        self._about_to_write = more or bool(self._unsent)
        if self._unsent:
            self._loop.add_writer(self._connection, self._write_on)
        elif more:
            self._loop.call_soon(self._write)

    def _write_on(self) -> None:
        self._loop.remove_writer(self._connection)
        self._write()

    def _write_frame(self) -> bool:
        """Goes on with a frame, or begins one; returns whether another could be written now."""
        if not self._unsent:
            self._unsent = memoryview(
                _frame_of(self._urgent.next_batch() or self._waiting.next_batch())
            )
        if self._unsent:
            try:
                self._unsent = self._unsent[self._connection.send(self._unsent) :] or _NOTHING
            except (BlockingIOError, InterruptedError):
                return False
            except (BrokenPipeError, ConnectionResetError):  # `_read` will notice it, too
                self._forget()
            except OSError:
                _log.exception("messages could not be written")
                self._forget()
                self._lose()
        return not self._unsent and bool(self._urgent or self._waiting)

    def _read(self) -> None:
        for _ in range(_FRAMES_A_TURN):
            if not self._read_frame():
                return

    def _read_frame(self) -> bool:
        """Reads on to the end of a frame; returns whether another may be there."""
        try:
            while self._missing:
                count = self._connection.recv_into(self._missing)
                if count == 0:
                    raise EOFError
                self._missing = self._missing[count:]
                if not self._missing and len(self._frame) == _HEAD.size:  # its head is complete
                    head, self._frame = self._frame, bytearray(frame_bytes(self._frame))
                    self._frame[: _HEAD.size] = head
                    self._missing = memoryview(self._frame)[_HEAD.size :]
            messages = decode(self._frame, self._kinds)
        except (BlockingIOError, InterruptedError):
            return False
        except Exception as error:  # the other side has gone, or sends what it should not
            if not isinstance(error, (EOFError, OSError)):
                _log.exception("messages could not be read")
            self._lose()
            return False
        self._frame = bytearray(_HEAD.size)
        self._missing = memoryview(self._frame)
        for message in messages:
            if self._closed:
                return False
            try:
                self._take(message)
            except Exception:  # a bug, which must not cost the messages behind
                _log.exception("a message could not be dealt with")
        return not self._closed


def _frame_of(batch: Sequence[Any]) -> bytes:
    """Messages as a frame; one that cannot be encoded, which is a bug, does not cost the others."""
    if not batch:
        return b""
    try:
        return encode(batch)
    except Exception:
        if len(batch) == 1:
            _log.exception("a message could not be sent")
            return b""
        return b"".join(_frame_of([message]) for message in batch)
