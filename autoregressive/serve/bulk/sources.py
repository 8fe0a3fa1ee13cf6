"""Where a job's images come from: the engine, or the plain loop. Both draw an image from the job's
seed and the image's index, whatever the other images and ranks.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from autoregressive.devices import limited_cpu_threads
from autoregressive.errors import SettingName, UserError
from autoregressive.models.generate import NonFiniteLogitsError, generate
from autoregressive.models.gpt import Transformer
from autoregressive.serve.bulk.job import BulkJob
from autoregressive.serve.bulk.parts import Images
from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.request import Request
from tokenizer.tokenizer_image.vq_model import VQModel

_SECONDS_TO_BATCH = 2.0  # that an image waits for others to be decoded with


class Source(Protocol):
    """Draws and decodes images of a job.

    Attributes:
        partial_since: when there were fewer images left than could be drawn at once, as
            `time.perf_counter`; None: not yet.
    """

    partial_since: float | None

    def draw(self, indices: Sequence[int]) -> Iterator[Images]:
        """Draws these images and gives them as they are done, in any order.

        Raises:
            UserError: the model or the tokenizer gave NaN or infinite numbers.
        """


class EngineSource:
    """Draws with the engine, and decodes beside its steps."""

    def __init__(self, job: BulkJob, engine: Engine) -> None:
        self._job, self._engine = job, engine
        self.partial_since: float | None = None

    def draw(self, indices: Sequence[int]) -> Iterator[Images]:
        """As `Source.draw`. What is not drawn when the caller stops is cancelled."""
        decoding, running = _Decoding(self._job, self._engine), dict[Request, int]()
        try:
            yield from self._draw(deque(indices), running, decoding)
        finally:
            for request in running:
                self._engine.cancel(request)

    def _draw(
        self, waiting: deque[int], running: dict[Request, int], decoding: "_Decoding"
    ) -> Iterator[Images]:
        job, engine = self._job, self._engine
        at_once = max(1, engine.shape.max_rows // job.sampling.rows)
        while waiting or running:
            while waiting and len(running) < 2 * at_once:  # half of them in the engine's queue
                index = waiting.popleft()
                request = engine.submit(int(job.labels[index]), job.sampling, index)
                running[request] = index
            if len(running) < at_once and self.partial_since is None:
                self.partial_since = time.perf_counter()
            for request in engine.step():
                if request not in running:  # cancelled at the end of an earlier job
                    continue
                index = running.pop(request)
                if request.codes is None:
                    raise NonFiniteLogitsError(f"image {index}: {request.error}")
                decoding.add(index, request.codes)
            yield from decoding.done()
        yield from decoding.rest()


class _Decoding:
    """Images on their way from codes to pictures. They are decoded in batches of one size, which
    are filled up, so that pixels do not depend on which images were decoded together.
    """

    def __init__(self, job: BulkJob, engine: Engine) -> None:
        assert engine.decoder is not None
        self._decoder = engine.decoder
        self._as_pictures = partial(evaluation_pictures, size=job.image_size_eval)
        self._size = self._decoder.batch_sizes[-1]
        self._indices: list[int] = []  # of the next batch
        self._codes: list[Tensor] = []
        self._since = 0.0  # when the first of the next batch came
        self._begun: deque[tuple[list[int], Tensor, DeviceFuture[tuple[Tensor, ...]]]] = deque()

    def add(self, index: int, codes: Tensor) -> None:
        """Takes an image: codes int32 [1, tokens] on the CPU."""
        if not self._indices:
            self._since = time.monotonic()
        self._indices.append(index)
        self._codes.append(codes)
        if len(self._indices) == self._size:
            self._begin()

    def done(self) -> Iterator[Images]:
        """What has been decoded since the last call."""
        if self._indices and time.monotonic() > self._since + _SECONDS_TO_BATCH:
            self._begin()
        while self._begun and self._begun[0][2].ready():
            yield self._next()

    def rest(self) -> Iterator[Images]:
        """All that there is still."""
        if self._indices:
            self._begin()
        while self._begun:
            yield self._next()

    def _begin(self) -> None:
        codes = torch.cat(self._codes)
        padded = F.pad(codes, (0, 0, 0, self._size - len(codes)))
        future = self._decoder.submit_to_host(padded, self._as_pictures)
        self._begun.append((self._indices, codes, future))
        self._indices, self._codes = [], []

    def _next(self) -> Images:
        indices, codes, future = self._begun.popleft()
        pictures, finite = (tensor[: len(indices)] for tensor in future.result())
        check_finite(indices, finite)
        return Images(indices, codes.numpy(), pictures.numpy())


class NaiveSource:
    """Draws with LlamaGen's plain loop, batches of fixed images: those of batch b depend on the
    job's seed and on b.
    """

    def __init__(self, job: BulkJob, gpt: Transformer, vq: VQModel) -> None:
        assert job.naive_batch is not None
        self.partial_since: float | None = None
        self._job, self._gpt, self._vq, self._batch = job, gpt, vq, job.naive_batch

    def draw(self, indices: Sequence[int]) -> Iterator[Images]:
        """As `Source.draw`. Of a batch, those images are given that are asked for."""
        wanted = set(indices)
        for batch in sorted({index // self._batch for index in wanted}):
            done = self._draw_batch(batch)
            places = [at for at, index in enumerate(done.indices) if index in wanted]
            kept = [done.indices[at] for at in places]
            yield Images(kept, done.codes[places], done.pictures[places])

    @torch.no_grad()
    def _draw_batch(self, batch: int) -> Images:
        job, model = self._job, self._job.model
        indices = range(job.images)[batch * self._batch : (batch + 1) * self._batch]
        if len(indices) < self._batch:
            self.partial_since = time.perf_counter()
        params = asdict(job.sampling)
        seed = np.random.SeedSequence([params.pop("seed"), batch]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]) >> 1)
        del params["n"]
        labels = torch.from_numpy(job.labels[indices.start : indices.stop]).to(model.device)
        with limited_cpu_threads(self._gpt.config, model.device):
            codes = generate(
                self._gpt,
                labels,
                model.tokens_per_image,
                **params,
                sample_logits=job.sampling.temperature > 0,
            )
            shape = [len(codes), model.codebook_embed_dim, model.grid, model.grid]
            pixels = self._vq.decode_code(codes, shape)
        pictures, finite = evaluation_pictures(pixels, job.image_size_eval)
        check_finite(indices, finite.cpu())
        return Images(indices, codes.cpu().numpy(), pictures.cpu().numpy())


def evaluation_pictures(pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pixels as LlamaGen's bulk command stores them: resized by bicubic interpolation without
    antialiasing, and cut to whole levels, not rounded.

    Args:
        pixels: float [images, 3, height, width], about -1..1.
        size: pixels of a side of the pictures.

    Returns:
        Pictures uint8 [images, size, size, 3], and whether every pixel of an image was finite: bool
        [images].
    """
    finite = pixels.isfinite().flatten(1).all(dim=1)
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels.float(), size=(size, size), mode="bicubic")
    levels = (127.5 * pixels + 128).clamp(0, 255).nan_to_num(nan=0).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous(), finite


def check_finite(indices: Sequence[int], finite: Tensor) -> None:
    """Raises `UserError` for the first image that is not finite."""
    broken = [index for index, one in zip(indices, finite.tolist(), strict=True) if not one]
    if broken:
        raise UserError(
            f"image {broken[0]}: the tokenizer's decoder gave NaN or infinite pixels: its weights "
            "are damaged",
            SettingName("vq_ckpt", " (see {})"),
        )


def shares(missing: NDArray[np.int64], batch: int | None, count: int) -> list[NDArray[np.int64]]:
    """The images that each rank draws: every so many-th, or those of every so many-th batch."""
    if batch is None:
        return [missing[rank::count] for rank in range(count)]
    _, number = np.unique(missing // batch, return_inverse=True)
    return [missing[number % count == rank] for rank in range(count)]
