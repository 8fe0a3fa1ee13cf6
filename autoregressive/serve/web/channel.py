"""Messages to and from another process, read and written in the event loop, and how long that
process has been silent.

No thread stands between the event loop and the connection: each message would have to change from
one to the other.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autoregressive.serve.worker.transport import HEAD_BYTES, Backlog, decode, encode, frame_bytes

# A process that has not been heard of for so long is not well; within 2 s all others know.
SILENT_SECONDS = 1.5
TICK_SECONDS = 0.1  # between two looks at an `AwakeClock`
_LONGEST_TICK_SECONDS = 0.5
_FRAMES_A_TURN = 8  # of the event loop, at most
_NOTHING = memoryview(b"")
_log = logging.getLogger("llamagen.messages")


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
        self._awake += min(self._looked_at - before, _LONGEST_TICK_SECONDS)
        return self._awake


class Channel:
    """The event loop's end of a connection; used in the loop in which it is made.

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
        self._frame = bytearray(HEAD_BYTES)  # that comes: its head, then all of it
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
        """Reads a few of the frames that have come."""
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
                if not self._missing and len(self._frame) == HEAD_BYTES:  # its head is complete
                    head, self._frame = self._frame, bytearray(frame_bytes(self._frame))
                    self._frame[:HEAD_BYTES] = head
                    self._missing = memoryview(self._frame)[HEAD_BYTES:]
            messages = decode(self._frame, self._kinds)
        except (BlockingIOError, InterruptedError):
            return False
        except Exception as error:  # the other side has gone, or sends what it should not
            if not isinstance(error, (EOFError, OSError)):
                _log.exception("messages could not be read")
            self._lose()
            return False
        self._frame = bytearray(HEAD_BYTES)
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
