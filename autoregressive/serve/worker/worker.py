"""The engine's owner: a loop that takes commands, steps the engine, decodes pictures, and tells what happens.

It never waits but for commands when there is nothing else to do, so a step is delayed by no reader and no encoder of pictures. What
it survives is memory that runs out: the jobs concerned fail, the others go on. Whatever else is raised ends it, for an engine that
has failed in a way not foreseen is not to be trusted.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from autoregressive.models.generate import NonFiniteLogitsError
from autoregressive.serve.engine.engine import Engine, PartialCodes
from autoregressive.serve.engine.pixel_decoder import PendingPictures
from autoregressive.serve.engine.request import Request, RequestState
from autoregressive.serve.worker.jobs import Job, sampling_params
from autoregressive.serve.worker.messages import (
    Beat,
    Cancel,
    Command,
    Drawn,
    Ended,
    Image,
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

BEAT_SECONDS = 0.25  # at least so often the loop tells that it goes round, while no step takes longer
_WATCHED_SECONDS = 0.1  # between two `Drawn` of a job
_PREVIEWS_AT_ONCE = 16  # images; more wait for the next time, so that finished images do not wait long for the decoder
_POLL_SECONDS = 0.001  # where only pictures are on their way


@dataclass(frozen=True)
class _Decoding:
    """Pictures of finished images on their way: one a request."""

    requests: list[Request]
    pending: PendingPictures
    begun: float


@dataclass(frozen=True)
class _Previewing:
    """Pictures of images that go on: first their codes, then their pixels are on their way."""

    requests: list[Request]
    rows: list[int]
    codes: PartialCodes | None
    pending: PendingPictures | None


class Worker:
    """Owns an engine for as long as `run` runs.

    Args:
        engine: with a tokenizer, unless only codes will be asked for.
        connection: commands come from it and events go to it; closed by the other side, it ends the loop.
    """

    def __init__(self, engine: Engine, connection: Connection, outbox: Outbox) -> None:
        self._engine, self._connection, self._outbox = engine, connection, outbox
        self._grid = round(engine.shape.tokens**0.5)
        self._jobs: dict[int, Job] = {}
        self._job_of: dict[Request, Job] = {}
        self._decodings: deque[_Decoding] = deque()
        self._previewing: _Previewing | None = None
        self._beat_at = 0.0
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
            self._send_decoded()
            self._preview()
            self._tell()

    def _take_commands(self) -> None:
        busy = self._engine.wait_for_work(0)
        timeout = 0.0 if busy else _POLL_SECONDS if self._decodings or self._previewing else BEAT_SECONDS
        while self._connection.poll(timeout):
            command = receive(self._connection)
            assert isinstance(command, Command)
            self._carry_out(command)
            timeout = 0.0

    def _carry_out(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case Cancel(job=number):
                if (job := self._jobs.get(number)) is not None:
                    self._end_early(job, "cancelled", "")
            case Stop():
                self._serving = False

    def _submit(self, order: Submit) -> None:
        job = Job(order, left=order.n)
        try:
            params = sampling_params(order)
            job.requests = [self._engine.submit(order.class_label, params, first_image=image) for image in range(order.n)]
        except ValueError as error:
            self._outbox.put(Ended(order.job, "refused", time.monotonic(), str(error)))
            return
        self._jobs[order.job] = job
        self._job_of |= dict.fromkeys(job.requests, job)

    def _end_early(self, job: Job, outcome: str, message: str) -> None:
        """The first reason counts; the job ends when the engine has let go of all its images."""
        if job.failure is None:
            job.failure = (outcome, message)
            for request in job.requests:
                self._engine.cancel(request)

    def _expire(self) -> None:
        now = time.monotonic()
        for job in self._jobs.values():
            if not job.running and job.order.start_by is not None and now > job.order.start_by:
                self._end_early(job, "queue_timeout", "")
            if job.deadline is not None and now > job.deadline:
                self._end_early(job, "run_timeout", "")

    def _step(self) -> list[Request]:
        if not self._engine.wait_for_work(0):
            return []
        begun = time.monotonic()
        try:
            ended = self._engine.step()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            _clear_memory()
            ended = []  # the next step returns those that have failed
        for job in self._jobs.values():
            if not job.begun and job.failure is None and job.running:
                job.begun = True
                job.deadline = begun + job.order.run_seconds if job.order.run_seconds is not None else None
                self._outbox.put(Started(job.order.job, begun))
        return ended

    def _finish(self, ended: Sequence[Request]) -> None:
        finished = []
        for request in ended:
            job = self._job_of.pop(request, None)
            if job is None:  # it was cancelled and has been dropped
                continue
            if request.state is RequestState.FAILED:
                self._end_early(job, *_reason(request))
            elif request.state is RequestState.FINISHED and job.failure is None:
                if job.order.pixels:
                    finished.append(request)
                    self._job_of[request] = job  # until its picture is sent
                else:
                    assert request.codes is not None
                    self._send_image(job, request, request.codes[0].numpy().tobytes(), 0.0)
        if finished:
            self._decode(finished)
        for job in list(self._jobs.values()):
            if job.failure is not None and not job.held:
                self._drop(job, *job.failure)

    def _decode(self, finished: list[Request]) -> None:
        assert self._engine.decoder is not None
        begun = time.monotonic()
        codes = torch.cat([request.codes for request in finished if request.codes is not None])
        try:
            self._decodings.append(_Decoding(finished, self._engine.decoder.submit_to_host(codes), begun))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            self._lose_pictures(finished, error)

    def _lose_pictures(self, requests: Sequence[Request], error: Exception) -> None:
        if not _out_of_memory(error):
            raise error
        _clear_memory()
        for request in requests:
            if (job := self._job_of.pop(request, None)) is not None:
                self._end_early(job, "out_of_memory", "")

    def _send_decoded(self) -> None:
        while self._decodings and self._decodings[0].pending.ready():
            decoding = self._decodings.popleft()
            try:
                pictures, finite = decoding.pending.pictures()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                self._lose_pictures(decoding.requests, error)
                continue
            seconds = (time.monotonic() - decoding.begun) / len(decoding.requests)
            for request, picture, is_finite in zip(decoding.requests, pictures, finite.tolist(), strict=True):
                job = self._job_of.pop(request, None)
                if job is None or job.failure is not None:
                    continue
                if is_finite:
                    self._send_image(job, request, picture.numpy().tobytes(), seconds)
                else:
                    self._end_early(job, "non_finite", "the decoder's pixels are NaN or infinite")

    def _send_image(self, job: Job, request: Request, data: bytes, decode_seconds: float) -> None:
        now = time.monotonic()
        self._outbox.put(Image(job.order.job, request.first_image, now, decode_seconds, data))
        job.left -= 1
        if job.left == 0:
            self._drop(job, "finished", "")

    def _drop(self, job: Job, outcome: str, message: str) -> None:
        del self._jobs[job.order.job]
        for request in job.requests:
            self._job_of.pop(request, None)
        self._tell_drawn(job, time.monotonic())
        self._beat()  # first: whoever hears of the end can count the pages
        self._outbox.put(Ended(job.order.job, outcome, time.monotonic(), message))

    def _preview(self) -> None:
        """One lot of previews at a time, and of each image the newest: a slow decoder makes them rarer, not later."""
        under_way = self._previewing
        if under_way is None:
            self._previewing = self._begin_previews()
        elif under_way.codes is not None and under_way.codes.arrived():
            self._previewing = self._decode_previews(under_way)
        elif under_way.pending is not None and under_way.pending.ready():
            pictures, _ = under_way.pending.pictures()
            for request, rows, picture in zip(under_way.requests, under_way.rows, pictures, strict=True):
                job = self._job_of.get(request)
                if job is not None and job.failure is None and not request.ended:
                    self._outbox.put(Preview(job.order.job, request.first_image, rows, picture.numpy().tobytes()))
            self._previewing = None

    def _begin_previews(self) -> _Previewing | None:
        wanted: dict[Request, int] = {}
        for job in self._jobs.values():
            if job.order.preview_rows and job.order.pixels and job.failure is None:
                for request in job.requests:
                    rows = job.rows_to_preview(request, self._grid)
                    if rows is not None and request.state is RequestState.RUNNING and len(wanted) < _PREVIEWS_AT_ONCE:
                        wanted[request] = job.previewed[request] = rows
        if not wanted:
            return None
        codes = self._engine.peek(list(wanted))
        return _Previewing(codes.requests, [wanted[request] for request in codes.requests], codes, None)

    def _decode_previews(self, under_way: _Previewing) -> _Previewing | None:
        assert under_way.codes is not None
        assert self._engine.decoder is not None
        filled: list[Tensor] = [
            fill_undrawn(codes, rows, self._grid) for codes, rows in zip(under_way.codes.codes(), under_way.rows, strict=True)
        ]
        try:
            pending = self._engine.decoder.submit_to_host(torch.cat(filled))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            _clear_memory()  # nobody has lost more than a glimpse
            return None
        return _Previewing(under_way.requests, under_way.rows, None, pending)

    def _tell(self) -> None:
        now = time.monotonic()
        for job in self._jobs.values():
            first = not job.first_token and job.tokens > 0
            if first or (job.order.watched and job.begun and now - job.told_at >= _WATCHED_SECONDS):
                self._tell_drawn(job, now)
        if now - self._beat_at >= BEAT_SECONDS:
            self._beat()

    def _tell_drawn(self, job: Job, now: float) -> None:
        if job.tokens > 0:
            job.first_token, job.told_at = True, now
            self._outbox.put(Drawn(job.order.job, job.tokens, now))

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        self._outbox.put(Beat(self._engine.scheduler.pool.used_pages))


def _reason(request: Request) -> tuple[str, str]:
    if isinstance(request.cause, NonFiniteLogitsError):
        return "non_finite", "the model's logits are NaN or infinite: its weights are damaged or overflow this precision"
    if request.cause is not None and _out_of_memory(request.cause):
        return "out_of_memory", ""
    raise RuntimeError("a request failed for a reason that does not leave the engine running") from request.cause


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _clear_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def serve(make_engine: Callable[[Callable[[int, int], None]], Engine], connection: Connection, outbox: Outbox) -> None:
    """Builds the engine, telling how far it is, and runs it.

    Args:
        make_engine: given what to call with how much of the preparation is done, and how much there is.

    Raises:
        Exception: as `Worker.run`, or of building the engine.
    """
    engine = make_engine(lambda done, total: outbox.put(Preparing(done, total)))
    limits = engine.scheduler.limits
    outbox.put(Ready(limits.max_rows, limits.num_pages, engine.device.type))
    Worker(engine, connection, outbox).run()
