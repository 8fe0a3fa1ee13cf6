"""Messages to and from another process, in an event loop: without threads of its own, between which
each would be handed over.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autoregressive.serve.worker.backlog import Backlog
from autoregressive.serve.worker.messages import HEAD_BYTES, decode, encode, frame_bytes

_FRAMES_A_TURN = 8  # of the event loop, at most
_NOTHING = memoryview(b"")
_log = logging.getLogger("llamagen.messages")


class Channel:
    """The event loop's end of a connection; used in the loop in which it is made.

    What is put in one turn of the loop goes out at the next, in frames of several messages. Each
    turn writes one frame and reads a few, so that other work gets turns beside a lot of them;
    reading is the greedier, for what comes last may be what is asked for most urgently. What cannot
    be written yet waits here: nobody else waits for a slow reader. A reader that is far behind gets
    only the newest of the messages that supersede each other.

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
        """Queues a message; without effect once nobody reads any more.

        Args:
            urgent: it overtakes all that waits and is not urgent, so it must not follow from any of
                that.
        """
        if not self._writable:
            return
        (self._urgent if urgent else self._waiting).put(message)
        if not self._about_to_write:
            self._about_to_write = True
            self._loop.call_soon(self._write)

    @property
    def idle(self) -> bool:
        """Whether all that was put is written."""
        return not (self._urgent or self._waiting or self._unsent)

    @property
    def waiting_bytes(self) -> int:
        """Of pixels, codes and text in messages that nobody has begun to write, and of the frame
        that is being written.
        """
        return self._urgent.bytes + self._waiting.bytes + len(self._unsent)

    def flush(self) -> None:
        """Writes what was put, as far as that goes without waiting."""
        while self._write_frame():
            pass

    async def drain(self, timeout: float) -> None:
        """Waits until what was put is written, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not self.idle:
                    await asyncio.sleep(0.01)

    def stop_reading(self) -> None:
        """Whatever the other side still writes is for nobody, and it need not wait for anybody to
        read it.
        """
        if self._loop.remove_reader(self._connection):
            with contextlib.suppress(OSError):  # the other side has gone
                self._connection.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Neither reads nor writes any more; `gone` is not called."""
        self._forget()
        if not self._closed:
            self._loop.remove_reader(self._connection)
            self._loop.remove_writer(self._connection)
            self._connection.close()

    @property
    def _closed(self) -> bool:
        return self._connection.fileno() < 0

    def _forget(self) -> None:
        """What waits is for nobody, and so is what follows."""
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
        """Goes on with a frame, or begins one; whether there is another that could be
        written now.
        """
        if not self._unsent:
            self._unsent = memoryview(
                _frame_of(self._urgent.next_batch() or self._waiting.next_batch())
            )
        if self._unsent:
            try:
                self._unsent = self._unsent[self._connection.send(self._unsent) :] or _NOTHING
            except (BlockingIOError, InterruptedError):
                return False
            except (
                BrokenPipeError,
                ConnectionResetError,
            ):  # nobody reads any more, as will be read
                self._forget()
            except OSError:
                _log.exception("messages could not be written")
                self._forget()
                self._lose()
        return not self._unsent and bool(self._urgent or self._waiting)

    def _read(self) -> None:
        """Reads what has come, up to so many frames."""
        for _ in range(_FRAMES_A_TURN):
            if not self._read_frame():
                return

    def _read_frame(self) -> bool:
        """Reads on to the end of a frame; whether another may be there."""
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
