"""The engine's owner: a loop that takes commands, steps the engine, decodes pictures, and tells
what happens.

It never waits but for commands when there is nothing else to do, so a step is delayed by no reader
and no encoder of pictures. What it survives is memory that runs out: the jobs concerned fail, the
others go on. Whatever else is raised ends it, for an engine that has failed in a way not foreseen
is not to be trusted.
"""

import gc
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait

import torch
from torch import Tensor

from autoregressive.models.generate import NonFiniteLogitsError
from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.engine import Engine, PartialCodes
from autoregressive.serve.engine.request import Request, RequestState
from autoregressive.serve.worker.messages import (
    Cancel,
    Command,
    Drawn,
    Ended,
    Image,
    LoopStats,
    Preparing,
    Preview,
    Ready,
    Started,
    Stop,
    Submit,
    receive,
)
from autoregressive.serve.worker.outbox import Outbox
from autoregressive.serve.worker.partial import fill_undrawn
from autoregressive.serve.worker.task import Task

STATS_SECONDS = 0.25  # between two `LoopStats`, while no step takes longer
_WATCHED_SECONDS = 0.1  # between two `Drawn` of a task
_DECODINGS_AT_ONCE = 2  # lots on a GPU; more wait, so that what is on its way takes bounded memory
_PREVIEW_SHARE = 0.2  # of the time at most, where decoding holds up the loop
_MEMORY_ERRORS = (RuntimeError, MemoryError)  # among which `_out_of_memory` tells those of memory
_POLL_SECONDS = 0.001  # where only pictures are on their way


@dataclass(frozen=True)
class _Decoding:
    """Pictures of finished images on their way: one a request."""

    requests: list[Request]
    pictures: DeviceFuture[tuple[Tensor, ...]]
    begun: float


@dataclass(frozen=True)
class _Previewing:
    """Pictures of images that go on: first their codes, then their pixels are on their way."""

    rows: dict[Request, int]  # of tokens, that each picture shows
    codes: DeviceFuture[list[PartialCodes]] | None
    pictures: DeviceFuture[tuple[Tensor, ...]] | None


