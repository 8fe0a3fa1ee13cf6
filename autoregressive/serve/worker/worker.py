"""The engine's process: a loop that takes commands, steps the engine, decodes pictures, and tells
what happens.

The loop waits only for commands, and only when there is nothing else to do, so no reader and no
encoder of pictures delays a step. When memory runs out, the requests concerned fail and the others
go on. Any other exception ends the loop: an engine that has failed in a way not foreseen is not to
be trusted.
"""

import gc
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait

import torch
from torch import Tensor

from autoregressive.devices import is_out_of_memory, limit_cpu_threads
from autoregressive.errors import UserError
from autoregressive.models.generate import NonFiniteLogitsError
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.memory import saying_what_needs_less_memory
from autoregressive.serve.engine.request import Request, RequestState
from autoregressive.serve.worker.messages import (
    Cancel,
    Command,
    Ended,
    EngineRequest,
    Image,
    LoopStats,
    Preparing,
    Preview,
    Progress,
    Ready,
    Started,
    StartFailed,
    Stop,
)
from autoregressive.serve.worker.previews import Previewer
from autoregressive.serve.worker.process import ChildProcess, settle_heap, start_child
from autoregressive.serve.worker.rank_processes import end_process, start_ranks
from autoregressive.serve.worker.transport import Outbox, receive, start_heartbeats
from autoregressive.weights.finding import FoundWeights, ModelSettings
from autoregressive.weights.loading import load_models

# Builds an engine. Its argument is called with how much of the preparation is done, and how much
# there is.
MakeEngine = Callable[[Callable[[int, int], None]], Engine]
StartProcess = Callable[[MakeEngine, str], tuple[ChildProcess, socket.socket]]  # as `start_process`

STATS_SECONDS = 0.25  # between two `LoopStats`, while no step takes longer
_LAST_WORDS_SECONDS = 5.0  # for the last messages to be written
_WATCHED_SECONDS = 0.1  # between two `Progress` of a request
_DECODINGS_AT_ONCE = 2  # lots on a GPU; more wait, so that those on their way take bounded memory
_MEMORY_ERRORS = (RuntimeError, MemoryError)  # among which `is_out_of_memory` tells those of memory
_POLL_SECONDS = 0.001  # where only pictures are on their way


def build_engine(
    model: ModelSettings,
    found: FoundWeights,
    config: EngineConfig,
    typical: SamplingParams,
    on_progress: Callable[[int, int], None],
) -> Engine:
    """Loads the models and builds an engine that is ready to run.

    Args:
        typical: of a request that says nothing else.
        on_progress: as of `MakeEngine`.

    Raises:
        UserError: a checkpoint is damaged, memory does not hold the model or its pages, or a
            typical request could never run.
    """
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    with (
        saying_what_needs_less_memory(model, config),
        start_ranks(model, found.gpt, config, end_process) as ranks,
    ):
        models = load_models(model, found, config.quantization, ranks.rank)
        limit_cpu_threads(models.gpt.config, model.device, config.engines_on_cpu)
        engine = Engine(models.gpt, models.vq, ranks.config, ranks.make_runner, on_progress)
        engine.scheduler.check_fits(typical)
    settle_heap()
    return engine


def start_process(make_engine: MakeEngine, name: str) -> tuple[ChildProcess, socket.socket]:
    """Starts a process that builds an engine and runs it; the connection to it."""
    return start_child(partial(serve, make_engine), name)


def serve(make_engine: MakeEngine, connection: socket.socket) -> None:
    """Builds the engine, telling how far it is, and runs it.

    Raises:
        SystemExit: it could not be built, for a reason that the user can mend.
        Exception: as `Worker.run`, or of building the engine.
    """
    outbox = Outbox(connection, "events")
    engine: Engine | None = None
    start_heartbeats(outbox, lambda: engine is None or engine.runner.alive)
    try:
        engine = make_engine(lambda done, total: outbox.put(Preparing(done, total)))
        limits = engine.scheduler.limits
        outbox.put(Ready(limits.max_rows, limits.num_pages, engine.shape.pages_per_row))
        Worker(engine, connection, outbox).run()
    except UserError as error:
        outbox.put(StartFailed(error.parts, error.remedies))
        sys.exit(2)
    finally:
        outbox.close(_LAST_WORDS_SECONDS)


@dataclass(eq=False)
class ParentRequest:
    """A request of the service that has not ended, and what has been told of it.

    Each of its images is drawn by a request of its own to the engine, so that it begins as soon as
    there is room for it.
    """

    request: EngineRequest
    drawings: list[Request]  # one an image
    left: int  # images whose result has not been sent
    drawn_at: dict[int, float] = field(default_factory=dict)  # moments, by image
    started_at: float | None = None
    told_at: float | None = None  # moment of the last `Progress`
    failure: tuple[str, str] | None = None  # outcome and message, once something went wrong

    @property
    def tokens(self) -> int:
        """Tokens that its images have at least, all together."""
        return sum(drawing.tokens for drawing in self.drawings)


