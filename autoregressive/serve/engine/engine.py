"""The engine: class labels in, codes or pixels out, any number of requests at a time.

One thread owns an engine and calls `step`, `generate` and `audit`; `submit` and `cancel` may be
called by any. In ten lines:

    engine = Engine(gpt, vq, EngineConfig(max_num_seqs=64))
    # Offline: all at once.
    pixels = engine.generate([207, 360, 387], SamplingParams(cfg_scale=4.0, seed=1), progress=True)

    # Online: they come and go.
    one = engine.submit(88, SamplingParams(cfg_scale=7.5, cfg_interval=100, seed=2))
    many = engine.submit(207, SamplingParams(cfg_scale=1.5, top_k=0, n=4))
    while engine.wait_for_work(timeout=1.0):
        for request in engine.step():
            print(request.id, request.state, request.codes)  # int32 [n, tokens] on the CPU, or None
        if many.steps > 100 and not many.ended:
            engine.cancel(many)  # takes effect within 16 steps or 0.25 s
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from operator import itemgetter

import torch
from torch import Tensor

from autoregressive.errors import SettingError, UserError
from autoregressive.models.generate import NonFiniteLogitsError
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.progress import progress_bar
from autoregressive.serve.engine.batch import Batch, BatchShape, Runner, uploaded
from autoregressive.serve.engine.device_future import DeviceFuture, StepLimiter
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.memory import pool_pages, ways_to_more_pages
from autoregressive.serve.engine.model_runner import (
    ModelRunner,
    make_lookahead,
    pass_sizes,
    quantize_as_configured,
)
from autoregressive.serve.engine.pixel_decoder import PixelDecoder
from autoregressive.serve.engine.request import Request, RequestState
from autoregressive.serve.engine.scheduler import Limits, Scheduler
from autoregressive.serve.engine.span_log import SpanLog
from tokenizer.tokenizer_image.vq_model import VQModel

# transformer, shape of the batch, pages of the pool, config -> what runs the steps and owns the
# pages' memory
RunnerFactory = Callable[[Transformer, BatchShape, int, EngineConfig], Runner]


class Engine:
    """Runs any number of requests beside each other, a token of each image a pass, or more with
    lookahead. `step` does all the work.

    Args:
        gpt: in eval mode, on the device that the engine is to run on; its `block_size` is the
            number of tokens of an image. With `config.quantization` its weights are quantised in
            their place.
        vq: for `generate`'s pixels; None: codes only.
        make_runner: `ModelRunner`, or another that keeps its promises.
        on_progress: called with how much of the preparation is done, and how much there is: kernels
            are compiled and graphs captured here, none later.

    Raises:
        UserError: memory does not hold the pages, or the attention backend does not run on the
            device.

    Attributes:
        totals: what it has done so far.
        lookahead: what chooses the window of each span.
    """

    def __init__(
        self,
        gpt: Transformer,
        vq: VQModel | None,
        config: EngineConfig,
        make_runner: RunnerFactory = ModelRunner,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        model = gpt.config
        if config.tensor_parallel_size != model.ranks:
            told = f"the model is one of {model.ranks}; `Pipeline` splits it and starts the ranks"
            raise SettingError("tensor_parallel_size", config.tensor_parallel_size, told)
        self.config, self.num_classes = config, model.num_classes
        self.device = gpt.tok_embeddings.weight.device
        self.shape = shape = BatchShape.of(config.max_num_seqs, model.block_size, config.page_size)
        with self._on_device():
            quantize_as_configured(gpt, config)
            graphs_of_steps = (
                len(pass_sizes(gpt, shape, config)) if config.uses_graphs(self.device) else 0
            )
            tell = on_progress or (lambda done, total: None)
            self.decoder = None
            if vq is not None:
                self.decoder = PixelDecoder(
                    vq,
                    model.grid,
                    self.device,
                    cuda_graphs=not config.enforce_eager,
                    backend=config.attention_backend,
                    on_progress=lambda done, total: tell(done, total + graphs_of_steps),
                )
            graphs_of_pixels = 0 if self.decoder is None else self.decoder.graphs
            self.batch = Batch(shape, self.device)
            self.runner = make_runner(gpt, shape, pool_pages(gpt, shape, config), config)
            limits = Limits(
                tokens=shape.tokens,
                page_size=shape.page_size,
                max_rows=shape.max_rows,
                num_pages=self.runner.num_pages,
                num_slots=shape.num_slots,
                num_classes=model.num_classes,
                to_get_more_pages=tuple(ways_to_more_pages(config, self.device)),
            )
            self.scheduler = Scheduler(limits, config.scheduling_policy)
            self.runner.prepare(
                self.batch,
                lambda done, total: tell(graphs_of_pixels + done, graphs_of_pixels + total),
            )
        self._step_limiter = StepLimiter(self.device)
        self.lookahead = make_lookahead(gpt, config)
        self._span_log = SpanLog()
        self.totals = EngineTotals()
        # requests whose last pass is on the device, with their codes and slot state
        self._arriving: deque[tuple[list[Request], DeviceFuture[tuple[Tensor, ...]]]] = deque()
        self._ids = itertools.count()
        self._ended: list[Request] = []  # since the last call of `step` that returned
        self._commands = threading.Condition()  # guards the two lists
        self._submitted: list[Request] = []
        self._cancelled: list[Request] = []

    def submit(
        self, class_label: int, params: SamplingParams, first_image: int = 0, client: str = ""
    ) -> Request:
        """Puts a request in the queue. Any thread may call it.

        Args:
            class_label: 0 to num_classes - 1
            first_image: index, in the draws' key, of the request's first image; so one job can be
                split into several requests.
            client: whose request it is. With the scheduling policy "fair" all clients that wait get
                equal shares.

        Raises:
            UserError: there is no such class, or the request could never run; the message says the
                sizes.
        """
        if not isinstance(class_label, Integral) or not 0 <= class_label < self.num_classes:
            most = self.num_classes - 1
            raise SettingError("class_label", class_label, f"must be 0 to {most}")
        if not isinstance(first_image, Integral) or not 0 <= first_image <= 2**31 - params.n:
            most = 2**31 - params.n
            told = f"must be a whole number, 0 to {most}, so that images number below 2**31"
            raise SettingError("first_image", first_image, told)
        self.scheduler.check_fits(params)
        with self._commands:
            request = Request(next(self._ids), class_label, params, first_image, client)
            self._submitted.append(request)
            self._commands.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request early. Any thread may call it.

        It takes effect within 16 steps or 0.25 s, whichever is less, or one step where that takes
        longer (a large model on a CPU); where one thread decodes pixels too (`generate` on a CPU),
        after that. Without effect if the request has ended, or all its steps have been given to the
        device: then it finishes.
        """
        with self._commands:
            self._cancelled.append(request)
            self._commands.notify_all()

    def wait_for_work(self, timeout: float | None = None) -> bool:
        """Waits, at most `timeout` seconds, until `step` has something to do, and returns whether
        it has. Only the owner's thread calls it.
        """
        with self._commands:
            return self._commands.wait_for(self._has_work, timeout)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Runs one span: several passes of every running request.

        Returns:
            The requests that have ended since the last call: finished, failed or cancelled.

        Raises:
            Exception: what the runner raised, such as `torch.OutOfMemoryError`, or the copy of
                codes to the host. The requests concerned have failed then, and the next call
                returns them; those that wait are unharmed, and the engine can go on.
        """
        with self._on_device():
            self._ended += self._drain_commands()
            with self._abandoning_on_error():
                complete = self._learn()
            self._retire(complete)
            with self._abandoning_on_error():
                passes, complete = self._run_span()
            self._retire(complete)
            self._take_arrived(wait=passes == 0)
            ended, self._ended = self._ended, []
            return ended

    def generate(
        self,
        labels: Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        progress: bool = False,
        decode: bool = True,
    ) -> Tensor:
        """Draws `params.n` images for each label and waits for all of them. Requests that were
        submitted before go on meanwhile.

        Those that end meanwhile are not returned by a later `step`: look at their state, or run
        them to their end first.

        Args:
            labels: one class a request.
            params: for all labels, or one for each. One for all numbers the images through, so that
                equal labels differ.
            progress: show a bar on stderr.
            decode: pixels if the engine has a tokenizer; False: codes.

        Returns:
            Pixels float32 [images, 3, size, size], about -1..1, on the device, or codes int32
            [images, tokens] on the CPU: in the order of the labels, those of one label side by
            side.

        Raises:
            UserError: as `submit`; nothing is drawn then.
            NonFiniteLogitsError: the model gave NaN or infinite logits.
        """
        if isinstance(params, SamplingParams):
            draws = [(params, index * params.n) for index in range(len(labels))]
        else:
            draws = [(one, 0) for one in params]
        if len(labels) == 0 or len(draws) != len(labels):
            told = "give one or more, and one SamplingParams for all or one for each"
            raise UserError(f"{len(labels)} labels: {told}")
        decoder = self.decoder if decode else None
        requests: list[Request] = []
        try:
            for label, (one, first_image) in zip(labels, draws, strict=True):
                requests.append(self.submit(label, one, first_image))
            pixels = self._run_to_end(requests, decoder, progress)
        except BaseException:  # Ctrl-C too: nobody would fetch the images
            for request in requests:
                self.cancel(request)
            raise
        if any(request.state is RequestState.CANCELLED for request in requests):
            raise RuntimeError(
                "a request of this call was cancelled while it waited: its images are lost"
            )
        failure = next((request.error for request in requests if request.error is not None), None)
        if failure is not None:
            raise NonFiniteLogitsError(failure)
        if decoder is not None:
            return torch.cat([pixels[request].result() for request in requests])
        return torch.cat([request.codes for request in requests if request.codes is not None])

    def peek(self, requests: Sequence[Request]) -> DeviceFuture[list["PartialCodes"]]:
        """Begins to copy the codes that running requests have drawn so far to the host. Only the
        owner's thread calls it, between steps.

        Args:
            requests: those that do not run, or have not drawn yet, are left out.
        """
        wanted = set(requests)
        drawn = [each for each in self.scheduler.running if each in wanted and each.steps > 0]
        with self._on_device():
            fetched = self.batch.fetch([slot for request in drawn for slot in request.slots])

        def partial(fetched: tuple[Tensor, ...]) -> list[PartialCodes]:
            counts = [request.params.n for request in drawn]
            codes, slot_state = fetched
            steps = [int(lengths.min()) for lengths in slot_state[0].split(counts)]
            return list(map(PartialCodes, drawn, steps, codes.split(counts)))

        return fetched.then(partial)

    def audit(self) -> None:
        """Asserts that pages, rows, slots and the forecast agree with each other. Tests call it
        after any step.
        """
        self.scheduler.audit()
        holders = [
            *self.scheduler.running,
            *(each for ended, _ in self._arriving for each in ended),
        ]
        taken = [slot for request in holders for slot in request.slots]
        assert len(set(taken)) == len(taken), "two images share a slot"
        assert len(taken) + len(self.scheduler.free_slots) == self.shape.num_slots, "a slot is lost"

    def _has_work(self) -> bool:
        noted = self._submitted or self._cancelled
        in_scheduler = self.scheduler.waiting or self.scheduler.running
        return bool(noted or in_scheduler or self._arriving or self._ended)

    def _on_device(self) -> AbstractContextManager[object]:
        # The current device is a thread's own; the thread that loaded the model may have set it,
        # this one perhaps not.
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _drain_commands(self) -> list[Request]:
        """Carries out what other threads have asked since the last span. Returns the requests that
        this has cancelled.
        """
        with self._commands:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        for request in submitted:
            self.scheduler.add(request)
        ended = [request for request in cancelled if self.scheduler.cancel(request)]
        for request in ended:
            request.state = RequestState.CANCELLED
        return ended

    @contextmanager
    def _abandoning_on_error(self) -> Iterator[None]:
        """Ends the running requests if the device cannot go on with them."""
        try:
            yield
        except BaseException as error:  # out of memory, say; or Ctrl-C in the middle
            self._span_log.clear()
            self._fail(self.scheduler.abandon(), error)
            raise

    def _learn(self) -> list[Request]:
        """Takes over what has arrived of the images' positions. Returns the requests that are
        complete by that.
        """
        arrival = self._span_log.take()
        if arrival is None:
            return []
        if arrival.kept is not None:
            self.lookahead.observe_kept(*arrival.kept)
        return self.scheduler.learn(arrival.bounds)

    def _run_span(self) -> tuple[int, list[Request]]:
        """Admits, plans, and gives the device several passes of every running request.

        Returns:
            How many passes, 0 if nothing runs, and the requests that are complete with them.
        """
        scheduler, batch = self.scheduler, self.batch
        scheduler.admit()
        images = scheduler.images
        rows = [row for image in images for row in image.rows]
        window = self.lookahead.window(len(rows))
        limit = self._step_limiter.span_limit(len(rows), window)
        passes = scheduler.plan_span(limit, window, self.lookahead.pace(window))
        if passes == 0:
            return 0, []
        scheduler.allocate(passes, window)
        if scheduler.take_changed():
            batch.load(rows, images)
        else:
            batch.upload_limits(rows, images)
        begun = self._step_limiter.begin()
        self.runner.run(batch, len(rows), len(images), passes, window)
        time = self._step_limiter.end(begun, passes, len(rows), window)
        if time is not None:
            self.lookahead.observe_seconds(time.rows, time.window, time.seconds)
        self.totals.passes += passes
        self._span_log.note(images, passes, window, batch.fetch_lengths)
        return passes, scheduler.advance(passes)

    def _retire(self, ended: list[Request]) -> None:
        """Begins to fetch the codes of requests whose last pass is on the device.

        They are gathered on the device and copied to pinned memory behind the span, and nothing
        waits: a CUDA event tells when they are there. Their slots stay taken until then.
        """
        if not ended:
            return
        slots = [slot for request in ended for slot in request.slots]
        try:
            self._arriving.append((ended, self.batch.fetch(slots)))
        except BaseException as error:
            self.scheduler.release_slots(slots)
            self._fail(ended, error)
            raise

    def _fail(self, requests: list[Request], error: BaseException) -> None:
        """Ends requests whose span has failed. The next `step` returns them."""
        for request in requests:
            reason = f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
            request.error, request.cause = (
                f"request {request.id}: the engine could not go on: {reason}",
                error,
            )
            request.state = RequestState.FAILED
        self._ended += requests

    def _run_to_end(
        self, requests: list[Request], decoder: PixelDecoder | None, progress: bool
    ) -> dict[Request, DeviceFuture[Tensor]]:
        """Takes steps until the requests have ended. Returns the pixels of those that finished, if
        there is a decoder.
        """
        pixels: dict[Request, DeviceFuture[Tensor]] = {}
        total = sum(request.params.n for request in requests) * self.shape.tokens
        with progress_bar("sampling", " tokens", total, shown=progress) as bar:
            pending, drawn = set(requests), 0
            while pending:
                ended = [request for request in self.step() if request in pending]
                pending.difference_update(ended)
                finished = [request for request in ended if request.codes is not None]
                if decoder is not None and finished:
                    pixels |= self._decode(decoder, finished)
                drawn += sum(request.tokens for request in ended)
                running = [each for each in self.scheduler.running if each in pending]
                drawing = sum(request.tokens for request in running)
                bar.update(drawn + drawing - bar.n)
        return pixels

    def _decode(
        self, decoder: PixelDecoder, finished: list[Request]
    ) -> dict[Request, DeviceFuture[Tensor]]:
        """Begins to decode requests. The decoder has its own stream, so other rows go on
        meanwhile.
        """
        codes = torch.cat([request.codes for request in finished if request.codes is not None])
        pixels = decoder.submit(uploaded(codes, self.device))
        ends = itertools.accumulate(request.params.n for request in finished)
        return {
            request: pixels.then(itemgetter(slice(end - request.params.n, end)))
            for request, end in zip(finished, ends, strict=True)
        }

    def _take_arrived(self, wait: bool) -> None:
        """Ends the requests whose codes are on the host. With `wait` it waits for the oldest copy,
        because there is nothing else to do.
        """
        while self._arriving:
            ended, fetched = self._arriving[0]
            try:
                if not wait and not fetched.ready():
                    return
                codes, slot_state = fetched.result()
                counts = [request.params.n for request in ended]
                states = slot_state.split(counts, dim=1)
                parts = zip(ended, codes.split(counts), states, strict=True)
                for request, codes_of_request, state_of_request in parts:
                    _finish(request, codes_of_request, state_of_request)
                    self.totals.drafted += request.drafted
                    self.totals.accepted += request.accepted
            except BaseException as error:  # what a kernel did wrong may show only here
                self._leave(ended)
                self._fail([request for request in ended if not request.ended], error)
                raise
            self._leave(ended)
            wait = False

    def _leave(self, ended: list[Request]) -> None:
        """Frees the slots of the oldest copy. The next `step` returns the requests of it that have
        ended.
        """
        self._arriving.popleft()
        self.scheduler.release_slots([slot for request in ended for slot in request.slots])
        self._ended += [request for request in ended if request.ended]


@dataclass
class EngineTotals:
    """What an engine has done since it was built."""

    passes: int = 0  # that the device was given
    # of requests whose codes have arrived, over all their images, as `Request` has them
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class PartialCodes:
    """Codes of a request whose images are still being drawn."""

    request: Request
    steps: int  # tokens that each image has at least; what lies behind is of no meaning
    codes: Tensor  # int32 [n, tokens] on the CPU


def _finish(request: Request, codes: Tensor, slot_state: Tensor) -> None:
    """Gives a request its codes [n, tokens], or its error if one of its images failed, by the state
    of their slots [4, n].
    """
    lengths, failed, drafted, accepted = slot_state
    assert (lengths == codes.shape[1]).all(), "an image has not all of its tokens"
    request.drafted, request.accepted = int(drafted.sum()), int(accepted.sum())
    failures = failed.nonzero().flatten().tolist()
    if failures:
        request.error = (
            f"image {failures[0]} of request {request.id}: the model's logits are NaN or infinite: "
            "its weights are damaged or overflow this precision"
        )
        request.cause = NonFiniteLogitsError(request.error)
        request.state = RequestState.FAILED
    else:
        # the copy's own memory is pinned, and shared with other requests
        request.codes = codes.clone()
        request.state = RequestState.FINISHED
