"""The engine's process: what it builds its engine from, how it is started, and how it ends.

A process, not a thread: HTTP work never holds the interpreter lock that a step needs, whatever
kills the engine does not kill the service, and a hung one can be killed. docs/design.md says what
it costs.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from autoregressive.cli.command import flag_of
from autoregressive.devices import use_threads_that_pay
from autoregressive.errors import UserError
from autoregressive.serve.engine.config import EngineConfig
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.memory import saying_what_needs_less_memory
from autoregressive.serve.engine.request import SamplingParams
from autoregressive.serve.heap import settle_heap
from autoregressive.serve.signals import SIGNALS
from autoregressive.serve.worker import child
from autoregressive.serve.worker.messages import Heartbeat, Unable
from autoregressive.serve.worker.outbox import Outbox
from autoregressive.serve.worker.worker import serve
from autoregressive.weights.finding import FoundWeights, ModelSettings
from autoregressive.weights.loading import load_models

MakeEngine = Callable[[Callable[[int, int], None]], Engine]
_WAITING_BYTES = 4 * 2**20  # in a connection
_HEARTBEAT_SECONDS = 0.25
_LAST_WORDS_SECONDS = 5.0  # what is left to say is written by then, or nobody reads it


class ChildProcess(Protocol):
    """A process that the service has started."""

    @property
    def exitcode(self) -> int | None:
        """Its status; a signal's number below zero; None while it runs."""

    def is_alive(self) -> bool:
        """Whether it runs."""

    def kill(self) -> None:
        """Ends it, whatever it does."""

    def join(self, timeout: float | None = None) -> None:
        """Waits until it has ended, or for so many seconds."""


StartProcess = Callable[[MakeEngine, str], tuple[ChildProcess, socket.socket]]  # as `start_process`


@dataclass(frozen=True)
class EngineRecipe:
    """Loads the models and builds an engine, in whatever process calls it."""

    model: ModelSettings
    found: FoundWeights
    config: EngineConfig
    typical: SamplingParams  # of a request that says nothing else

    def __call__(self, on_progress: Callable[[int, int], None]) -> Engine:
        """An engine that is ready to run.

        Raises:
            UserError: a checkpoint is damaged, memory does not hold the model or its pages, or a
                typical request could never run.
        """
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with saying_what_needs_less_memory(self.model, self.config):
            models = load_models(self.model, self.found)
            use_threads_that_pay(models.gpt.config, device)
            engine = Engine(models.gpt, models.vq, self.config, on_progress=on_progress)
            engine.scheduler.check_fits(self.typical)
        settle_heap()
        return engine


def start_process(make_engine: MakeEngine, name: str) -> tuple[ChildProcess, socket.socket]:
    """Starts a process that builds an engine and runs it; the connection to it."""
    return start_child(partial(_run, make_engine), name)


class _Child:
    """A `ChildProcess` around `subprocess`."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)


def start_child(
    run: Callable[..., None], name: str, *sockets: socket.socket
) -> tuple[ChildProcess, socket.socket]:
    """Starts a process; the connection to it.

    Not by `multiprocessing`: its processes import all that the function needs, and the parent's
    main module, before the first line of ours, and meanwhile outlive a parent that is killed. Not
    by a fork: CUDA does not survive one.

    Args:
        run: called there with the other end of the connection, and with the sockets; pickled, so it
            must not be defined in the main module.
        sockets: the process gets copies of them.
    """
    data = pickle.dumps(run)
    ours, theirs = connect()
    descriptors = [one.fileno() for one in (theirs, *sockets)]
    command = [
        sys.executable,
        "-P",
        "-m",
        child.__name__,
        name,
        str(os.getpid()),
        *map(str, descriptors),
    ]
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    with signals_held():
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env=os.environ | {"PYTHONPATH": path},
        )
    theirs.close()
    with contextlib.suppress(
        BrokenPipeError, ConnectionResetError
    ):  # it has died already, as will be noticed
        ours.sendall(child.HEAD.pack(len(data)) + data)
    return _Child(process), ours


def connect() -> tuple[socket.socket, socket.socket]:
    """Two sockets, each of which receives what is sent to the other.

    Some MB may wait in them, or as much as the system allows: else a frame of pictures is written
    in pieces of 0.2 MB, and each wakes both sides.
    """
    ends = socket.socketpair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WAITING_BYTES)
    return ends


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals to this thread, or to a process that it starts, wait: a child calls `ignore_signals`
    when it can.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(make_engine: MakeEngine, connection: socket.socket) -> None:
    outbox = Outbox(connection, "events")
    threading.Thread(target=_send_heartbeats, args=(outbox,), name="heartbeat", daemon=True).start()
    status = 0
    try:
        serve(make_engine, connection, outbox)
    except UserError as error:
        outbox.put(Unable(error.spelled(flag_of)))
        status = 2
    finally:
        outbox.close(_LAST_WORDS_SECONDS)
    sys.exit(status)


def _send_heartbeats(outbox: Outbox) -> None:
    """Says that the process lives, whatever its loop does: a step may take long, or hang."""
    while True:
        outbox.put_if_silent(Heartbeat())
        time.sleep(_HEARTBEAT_SECONDS)
