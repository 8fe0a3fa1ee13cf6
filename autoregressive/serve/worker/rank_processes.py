"""The ranks that share one model (tensor parallelism): one process a device.

Rank 0 is the process that owns the engine: it alone has the scheduler, the requests and the
tokenizer. It starts the others (following_rank.py). Before each span it sends them what it has
changed in its batch and how many passes follow, and no answer is waited for.

A rank says that it lives by heartbeats, and that it has ended by the end of its connection. The
ranks cannot go on without one of them, so its loss ends the engine.
"""

import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
from typing_extensions import override

from autoregressive.devices import rank_devices
from autoregressive.errors import UserError, tell
from autoregressive.models.gpt import Transformer
from autoregressive.models.ranks import ALONE
from autoregressive.serve.engine.batch import Batch, BatchShape, BatchUpdate
from autoregressive.serve.engine.engine import RunnerFactory
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.exchange import (
    Exchange,
    choose_exchange,
    open_store,
)
from autoregressive.serve.engine.model_runner import ModelRunner
from autoregressive.serve.worker.following_rank import (
    FROM_RANK,
    LOSS_SECONDS,
    Prepare,
    RankLoaded,
    RankRecipe,
    Span,
    follow,
)
from autoregressive.serve.worker.messages import StartFailed
from autoregressive.serve.worker.process import ChildProcess, start_child
from autoregressive.serve.worker.transport import (
    TICK_SECONDS,
    AwakeClock,
    encode,
    receive,
)
from autoregressive.weights.finding import ModelSettings, check_ranks

# The service hears of a rank that is silent for so long in time to say so within 2 s.
_SILENT_SECONDS = 0.5
_LAST_SPAN_SECONDS = 5.0  # for a GPU to finish what it was told, unless another rank hangs
_POLL_SECONDS = 0.01  # between two looks whether it has


class RankLostError(ChildProcessError):
    """The ranks cannot go on, because one of them has died or is out of step with the others."""


class ModelRanks:
    """What an engine is built with: here rank 0, which is alone and has the whole model.

    As a context it ends the other ranks if an error is raised in it, and else leaves them running.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.rank, self.config = ALONE, config
        self.make_runner: RunnerFactory = ModelRunner

    def __enter__(self) -> "ModelRanks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.stop()

    def stop(self) -> None:
        """Ends the other ranks, and waits for them."""


class LeadingRank(ModelRanks):
    """Rank 0 of several: starts the others and watches them, each from a thread that lives as long
    as they do. A process whose parent's thread ends is ended by the system.

    Args:
        on_loss: called in that thread when a rank is lost, with one line that says how.

    Attributes:
        lost: how a rank was lost, once one is.
        alive: whether all ranks have been heard of in the last half of a second.
        last_span: of this rank's GPU.
        drop_graphs: called before the exchange ends, which may wait until no graph holds its calls.
    """

    def __init__(self, recipe: RankRecipe, on_loss: Callable[[str], None]) -> None:
        self._recipe, self._on_loss = recipe, on_loss
        self.rank, self.config = recipe.rank(0), recipe.config
        self.make_runner: RunnerFactory = partial(LeadingRunner, self)
        self.lost: str | None = None
        self.alive = True
        self.last_span: torch.cuda.Event | None = None
        self.drop_graphs: Callable[[], None] | None = None
        self._store = open_store(self.rank.count)
        self._exchange: Exchange | None = None
        self._failure: UserError | None = None  # of a rank's start
        self._num_pages: dict[int, int] = {}  # by rank, of those that are loaded
        self._agreed = False  # a failure is a loss from then on
        self._changed = threading.Condition()
        self._clock = AwakeClock()
        self._connections: dict[socket.socket, int] = {}  # the number of the rank at each
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    def agree(self, num_pages: int) -> int:
        """Waits until all ranks are loaded. Returns how many pages each of them is to have.

        Args:
            num_pages: that the memory of this rank holds.

        Raises:
            UserError: a rank could not be loaded, for a reason that the user can mend.
            RankLostError: a rank has died.
        """
        others = self.rank.count - 1
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or self.lost or len(self._num_pages) == others
            )
            if self._failure is not None:
                raise self._failure
            self.require_all()
            fewest = min(num_pages, *self._num_pages.values())
            self._agreed = True
        self.send([Prepare(fewest)])
        return fewest

    def connect(self) -> Exchange:
        """Meets the other ranks.

        Raises:
            RankLostError: one of them does not come.
        """
        met: list[Exchange | Exception] = []

        def meet() -> None:
            try:
                met.append(self._recipe.connect(0, self._store))
            except Exception as error:
                met.append(error)
            with self._changed:
                self._changed.notify_all()

        # in a thread, because it waits for a rank that has died as for one that is slow
        threading.Thread(target=meet, name="meeting", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: met or self.lost)
        if not met:
            self.require_all()
        (result,) = met
        if isinstance(result, Exception):
            raise self.explain(result) from result
        self._exchange = result
        return result

    def require_all(self) -> None:
        """Raises `RankLostError` once a rank is lost."""
        if self.lost is not None:
            raise RankLostError(self.lost)

    def send(self, messages: Sequence[Any]) -> None:
        """Sends messages to all other ranks, in one frame.

        Raises:
            RankLostError: a rank is lost.
        """
        self.require_all()
        frame = encode(messages)
        try:
            for connection in self._connections:
                connection.sendall(frame)
        except OSError as error:
            raise self.explain(error) from error

    def explain(self, error: BaseException) -> RankLostError:
        """What has ended the work of the ranks: the loss of one, which shows a little later than
        its consequences, or the error.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.lost, LOSS_SECONDS)
            if self.lost is None:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self.lost = f"the ranks are out of step with each other ({reason})"
        return RankLostError(self.lost)

    @override
    def stop(self) -> None:
        if self.lost is None:
            self._wait_for_last_span()
        with self._changed:
            self.lost = self.lost or "the other ranks have been ended"
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self.drop_graphs is not None:
            self.drop_graphs()
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    def _wait_for_last_span(self) -> None:
        """Waits until this rank's GPU has done what all of them were told. Without the others it
        would wait for their numbers for ever.
        """
        if self.last_span is None:
            return
        deadline = time.monotonic() + _LAST_SPAN_SECONDS
        with suppress(RuntimeError):  # of CUDA: nothing goes on there
            while not self.last_span.query() and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)

    def _watch(self) -> None:
        processes: list[ChildProcess] = []
        try:
            for number in range(1, self.rank.count):
                run = partial(follow, self._recipe, number, self._store.port)
                process, connection = start_child(run, f"rank-{number}")
                processes.append(process)
                self._connections[connection] = number
            heard_at = dict.fromkeys(self._connections, self._clock.now())
            while self.lost is None and self._failure is None:
                for readable in wait(list(self._connections), TICK_SECONDS):
                    assert isinstance(readable, socket.socket)
                    self._take(readable)
                    heard_at[readable] = self._clock.now()
                self.alive = self._clock.now() - min(heard_at.values()) <= _SILENT_SECONDS
        except Exception as error:
            self._lose(f"the ranks cannot be watched ({error})")
        finally:
            _end(processes, list(self._connections))

    def _take(self, connection: socket.socket) -> None:
        try:
            messages = receive(connection, FROM_RANK)
        except EOFError:
            self._lose(f"rank {self._connections[connection]} of {self.rank.count} has died")
            return
        for message in messages:
            match message:
                case RankLoaded(num_pages=num_pages):
                    with self._changed:
                        self._num_pages[self._connections[connection]] = num_pages
                        self._changed.notify_all()
                case StartFailed():
                    self._fail(message.error)

    def _fail(self, error: UserError) -> None:
        """Takes the failure of a rank: of its start, as long as `agree` can raise it."""
        with self._changed:
            if not self._agreed:
                self._failure = error
                self._changed.notify_all()
                return
        self._lose(str(error))

    def _lose(self, why: str) -> None:
        with self._changed:
            if self.lost is not None:
                return
            self.lost, self.alive = why, False
            self._changed.notify_all()
        self._on_loss(why)