class Worker:
    """Owns an engine for as long as `run` runs.

    Args:
        engine: with a tokenizer, unless only codes will be asked for.
        connection: commands come from it; closed by the other side, it ends the loop.
        outbox: events go to it.
    """

    def __init__(self, engine: Engine, connection: socket.socket, outbox: Outbox) -> None:
        self._engine, self._connection, self._outbox = engine, connection, outbox
        self._parents: dict[int, ParentRequest] = {}
        self._parent_of: dict[Request, ParentRequest] = {}
        self._undecoded: deque[Request] = deque()
        # Pictures of finished images on their way, and since when.
        self._decodings: deque[tuple[list[Request], DeviceFuture[tuple[Tensor, ...]], float]] = (
            deque()
        )
        self._at_once = engine.decoder.batch_sizes[-1] if engine.decoder is not None else 1
        self._previewer = Previewer(engine, self._at_once)
        self._stats_at = 0.0
        self._serving = True

    def run(self) -> None:
        """Runs until a `Stop` comes, or the other side has gone.

        Raises:
            Exception: the engine cannot go on.
        """
        while self._serving:
            try:
                self._take_commands()
            except EOFError:
                return
            self._expire()
            self._finish(self._step())
            self._decode()
            self._send_decoded()
            self._preview()
            self._tell()

    def _take_commands(self) -> None:
        busy = self._engine.wait_for_work(0)
        on_the_way = self._undecoded or self._decodings or self._previewer.busy
        timeout = 0.0 if busy else _POLL_SECONDS if on_the_way else STATS_SECONDS
        while wait([self._connection], timeout):
            for command in receive(self._connection):
                assert isinstance(command, Command)
                match command:
                    case EngineRequest():
                        self._submit(command)
                    case Cancel(request_id=request_id):
                        if (parent := self._parents.get(request_id)) is not None:
                            self._end_early(parent, "cancelled")
                    case Stop():
                        self._serving = False
            timeout = 0.0

    def _submit(self, request: EngineRequest) -> None:
        try:
            drawings = [
                self._engine.submit(
                    request.class_label, request.params, first_image=index, client=request.client
                )
                for index in range(request.n)
            ]
        except ValueError as error:
            self._outbox.put(Ended(request.request_id, "refused", time.monotonic(), str(error)))
            return
        parent = self._parents[request.request_id] = ParentRequest(request, drawings, request.n)
        self._parent_of |= dict.fromkeys(drawings, parent)

    def _end_early(self, parent: ParentRequest, outcome: str, message: str = "") -> None:
        """The first reason counts; the request ends when the engine has let go of all its
        images.
        """
        if parent.failure is None:
            parent.failure = (outcome, message)
            for drawing in parent.drawings:
                self._engine.cancel(drawing)

    def _expire(self) -> None:
        now = time.monotonic()
        for parent in self._parents.values():
            start_by, run_seconds = parent.request.start_by, parent.request.run_seconds
            if parent.started_at is None:
                if start_by is not None and now > start_by:
                    self._end_early(parent, "queue_timeout")
            elif run_seconds is not None and now > parent.started_at + run_seconds:
                self._end_early(parent, "run_timeout")

    def _step(self) -> list[Request]:
        if not self._engine.wait_for_work(0):
            return []
        begun = time.monotonic()
        try:
            ended = self._engine.step()
        except _MEMORY_ERRORS as error:
            _free_memory(error)
            ended = []  # the next step returns those that have failed
        for parent in self._parents.values():
            begins = parent.started_at is None and parent.failure is None
            if begins and any(
                drawing.state is not RequestState.WAITING for drawing in parent.drawings
            ):
                parent.started_at = begun
                self._outbox.put(Started(parent.request.request_id, begun))
        return ended

    def _finish(self, ended: Sequence[Request]) -> None:
        for drawing in ended:
            parent = self._parent_of.pop(drawing, None)
            if parent is None:  # it was cancelled and has been dropped
                continue
            if drawing.state is RequestState.FAILED:
                self._end_early(parent, *_reason(drawing))
            elif drawing.state is RequestState.FINISHED and parent.failure is None:
                parent.drawn_at[drawing.first_image] = time.monotonic()
                if parent.request.pixels:
                    self._undecoded.append(drawing)
                    self._parent_of[drawing] = parent  # until its picture is sent
                else:
                    assert drawing.codes is not None
                    self._send_image(parent, drawing, drawing.codes[0].numpy().tobytes(), 0.0)
        for parent in list(self._parents.values()):
            if parent.failure is not None and all(drawing.ended for drawing in parent.drawings):
                self._drop(parent, *parent.failure)

    def _decode(self) -> None:
        """Gives the decoder its next lot, unless it has enough to do."""
        finished: list[Request] = []
        while (
            self._undecoded
            and len(finished) < self._at_once
            and len(self._decodings) < _DECODINGS_AT_ONCE
        ):
            drawing = self._undecoded.popleft()
            if drawing in self._parent_of:  # the others are not wanted any more
                finished.append(drawing)
        if not finished:
            return
        assert self._engine.decoder is not None
        begun = time.monotonic()
        codes = torch.cat([drawing.codes for drawing in finished if drawing.codes is not None])
        try:
            self._decodings.append((finished, self._engine.decoder.submit_to_host(codes), begun))
        except _MEMORY_ERRORS as error:
            self._lose_pictures(finished, error)

    def _lose_pictures(self, drawings: Sequence[Request], error: Exception) -> None:
        _free_memory(error)
        for drawing in drawings:
            if (parent := self._parent_of.pop(drawing, None)) is not None:
                self._end_early(parent, "out_of_memory")

    def _send_decoded(self) -> None:
        while self._decodings and self._decodings[0][1].ready():
            drawings, decoding, begun = self._decodings.popleft()
            try:
                pictures, finite = decoding.result()
            except _MEMORY_ERRORS as error:
                self._lose_pictures(drawings, error)
                continue
            seconds = (time.monotonic() - begun) / len(drawings)
            for drawing, picture, is_finite in zip(
                drawings, pictures, finite.tolist(), strict=True
            ):
                parent = self._parent_of.pop(drawing, None)
                if parent is None or parent.failure is not None:
                    continue
                if is_finite:
                    self._send_image(parent, drawing, picture.numpy().tobytes(), seconds)
                else:
                    self._end_early(
                        parent, "non_finite", "the decoder's pixels are NaN or infinite"
                    )

    def _send_image(
        self, parent: ParentRequest, drawing: Request, data: bytes, decode_seconds: float
    ) -> None:
        request_id, index = parent.request.request_id, drawing.first_image  # its only image
        drawn_at, now = parent.drawn_at[index], time.monotonic()
        self._outbox.put(Image(request_id, index, drawn_at, now, decode_seconds, data))
        parent.left -= 1
        if parent.left == 0:
            self._drop(parent, "finished", "")

    def _drop(self, parent: ParentRequest, outcome: str, message: str) -> None:
        request_id, now = parent.request.request_id, time.monotonic()
        del self._parents[request_id]
        for drawing in parent.drawings:
            self._parent_of.pop(drawing, None)
        self._tell_progress(parent, now)
        self._outbox.put(
            Ended(
                request_id,
                outcome,
                now,
                message,
                tokens=parent.tokens,
                drafted=sum(drawing.drafted for drawing in parent.drawings),
                accepted=sum(drawing.accepted for drawing in parent.drawings),
                used_pages=self._engine.scheduler.pool.used_pages,
            )
        )

    def _preview(self) -> None:
        wanted = (
            (drawing, parent.request.preview_rows)
            for parent in self._parents.values()
            if parent.request.pixels and parent.failure is None
            for drawing in parent.drawings
        )
        try:
            previews = self._previewer.advance(wanted, may_begin=not self._undecoded)
        except _MEMORY_ERRORS as error:
            _free_memory(error)  # only previews are lost
            return
        for drawing, rows, picture in previews:
            parent = self._parent_of.get(drawing)
            if parent is not None and parent.failure is None and not drawing.ended:
                request_id, index = parent.request.request_id, drawing.first_image
                self._outbox.put(Preview(request_id, index, rows, picture.numpy().tobytes()))

    def _tell(self) -> None:
        now = time.monotonic()
        for parent in self._parents.values():
            if parent.told_at is None or now - parent.told_at >= _WATCHED_SECONDS:
                self._tell_progress(parent, now)
        if now - self._stats_at >= STATS_SECONDS and self._engine.runner.alive:
            self._stats_at = now
            self._outbox.put(LoopStats(self._engine.scheduler.pool.used_pages))

    def _tell_progress(self, parent: ParentRequest, now: float) -> None:
        if (parent.request.watched or parent.told_at is None) and parent.tokens > 0:
            parent.told_at = now
            self._outbox.put(Progress(parent.request.request_id, parent.tokens, now))


def _reason(drawing: Request) -> tuple[str, str]:
    """Outcome and message of a failed request of the engine."""
    if isinstance(drawing.cause, NonFiniteLogitsError):
        return (
            "non_finite",
            "the model's logits are NaN or infinite: its weights are damaged or overflow this "
            "precision",
        )
    if drawing.cause is not None and is_out_of_memory(drawing.cause):
        return "out_of_memory", ""
    raise RuntimeError(
        "a request failed for a reason that does not leave the engine running"
    ) from drawing.cause


def _free_memory(error: Exception) -> None:
    """Frees memory after an error for lack of it; raises any other error again."""
    if not is_out_of_memory(error):
        raise error
    # an error's traceback holds the tensors of where it was raised, and may be part of a cycle
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
