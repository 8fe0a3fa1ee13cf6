"""Where a process that the service starts begins: `python -m autoregressive.serve.worker.child NAME
PARENT CONNECTION SOCKET...`.

The process first binds itself to its parent's life, leaves signals to the parent, and sets up its
log. Only then does it import anything that takes long.
"""

import ctypes
import logging
import os
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import NoReturn

from autoregressive.serve.logs import log_in_child
from autoregressive.serve.signals import SIGNALS

HEAD = struct.Struct("<Q")  # bytes of the pickled function that follow
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LAST_LINES_SECONDS = 1.0
_log = logging.getLogger("llamagen.service")


def main() -> None:
    """Calls the function that comes through the connection with the connection and the other
    sockets.
    """
    name, parent, *descriptors = sys.argv[1:]

    def work() -> None:
        connection, *others = (socket.socket(fileno=int(descriptor)) for descriptor in descriptors)
        (size,) = HEAD.unpack(receive_bytes(connection, HEAD.size))
        # The service tells what to run, through a pair of sockets that nobody else has.
        run = pickle.loads(receive_bytes(connection, size))  # noqa: S301
        run(connection, *others)

    live(name, int(parent), work)


def live(name: str, parent: int, work: Callable[[], None]) -> NoReturn:
    """The life of a process that the service starts.

    It ends at once when its work is done, because taking down torch's modules one by one may take
    seconds.
    """
    end_with_the_parent(parent)
    ignore_signals()
    writer = log_in_child("info")
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except EOFError:  # the parent has gone
        pass
    except BaseException:
        _log.critical("%s has ended by an error", name, exc_info=True)
    finally:
        writer.drain(_LAST_LINES_SECONDS)
        os._exit(status)


def receive_bytes(connection: socket.socket, count: int) -> bytearray:
    """Waits for the next `count` bytes of a connection.

    Raises:
        EOFError: the other side has gone, or the connection is closed here.
    """
    received = bytearray(count)
    missing = memoryview(received)
    while missing:
        try:
            size = connection.recv_into(missing)
        except OSError as error:
            raise EOFError from error
        if size == 0:
            raise EOFError
        missing = missing[size:]
    return received


def end_with_the_parent(parent: int) -> None:
    """Has the system end this process when the parent ends, even while it loads or hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent != os.getppid():  # it has gone already
        os._exit(1)


def ignore_signals() -> None:
    """Leaves it to the service when this process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


if __name__ == "__main__":
    main()
