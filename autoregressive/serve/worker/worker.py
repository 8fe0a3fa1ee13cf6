"""The engine's owner: a loop that takes commands, steps the engine, decodes pictures, and tells
what happens.

The loop waits only for commands, and only when there is nothing else to do, so no reader and no
encoder of pictures delays a step. When memory runs out, the requests concerned fail and the others
go on. Any other exception ends the loop: an engine that has failed in a way not foreseen is not to
be trusted.
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

from autoregressive.devices import is_out_of_memory
from autoregressive.models.generate import NonFiniteLogitsError
from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.engine import Engine
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
    Stop,
    receive,
)
from autoregressive.serve.worker.outbox import Outbox
from autoregressive.serve.worker.parent_request import ParentRequest
from autoregressive.serve.worker.previews import Previewer

STATS_SECONDS = 0.25  # between two `LoopStats`, while no step takes longer
_WATCHED_SECONDS = 0.1  # between two `Progress` of a request
_DECODINGS_AT_ONCE = 2  # lots on a GPU; more wait, so that those on their way take bounded memory
_MEMORY_ERRORS = (RuntimeError, MemoryError)  # among which `is_out_of_memory` tells those of memory
_POLL_SECONDS = 0.001  # where only pictures are on their way


@dataclass(frozen=True)
class _Decoding:
    """Pictures of finished images on their way: one for each request of the engine."""

    images: list[Request]
    pictures: DeviceFuture[tuple[Tensor, ...]]
    begun: float


class Worker:
    """Owns an engine for as long as `run` runs.

    Args:
        engine: with a tokenizer, unless only codes will be asked for.
        connection: commands come from it and events go to it; closed by the other side, it ends the
            loop.
    """

    def __init__(self, engine: Engine, connection: socket.socket, outbox: Outbox) -> None:
        self._engine, self._connection, self._outbox = engine, connection, outbox
        self._parents: dict[int, ParentRequest] = {}
        self._parent_of: dict[Request, ParentRequest] = {}
        self._undecoded: deque[Request] = deque()
        self._decodings: deque[_Decoding] = deque()
        # On a CPU decoding is done when `submit_to_host` returns, and nothing else meanwhile: one
        # image at a time then.
        self._at_once = (
            engine.decoder.batch_sizes[-1]
            if engine.decoder is not None and engine.device.type == "cuda"
            else 1
        )
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
                self._carry_out(command)
            timeout = 0.0

    def _carry_out(self, command: Command) -> None:
        match command:
            case EngineRequest():
                self._submit(command)
            case Cancel(request_id=request_id):
                if (parent := self._parents.get(request_id)) is not None:
                    self._end_early(parent, "cancelled", "")
            case Stop():
                self._serving = False

    def _submit(self, request: EngineRequest) -> None:
        parent = ParentRequest(request, left=request.n)
        try:
            parent.images = [
                self._engine.submit(
                    request.class_label, request.params, first_image=index, client=request.client
                )
                for index in range(request.n)
            ]
        except ValueError as error:
            self._outbox.put(Ended(request.request_id, "refused", time.monotonic(), str(error)))
            return
        self._parents[request.request_id] = parent
        self._parent_of |= dict.fromkeys(parent.images, parent)

    def _end_early(self, parent: ParentRequest, outcome: str, message: str) -> None:
        """The first reason counts; the request ends when the engine has let go of all its
        images.
        """
        if parent.failure is None:
            parent.failure = (outcome, message)
            for image in parent.images:
                self._engine.cancel(image)

    def _expire(self) -> None:
        now = time.monotonic()
        for parent in self._parents.values():
            start_by = parent.request.start_by
            if not parent.running and start_by is not None and now > start_by:
                self._end_early(parent, "queue_timeout", "")
            if parent.deadline is not None and now > parent.deadline:
                self._end_early(parent, "run_timeout", "")

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
            if not parent.begun and parent.failure is None and parent.running:
                parent.begun = True
                if parent.request.run_seconds is not None:
                    parent.deadline = begun + parent.request.run_seconds
                self._outbox.put(Started(parent.request.request_id, begun))
        return ended

    def _finish(self, ended: Sequence[Request]) -> None:
        for image in ended:
            parent = self._parent_of.pop(image, None)
            if parent is None:  # it was cancelled and has been dropped
                continue
            if image.state is RequestState.FAILED:
                self._end_early(parent, *_reason(image))
            elif image.state is RequestState.FINISHED and parent.failure is None:
                if parent.request.pixels:
                    self._undecoded.append(image)
                    self._parent_of[image] = parent  # until its picture is sent
                else:
                    assert image.codes is not None
                    self._send_image(parent, image, image.codes[0].numpy().tobytes(), 0.0)
        for parent in list(self._parents.values()):
            if parent.failure is not None and not parent.held:
                self._drop(parent, *parent.failure)

    def _decode(self) -> None:
        """Gives the decoder its next lot, unless it has enough to do."""
        finished: list[Request] = []
        while (
            self._undecoded
            and len(finished) < self._at_once
            and len(self._decodings) < _DECODINGS_AT_ONCE
        ):
            image = self._undecoded.popleft()
            if image in self._parent_of:  # the others are not wanted any more
                finished.append(image)
        if not finished:
            return
        assert self._engine.decoder is not None
        begun = time.monotonic()
        codes = torch.cat([image.codes for image in finished if image.codes is not None])
        try:
            pictures = self._engine.decoder.submit_to_host(codes)
            self._decodings.append(_Decoding(finished, pictures, begun))
        except _MEMORY_ERRORS as error:
            self._lose_pictures(finished, error)

    def _lose_pictures(self, images: Sequence[Request], error: Exception) -> None:
        _free_memory(error)
        for image in images:
            if (parent := self._parent_of.pop(image, None)) is not None:
                self._end_early(parent, "out_of_memory", "")

    def _send_decoded(self) -> None:
        while self._decodings and self._decodings[0].pictures.ready():
            decoding = self._decodings.popleft()
            try:
                pictures, finite = decoding.pictures.result()
            except _MEMORY_ERRORS as error:
                self._lose_pictures(decoding.images, error)
                continue
            seconds = (time.monotonic() - decoding.begun) / len(decoding.images)
            for image, picture, is_finite in zip(
                decoding.images, pictures, finite.tolist(), strict=True
            ):
                parent = self._parent_of.pop(image, None)
                if parent is None or parent.failure is not None:
                    continue
                if is_finite:
                    self._send_image(parent, image, picture.numpy().tobytes(), seconds)
                else:
                    message = "the decoder's pixels are NaN or infinite"
                    self._end_early(parent, "non_finite", message)

    def _send_image(
        self, parent: ParentRequest, image: Request, data: bytes, decode_seconds: float
    ) -> None:
        request_id, now = parent.request.request_id, time.monotonic()
        self._outbox.put(Image(request_id, image.first_image, now, decode_seconds, data))
        parent.left -= 1
        if parent.left == 0:
            self._drop(parent, "finished", "")

    def _drop(self, parent: ParentRequest, outcome: str, message: str) -> None:
        request_id, now = parent.request.request_id, time.monotonic()
        del self._parents[request_id]
        for image in parent.images:
            self._parent_of.pop(image, None)
        used_pages = self._engine.scheduler.pool.used_pages
        self._tell_progress(parent, now)
        self._outbox.put(Ended(request_id, outcome, now, message, parent.tokens, used_pages))

    def _preview(self) -> None:
        try:
            previews = self._previewer.advance(
                self._parents.values(), may_begin=not self._undecoded
            )
        except _MEMORY_ERRORS as error:
            _free_memory(error)  # only previews are lost
            return
        for image, rows, picture in previews:
            parent = self._parent_of.get(image)
            if parent is not None and parent.failure is None and not image.ended:
                pixels = picture.numpy().tobytes()
                self._outbox.put(
                    Preview(parent.request.request_id, image.first_image, rows, pixels)
                )

    def _tell(self) -> None:
        now = time.monotonic()
        for parent in self._parents.values():
            due = parent.begun and now - parent.told_at >= _WATCHED_SECONDS
            if not parent.first_token or (parent.request.watched and due):
                self._tell_progress(parent, now)
        if now - self._stats_at >= STATS_SECONDS:
            self._stats_at = now
            self._outbox.put(LoopStats(self._engine.scheduler.pool.used_pages))

    def _tell_progress(self, parent: ParentRequest, now: float) -> None:
        if parent.tokens > 0 and (parent.request.watched or not parent.first_token):
            parent.first_token, parent.told_at = True, now
            self._outbox.put(Progress(parent.request.request_id, parent.tokens, now))


def _reason(image: Request) -> tuple[str, str]:
    """Outcome and message of a failed request of the engine."""
    if isinstance(image.cause, NonFiniteLogitsError):
        return (
            "non_finite",
            "the model's logits are NaN or infinite: its weights are damaged or overflow this "
            "precision",
        )
    if image.cause is not None and is_out_of_memory(image.cause):
        return "out_of_memory", ""
    raise RuntimeError(
        "a request failed for a reason that does not leave the engine running"
    ) from image.cause


def _free_memory(error: Exception) -> None:
    """Frees memory after an error for lack of it; raises any other error again."""
    if not is_out_of_memory(error):
        raise error
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
        make_engine: as `MakeEngine` of `process`.

    Raises:
        Exception: as `Worker.run`, or of building the engine.
    """
    engine = make_engine(lambda done, total: outbox.put(Preparing(done, total)))
    limits = engine.scheduler.limits
    outbox.put(Ready(limits.max_rows, limits.num_pages, engine.shape.pages_per_row))
    Worker(engine, connection, outbox).run()
