"""Messages to and from another process, in an event loop: no threads, so nothing here waits for the interpreter's lock."""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from autoregressive.serve.worker.messages import HEAD_BYTES, decode, encode, frame_bytes, next_batch

_FRAMES_A_TURN = 8  # of the event loop, at most
_log = logging.getLogger("llamagen.messages")


class Channel:
    """The event loop's end of a connection; used in the loop in which it is made.

    What is put in one turn of the loop goes out at the next, in frames of several messages. Each turn writes one frame and reads a
    few, so that other work gets turns beside a lot of them; reading is the greedier, for what comes last may be what is asked for
    most urgently. What cannot be written yet waits here: nobody else waits for a slow reader.

    Args:
        connection: one end of a pair of sockets.
        kinds: of messages that the other side sends, by name.
        take: called with each message.
        gone: called after the last message, when the other side has closed the connection, or sends what it should not.
    """

    def __init__(
        self, connection: socket.socket, kinds: Mapping[str, type], take: Callable[[Any], None], gone: Callable[[], None]
    ) -> None:
        connection.setblocking(False)
        self._connection, self._kinds, self._take, self._gone = connection, kinds, take, gone
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Any] = deque()  # messages that are in no frame yet
        self._unsent = memoryview(b"")  # of a frame
        self._about_to_write = False
        self._writable = True  # as far as is known
        self._frame = bytearray(HEAD_BYTES)  # that comes: its head, then all of it
        self._missing = memoryview(self._frame)
        self._loop.add_reader(connection, self._read)

    def put(self, message: Any, *, urgent: bool = False) -> None:
        """Queues a message, before all that waits if it is urgent; without effect once nobody reads any more."""
        if not self._writable:
            return
        if urgent:
            self._waiting.appendleft(message)
        else:
            self._waiting.append(message)
        if not self._about_to_write:
            self._about_to_write = True
            self._loop.call_soon(self._write)

    def flush(self) -> None:
        """Writes what was put, as far as that goes without waiting."""
        while self._write_frame():
            pass

    async def drain(self, timeout: float) -> None:
        """Waits until what was put is written, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._waiting or self._unsent:
                    await asyncio.sleep(0.01)

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
        self._writable, self._unsent = False, memoryview(b"")
        self._waiting.clear()

    def _write(self) -> None:
        self._write_frame()
        self._about_to_write = bool(self._waiting or self._unsent)
        if self._unsent:
            self._loop.add_writer(self._connection, self._write_on)
        elif self._waiting:
            self._loop.call_soon(self._write)

    def _write_on(self) -> None:
        self._loop.remove_writer(self._connection)
        self._write()

    def _write_frame(self) -> bool:
        """Goes on with a frame, or begins one; whether there is another that could be written now."""
        if self._waiting and not self._unsent:
            self._unsent = memoryview(encode(next_batch(self._waiting)))
        if self._unsent:
            try:
                self._unsent = self._unsent[self._connection.send(self._unsent) :]
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:  # nobody reads any more
                self._forget()
        return bool(self._waiting) and not self._unsent

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
            self._loop.remove_reader(self._connection)
            self._gone()
            return False
        self._frame = bytearray(HEAD_BYTES)
        self._missing = memoryview(self._frame)
        for message in messages:
            try:
                self._take(message)
            except Exception:  # a bug, which must not cost the messages behind
                _log.exception("a message could not be dealt with")
        return not self._closed