class Worker:
    """Owns an engine for as long as `run` runs.

    Args:
        engine: with a tokenizer, unless only codes will be asked for.
        connection: commands come from it and events go to it; closed by the other side, it ends the
            loop.
    """

    def __init__(self, engine: Engine, connection: socket.socket, outbox: Outbox) -> None:
        self._engine, self._connection, self._outbox = engine, connection, outbox
        self._grid = round(engine.shape.tokens**0.5)
        self._tasks: dict[int, Task] = {}
        self._task_of: dict[Request, Task] = {}
        self._undecoded: deque[Request] = deque()
        self._decodings: deque[_Decoding] = deque()
        # On a CPU decoding is done when `submit_to_host` returns, and nothing else meanwhile: one
        # image at a time then.
        self._at_once = (
            engine.decoder.batch_sizes[-1]
            if engine.decoder is not None and engine.device.type == "cuda"
            else 1
        )
        self._next_preview = 0.0
        self._previewing: _Previewing | None = None
        self._stats_at = 0.0
        self._serving = True

    def run(self) -> None:
        """Until a `Stop` comes, or the other side has gone.

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
        on_the_way = self._undecoded or self._decodings or self._previewing
        timeout = 0.0 if busy else _POLL_SECONDS if on_the_way else STATS_SECONDS
        while wait([self._connection], timeout):
            for command in receive(self._connection):
                assert isinstance(command, Command)
                self._carry_out(command)
            timeout = 0.0

    def _carry_out(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case Cancel(job=number):
                if (task := self._tasks.get(number)) is not None:
                    self._end_early(task, "cancelled", "")
            case Stop():
                self._serving = False

    def _submit(self, order: Submit) -> None:
        task = Task(order, left=order.n)
        try:
            task.requests = [
                self._engine.submit(
                    order.class_label, order.params, first_image=image, client=order.client
                )
                for image in range(order.n)
            ]
        except ValueError as error:
            self._outbox.put(Ended(order.job, "refused", time.monotonic(), str(error)))
            return
        self._tasks[order.job] = task
        self._task_of |= dict.fromkeys(task.requests, task)

    def _end_early(self, task: Task, outcome: str, message: str) -> None:
        """The first reason counts; the task ends when the engine has let go of all its images."""
        if task.failure is None:
            task.failure = (outcome, message)
            for request in task.requests:
                self._engine.cancel(request)

    def _expire(self) -> None:
        now = time.monotonic()
        for task in self._tasks.values():
            if not task.running and task.order.start_by is not None and now > task.order.start_by:
                self._end_early(task, "queue_timeout", "")
            if task.deadline is not None and now > task.deadline:
                self._end_early(task, "run_timeout", "")

    def _step(self) -> list[Request]:
        if not self._engine.wait_for_work(0):
            return []
        begun = time.monotonic()
        try:
            ended = self._engine.step()
        except _MEMORY_ERRORS as error:
            if not _out_of_memory(error):
                raise
            _clear_memory()
            ended = []  # the next step returns those that have failed
        for task in self._tasks.values():
            if not task.begun and task.failure is None and task.running:
                task.begun = True
                task.deadline = (
                    begun + task.order.run_seconds if task.order.run_seconds is not None else None
                )
                self._outbox.put(Started(task.order.job, begun))
        return ended

    def _finish(self, ended: Sequence[Request]) -> None:
        for request in ended:
            task = self._task_of.pop(request, None)
            if task is None:  # it was cancelled and has been dropped
                continue
            if request.state is RequestState.FAILED:
                self._end_early(task, *_reason(request))
            elif request.state is RequestState.FINISHED and task.failure is None:
                if task.order.pixels:
                    self._undecoded.append(request)
                    self._task_of[request] = task  # until its picture is sent
                else:
                    assert request.codes is not None
                    self._send_image(task, request, request.codes[0].numpy().tobytes(), 0.0)
        for task in list(self._tasks.values()):
            if task.failure is not None and not task.held:
                self._drop(task, *task.failure)

    def _decode(self) -> None:
        """Gives the decoder its next lot, unless it has enough to do."""
        finished: list[Request] = []
        while (
            self._undecoded
            and len(finished) < self._at_once
            and len(self._decodings) < _DECODINGS_AT_ONCE
        ):
            request = self._undecoded.popleft()
            if request in self._task_of:  # nobody wants the others any more
                finished.append(request)
        if not finished:
            return
        assert self._engine.decoder is not None
        begun = time.monotonic()
        codes = torch.cat([request.codes for request in finished if request.codes is not None])
        try:
            self._decodings.append(
                _Decoding(finished, self._engine.decoder.submit_to_host(codes), begun)
            )
        except _MEMORY_ERRORS as error:
            self._lose_pictures(finished, error)

    def _lose_pictures(self, requests: Sequence[Request], error: Exception) -> None:
        if not _out_of_memory(error):
            raise error
        _clear_memory()
        for request in requests:
            if (task := self._task_of.pop(request, None)) is not None:
                self._end_early(task, "out_of_memory", "")

    def _send_decoded(self) -> None:
        while self._decodings and self._decodings[0].pictures.ready():
            decoding = self._decodings.popleft()
            try:
                pictures, finite = decoding.pictures.result()
            except _MEMORY_ERRORS as error:
                self._lose_pictures(decoding.requests, error)
                continue
            seconds = (time.monotonic() - decoding.begun) / len(decoding.requests)
            for request, picture, is_finite in zip(
                decoding.requests, pictures, finite.tolist(), strict=True
            ):
                task = self._task_of.pop(request, None)
                if task is None or task.failure is not None:
                    continue
                if is_finite:
                    self._send_image(task, request, picture.numpy().tobytes(), seconds)
                else:
                    self._end_early(task, "non_finite", "the decoder's pixels are NaN or infinite")

    def _send_image(self, task: Task, request: Request, data: bytes, decode_seconds: float) -> None:
        now = time.monotonic()
        self._outbox.put(Image(task.order.job, request.first_image, now, decode_seconds, data))
        task.left -= 1
        if task.left == 0:
            self._drop(task, "finished", "")

    def _drop(self, task: Task, outcome: str, message: str) -> None:
        del self._tasks[task.order.job]
        for request in task.requests:
            self._task_of.pop(request, None)
        now, tokens, used_pages = (
            time.monotonic(),
            task.tokens,
            self._engine.scheduler.pool.used_pages,
        )
        self._tell_drawn(task, now)
        self._outbox.put(Ended(task.order.job, outcome, now, message, tokens, used_pages))

    def _preview(self) -> None:
        """One lot of previews at a time, and of each image the newest: a slow decoder makes them
        rarer, not later.
        """
        begun = time.monotonic()
        try:
            self._go_on_with_previews()
        except _MEMORY_ERRORS as error:
            if not _out_of_memory(error):
                raise
            _clear_memory()  # nobody has lost more than a glimpse
            self._previewing = None
        ended = time.monotonic()
        self._next_preview = max(
            self._next_preview, ended + (ended - begun) * (1 / _PREVIEW_SHARE - 1)
        )

    def _go_on_with_previews(self) -> None:
        lot = self._previewing
        if lot is None and not self._undecoded and time.monotonic() >= self._next_preview:
            lot = self._begin_previews()
        if lot is not None and lot.codes is not None and lot.codes.ready():
            lot = self._decode_previews(lot)
        if lot is not None and lot.pictures is not None and lot.pictures.ready():
            self._send_previews(lot, lot.pictures.result()[0])
            lot = None
        self._previewing = lot

    def _send_previews(self, lot: _Previewing, pictures: Tensor) -> None:
        for (request, rows), picture in zip(lot.rows.items(), pictures, strict=True):
            task = self._task_of.get(request)
            if task is not None and task.failure is None and not request.ended:
                self._outbox.put(
                    Preview(task.order.job, request.first_image, rows, picture.numpy().tobytes())
                )

    def _begin_previews(self) -> _Previewing | None:
        candidates: list[tuple[int, int, Request, Task]] = []  # rows sent, rows to send
        for task in self._tasks.values():
            if task.order.preview_rows and task.order.pixels and task.failure is None:
                for request in task.requests:
                    rows = task.rows_to_preview(request, self._grid)
                    if rows is not None and request.state is RequestState.RUNNING:
                        candidates.append((task.previewed.get(request, 0), rows, request, task))
        candidates.sort(key=lambda candidate: candidate[0])  # whoever has seen least comes first
        wanted: dict[Request, int] = {}
        for _, rows, request, task in candidates[: self._at_once]:
            wanted[request] = task.previewed[request] = rows
        if not wanted:
            return None
        return _Previewing(wanted, self._engine.peek(list(wanted)), None)

    def _decode_previews(self, lot: _Previewing) -> _Previewing:
        assert lot.codes is not None
        assert self._engine.decoder is not None
        parts = lot.codes.result()
        rows = {part.request: lot.rows[part.request] for part in parts}
        filled = [fill_undrawn(part.codes, rows[part.request], self._grid) for part in parts]
        return _Previewing(rows, None, self._engine.decoder.submit_to_host(torch.cat(filled)))

    def _tell(self) -> None:
        now = time.monotonic()
        for task in self._tasks.values():
            first = not task.first_token and task.tokens > 0
            if first or (
                task.order.watched and task.begun and now - task.told_at >= _WATCHED_SECONDS
            ):
                self._tell_drawn(task, now)
        if now - self._stats_at >= STATS_SECONDS:
            self._tell_stats()

    def _tell_drawn(self, task: Task, now: float) -> None:
        if task.tokens > 0 and (task.order.watched or not task.first_token):
            task.first_token, task.told_at = True, now
            self._outbox.put(Drawn(task.order.job, task.tokens, now))

    def _tell_stats(self) -> None:
        self._stats_at = time.monotonic()
        self._outbox.put(LoopStats(self._engine.scheduler.pool.used_pages))


def _reason(request: Request) -> tuple[str, str]:
    if isinstance(request.cause, NonFiniteLogitsError):
        return (
            "non_finite",
            "the model's logits are NaN or infinite: its weights are damaged or overflow this "
            "precision",
        )
    if request.cause is not None and _out_of_memory(request.cause):
        return "out_of_memory", ""
    raise RuntimeError(
        "a request failed for a reason that does not leave the engine running"
    ) from request.cause


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(
        words in str(error)
        for words in ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def _clear_memory() -> None:
    # an error's traceback holds the tensors of where it was raised, and may be part of a cycle
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def serve(
    make_engine: Callable[[Callable[[int, int], None]], Engine],
    connection: socket.socket,
    outbox: Outbox,
) -> None:
    """Builds the engine, telling how far it is, and runs it.

    Args:
        make_engine: given what to call with how much of the preparation is done, and how much there
            is.

    Raises:
        Exception: as `Worker.run`, or of building the engine.
    """
    engine = make_engine(lambda done, total: outbox.put(Preparing(done, total)))
    limits = engine.scheduler.limits
    outbox.put(Ready(limits.max_rows, limits.num_pages, engine.shape.pages_per_row))
    Worker(engine, connection, outbox).run()
