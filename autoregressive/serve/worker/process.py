"""The processes that the service starts: how they are started, and where each of them begins, which
is `python -m autoregressive.serve.worker.process NAME PARENT CONNECTION SOCKET...`.

A process, not a thread: HTTP work never holds the interpreter lock that a step needs, whatever
kills the engine does not kill the service, and a hung one can be killed. docs/design.md says what
it costs. A process first binds itself to its parent's life, leaves signals to the parent, and sets
up its log. Only then does it import anything that takes long, so nothing here does.
"""

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

from autoregressive.serve.logs import log_everything
from autoregressive.serve.signals import SIGNALS

ChildProcess = subprocess.Popen[bytes]
_HEAD = struct.Struct("<Q")  # bytes of the pickled function that follow
_WAITING_BYTES = 4 * 2**20  # in a connection
_PR_SET_PDEATHSIG = 1  # prctl(2)
_log = logging.getLogger("llamagen.service")


def start_child(
    run: Callable[..., None], name: str, *sockets: socket.socket
) -> tuple[ChildProcess, socket.socket]:
    """Starts a process; the connection to it.

    `multiprocessing` does not fit: its processes import everything that the function needs, and the
    parent's main module, before our first line runs, and until then they outlive a parent that is
    killed. A fork does not fit either: CUDA does not survive one.

    Args:
        run: called there with the other end of the connection, and with the sockets; pickled, so it
            must not be defined in the main module.
        sockets: the process gets copies of them.
    """
    data = pickle.dumps(run)
    ours, theirs = connect()
    descriptors = [one.fileno() for one in (theirs, *sockets)]
    arguments = [name, str(os.getpid()), *map(str, descriptors)]
    # signals to the process are held back until it ignores them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    # if it has died already, that will be noticed
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        ours.sendall(_HEAD.pack(len(data)) + data)
    return process, ours


def connect() -> tuple[socket.socket, socket.socket]:
    """A pair of connected sockets.

    Some MB may wait in them, or as much as the system allows. With less, a frame of pictures would
    be written in pieces of 0.2 MB, and each piece would wake both sides.
    """
    ends = socket.socketpair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WAITING_BYTES)
    return ends


def main() -> None:
    """Calls the function that comes through the connection with the connection and the other
    sockets.
    """
    name, parent, *descriptors = sys.argv[1:]

    def work() -> None:
        connection, *others = (socket.socket(fileno=int(descriptor)) for descriptor in descriptors)
        (size,) = _HEAD.unpack(receive_bytes(connection, _HEAD.size))
        # The service tells what to run, through a pair of sockets that nobody else has.
        run = pickle.loads(receive_bytes(connection, size))  # noqa: S301
        run(connection, *others)

    live(name, int(parent), work)


def live(name: str, parent: int, work: Callable[[], None]) -> NoReturn:
    """The life of a process that the service starts.

    It ends when its parent ends, even while it loads or hangs. It ignores signals, because the
    service decides when it ends. It ends at once when its work is done, because taking down torch's
    modules one by one may take seconds.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent != os.getppid():  # it has gone already
        os._exit(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.dup2(2, 1)  # what is printed on stdout belongs to the log, too
    faulthandler.enable()
    writer = log_everything(2, "info")
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
        writer.drain()
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


def settle_heap() -> None:
    """Takes all objects that exist out of later garbage collections, and makes collections rare.

    A process calls it when it has started. Modules, models and graphs stay to its end, and a full
    collection would look at each of them: some 0.2 s for torch's and FastAPI's, in which the
    process does nothing else. Afterwards a collection looks at newer objects only: hundreds for
    each request that is being answered. Python would collect fully again and again as those become
    more, for 50 ms where hundreds of requests come and go, and would find little: most of what a
    request holds is freed with it.
    """
    gc.collect()
    gc.freeze()
    # after so many new objects; by default after 700, or 2000 from Python 3.13 on
    gc.set_threshold(20_000, *gc.get_threshold()[1:])


if __name__ == "__main__":
    main()