def _end(processes: Sequence[ChildProcess], connections: Sequence[socket.socket]) -> None:
    """Ends the processes of ranks, even those that hang."""
    for connection in connections:
        connection.close()
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


class LeadingRunner(ModelRunner):
    """Rank 0's runner: tells the others what it does before it does it."""

    def __init__(
        self,
        ranks: LeadingRank,
        gpt: Transformer,
        shape: BatchShape,
        num_pages: int,
        config: EngineConfig,
    ) -> None:
        self.ranks = ranks
        fewest = ranks.agree(num_pages)
        super().__init__(gpt, shape, fewest, config, ranks.connect())
        ranks.drop_graphs = self._graphs.clear
        self._updates: list[BatchUpdate] = []  # that the other ranks have not been told of
        weakref.finalize(self, ranks.stop)

    @property
    @override
    def alive(self) -> bool:
        return self.ranks.alive

    @override
    def prepare(self, batch: Batch, progress: Callable[[int, int], None] | None = None) -> None:
        batch.on_update = self._updates.append
        super().prepare(batch, progress)

    @override
    def run(self, batch: Batch, rows: int, images: int, passes: int, window: int) -> None:
        """Enqueues passes on all ranks; see `ModelRunner.run`.

        Raises:
            RankLostError: a rank is lost, or this one could not do what the others do.
        """
        with _interrupt_held():  # else the others would have begun what this rank has not
            self.ranks.send([*self._updates, Span(rows, images, passes, window)])
            self._updates.clear()
            try:
                super().run(batch, rows, images, passes, window)
                if self.device.type == "cuda":
                    self.ranks.last_span = torch.cuda.current_stream(self.device).record_event()
            except Exception as error:
                raise self.ranks.explain(error) from error


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Lets Ctrl-C interrupt after the block what it would have interrupted in it."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *received: held.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])


def start_ranks(
    model: ModelSettings,
    checkpoint: Path | None,
    config: EngineConfig,
    on_loss: Callable[[str], None] | None = None,
    devices: Sequence[torch.device] | None = None,
) -> ModelRanks:
    """Starts the processes of the other ranks, if the model is to have several.

    Args:
        checkpoint: of the transformer; None: random weights.
        on_loss: called in a thread when a rank is lost, with one line that says how; None: the
            runner raises `RankLostError` on a CPU, and the process ends where a GPU may wait for
            the lost rank for ever.
        devices: by rank; None: those that follow the model's.

    Raises:
        SettingError: so many ranks cannot share the model, or there are too few GPUs.
    """
    count = config.tensor_parallel_size
    if devices is None:
        check_ranks(model, count)
        devices = rank_devices(model.device, count)
    assert len(devices) == count
    if count == 1:
        return ModelRanks(config)
    kind = choose_exchange(devices)
    if kind == "host":  # which no graph can hold
        config = replace(config, enforce_eager=True)
    recipe = RankRecipe(model, checkpoint, config, tuple(devices), kind)
    if on_loss is None:
        on_loss = end_process if devices[0].type == "cuda" else _leave_it_to_the_runner
    return LeadingRank(recipe, on_loss)


def end_process(why: str) -> NoReturn:
    """Ends this process at once, whatever its other threads wait for."""
    tell(f"{why}: the engine cannot go on")
    os._exit(1)


def _leave_it_to_the_runner(why: str) -> None:
    """Does nothing: the exchange of tensors fails."""
