"""Where a process that the service starts begins: `python -m autoregressive.serve.worker.child NAME
PARENT CONNECTION SOCKET...`.

Nothing that takes long is imported before the process is bound to its parent's life, leaves signals
to it, and logs as it does.
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
    """Runs the function that comes through the connection, with the connection and the other
    sockets as its arguments.
    """
    name, parent, *descriptors = sys.argv[1:]

    def work() -> None:
        connection, *others = (socket.socket(fileno=int(descriptor)) for descriptor in descriptors)
        (size,) = HEAD.unpack(_receive(connection, HEAD.size))
        pickle.loads(_receive(connection, size))(connection, *others)

    live(name, int(parent), work)


def live(name: str, parent: int, work: Callable[[], None]) -> NoReturn:
    """The life of a process that the service starts.

    It ends at once when its work is done: to take down torch's modules one by one may take seconds,
    and nobody needs it.
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
        writer.flush(_LAST_LINES_SECONDS)
        os._exit(status)


def _receive(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        chunk = connection.recv(size - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return bytes(received)


def end_with_the_parent(parent: int) -> None:
    """However the parent ends, the system ends this process with it: one that still loads, or
    hangs, would not notice.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent != os.getppid():  # it has gone already
        os._exit(1)


def ignore_signals() -> None:
    """When this process ends is the service's to say."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


if __name__ == "__main__":
    main()
