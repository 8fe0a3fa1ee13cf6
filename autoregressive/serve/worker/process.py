"""The engine's process: what it builds its engine from, how it is started, and how it ends.

A process, not a thread: HTTP work never holds the interpreter lock that a step needs, whatever kills the engine does not kill the
service, and a hung one can be killed. docs/design.md says what it costs.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import torch

from autoregressive.common.devices import use_threads_that_pay
from autoregressive.common.errors import UserError
from autoregressive.common.weights import FoundWeights, ModelSettings, load_models
from autoregressive.serve.arguments import as_flags, saying_what_needs_less_memory
from autoregressive.serve.engine.config import EngineConfig
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.request import SamplingParams
from autoregressive.serve.heap import settle_heap
from autoregressive.serve.worker.messages import Unable
from autoregressive.serve.worker.outbox import Outbox
from autoregressive.serve.worker.worker import serve

MakeEngine = Callable[[Callable[[int, int], None]], Engine]
StartProcess = Callable[[MakeEngine, str], tuple[BaseProcess, socket.socket]]  # as `start_process`
_PR_SET_PDEATHSIG = 1  # prctl(2)
_WAITING_BYTES = 4 * 2**20  # in a connection
_LAST_WORDS_SECONDS = 5.0  # what is left to say is written by then, or nobody reads it


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
            UserError: a checkpoint is damaged, memory does not hold the model or its pages, or a typical request could never run.
        """
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with saying_what_needs_less_memory(self.model, self.config):
            models = load_models(self.model, self.found)
            use_threads_that_pay(models.gpt.config, device)
            try:
                engine = Engine(models.gpt, models.vq, self.config, on_progress=on_progress)
                engine.scheduler.check_fits(self.typical)
            except ValueError as error:
                raise UserError(as_flags(str(error))) from error
        settle_heap()
        return engine


def start_process(make_engine: MakeEngine, name: str) -> tuple[BaseProcess, socket.socket]:
    """Starts a process that builds an engine and runs it; the connection to it."""
    return start_child(partial(_run, make_engine), name)


def start_child(run: Callable[[socket.socket], None], name: str) -> tuple[BaseProcess, socket.socket]:
    """Starts a process; the connection to it.

    Args:
        run: called there with the other end; pickled, as everything is that `multiprocessing` hands to a new process. It begins
            with `end_with_the_parent` and `ignore_signals`.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = connect()
    process = context.Process(target=run, args=(theirs,), name=name, daemon=True)
    with signals_held():
        process.start()
    theirs.close()
    return process, ours


def connect() -> tuple[socket.socket, socket.socket]:
    """Two sockets, each of which receives what is sent to the other.

    Some MB may wait in them, or as much as the system allows: else a frame of pictures is written in pieces of 0.2 MB, and each
    wakes both sides.
    """
    ends = socket.socketpair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WAITING_BYTES)
    return ends


SIGNALS = {signal.SIGINT, signal.SIGTERM}  # a terminal's Ctrl-C and a supervisor's word, which reach the whole group


@contextmanager
def signals_held() -> Iterator[None]:
    """What is sent to this thread, or to a process that it starts, waits: a child calls `ignore_signals` when it can."""
    resource_tracker.ensure_running()  # or starting the first process would start it, which lets signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """When this process ends is the service's to say."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_with_the_parent() -> None:
    """However the service ends, the system ends this process with it: one that still loads, or hangs, would not notice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it has gone already
        sys.exit(1)


def _run(make_engine: MakeEngine, connection: socket.socket) -> None:
    end_with_the_parent()
    ignore_signals()
    outbox = Outbox(connection, "events")
    status = 0
    try:
        serve(make_engine, connection, outbox)
    except UserError as error:
        outbox.put(Unable(str(error)))
        status = 2
    finally:
        outbox.close(_LAST_WORDS_SECONDS)
    sys.exit(status)
