"""The processes that the service starts, and the engine's: how it is built, and how it ends.

A process, not a thread: HTTP work never holds the interpreter lock that a step needs, whatever
kills the engine does not kill the service, and a hung one can be killed. docs/design.md says what
it costs.
"""

import contextlib
import gc
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

import torch

from autoregressive.cli.command import flag_of
from autoregressive.devices import limit_cpu_threads
from autoregressive.errors import UserError
from autoregressive.models.sampling import SamplingParams
from autoregressive.serve.engine.config import EngineConfig
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.memory import saying_what_needs_less_memory
from autoregressive.serve.signals import SIGNALS
from autoregressive.serve.worker import child
from autoregressive.serve.worker.messages import Heartbeat, StartFailed
from autoregressive.serve.worker.outbox import Outbox
from autoregressive.serve.worker.worker import serve
from autoregressive.weights.finding import FoundWeights, ModelSettings
from autoregressive.weights.loading import load_models

ChildProcess = subprocess.Popen[bytes]
# Builds an engine. Its argument is called with how much of the preparation is done, and how much
# there is.
MakeEngine = Callable[[Callable[[int, int], None]], Engine]
_WAITING_BYTES = 4 * 2**20  # in a connection
# New objects after which the garbage collector looks at them: by default 700, or 2000 from Python
# 3.13 on.
_NEW_OBJECTS = 20_000
_HEARTBEAT_SECONDS = 0.25
_LAST_WORDS_SECONDS = 5.0  # for the last messages to be written


StartProcess = Callable[[MakeEngine, str], tuple[ChildProcess, socket.socket]]  # as `start_process`


@dataclass(frozen=True)
class EngineRecipe:
    """Loads the models and builds an engine, in the process that calls it."""

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
            limit_cpu_threads(models.gpt.config, device)
            engine = Engine(models.gpt, models.vq, self.config, on_progress=on_progress)
            engine.scheduler.check_fits(self.typical)
        settle_heap()
        return engine


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
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])


def start_process(make_engine: MakeEngine, name: str) -> tuple[ChildProcess, socket.socket]:
    """Starts a process that builds an engine and runs it; the connection to it."""
    return start_child(partial(_run, make_engine), name)


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


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds back signals to this thread and to a process that it starts, which calls
    `ignore_signals` as soon as it can.
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
        outbox.put(StartFailed(error.spelled(flag_of)))
        status = 2
    finally:
        outbox.close(_LAST_WORDS_SECONDS)
    sys.exit(status)


def _send_heartbeats(outbox: Outbox) -> None:
    """Sends heartbeats even while a step takes long, or hangs."""
    while True:
        outbox.put_if_silent(Heartbeat())
        time.sleep(_HEARTBEAT_SECONDS)
