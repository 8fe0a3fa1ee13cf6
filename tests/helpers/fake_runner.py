"""A runner that keeps the promises of the real one at the cost of a hash, and checks the engine's
as it goes.

A row "writes its KV" into its pages and "attends" to all of it, so that a page shared, lost or
moved changes the codes. On the CPU only.
"""

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.request import Request

VOCABULARY, CLASSES = 97, 10


def tiny_gpt(tokens: int) -> Transformer:
    """A model for its sizes; nothing here runs it."""
    return Transformer(
        GPTConfig(
            dim=8,
            n_layer=1,
            n_head=1,
            vocab_size=VOCABULARY,
            block_size=tokens,
            num_classes=CLASSES,
        )
    )


def key_value(label: int, position: int, newest: int) -> int:
    """What a row writes at a position, where it is fed its label or the newest code."""
    return hash((label, 0) if position == 0 else (newest, position))


def drawn_code(
    params: tuple[float, ...],
    image_index: int,
    conditional: Sequence[int],
    unconditional: Sequence[int] | None,
) -> int:
    """The next code of an image, from all that its rows attend to."""
    return hash((params, image_index, tuple(conditional), tuple(unconditional or ()))) % VOCABULARY


def expected_codes(request: Request, tokens: int) -> list[list[int]]:
    """What a request's images must be, whatever ran beside them; knows no page and no batch."""
    params, images = request.params, []
    numbers = draw_numbers(params)
    for index in range(request.first_image, request.first_image + params.n):
        codes: list[int] = []
        conditional: list[int] = []
        unconditional: list[int] = []
        for position in range(tokens):
            newest = codes[-1] if codes else -1
            conditional.append(key_value(request.class_label, position, newest))
            unconditional.append(key_value(CLASSES, position, newest))
            guided = params.cfg_scale > 1 and (
                params.cfg_interval < 0 or position <= params.cfg_interval + 1
            )
            codes.append(drawn_code(numbers, index, conditional, unconditional if guided else None))
        images.append(codes)
    return images


def draw_numbers(params: SamplingParams) -> tuple[float, ...]:
    """The parameters of the draws as the device has them: float32."""
    floats = np.array(
        [params.cfg_scale, params.temperature, params.top_p], dtype=np.float32
    ).tolist()
    return (*floats, params.top_k, params.seed)


class FakeRunner:
    """Fulfils the `Runner` protocol; a factory of it is the class itself."""

    def __init__(
        self, gpt: Transformer, shape: BatchShape, num_pages: int, config: EngineConfig
    ) -> None:
        self.shape, self.config = shape, config
        self.pages = np.full((num_pages, shape.page_size), -12345, dtype=np.int64)  # poison
        self.spans: list[int] = []
        self.step_seconds = 0.0
        # (seed, image index, step) whose logits are NaN
        self.fails: set[tuple[int, int, int]] = set()
        self.before_span: Callable[[int], None] = lambda steps: None

    def prepare(self, batch: Batch, progress: Callable[[int, int], None] | None = None) -> None:
        """Nothing is compiled; the batch must be empty."""
        self._check_padding(batch, 0, 0)
        if progress is not None:
            progress(1, 1)

    def run(self, batch: Batch, rows: int, images: int, steps: int) -> None:
        """As the protocol says."""
        assert steps > 0
        self.before_span(steps)
        self.spans.append(steps)
        self._check_padding(batch, rows, images)
        for _ in range(steps):
            time.sleep(self.step_seconds)
            self._check_pages(batch, rows)
            self._step(batch, rows, images)

    def _check_padding(self, batch: Batch, rows: int, images: int) -> None:
        assert (batch.positions[:rows] >= 0).all()
        assert (batch.positions[rows:] == -1).all()
        assert (batch.conditional_rows[images:] == -1).all()
        of_images = first_ints(batch.conditional_rows, images) + [
            r for r in first_ints(batch.unconditional_rows, images) if r >= 0
        ]
        assert sorted(of_images) == list(range(rows)), "a row belongs to no image, or to two"

    def _check_pages(self, batch: Batch, rows: int) -> None:
        held = [page for row in range(rows) for page in self._pages_of(batch, row)]
        assert len(set(held)) == len(held), "two rows share a page"
        assert all(0 <= page < len(self.pages) for page in held)

    def _pages_of(self, batch: Batch, row: int) -> list[int]:
        return first_ints(
            batch.page_table[row], int(batch.positions[row]) // self.shape.page_size + 1
        )

    def _step(self, batch: Batch, rows: int, images: int) -> None:
        contexts = []
        for row in range(rows):
            position = int(batch.positions[row])
            pages = self._pages_of(batch, row)
            newest = int(batch.codes[int(batch.row_slots[row]), position - 1]) if position else -1
            self.pages[pages[-1], position % self.shape.page_size] = key_value(
                int(batch.labels[row]), position, newest
            )
            contexts.append(self.pages[pages].flatten()[: position + 1].tolist())
        for image in range(images):
            conditional, unconditional = (
                int(batch.conditional_rows[image]),
                int(batch.unconditional_rows[image]),
            )
            slot, position = int(batch.image_slots[image]), int(batch.positions[conditional])
            floats = (batch.guidance_scales, batch.temperatures, batch.top_ps)
            numbers = (
                *(float(values[image]) for values in floats),
                int(batch.top_ks[image]),
                int(batch.seeds[image]),
            )
            index = int(batch.image_indices[image])
            if (int(batch.seeds[image]), index, position) in self.fails:
                batch.failed[slot] = 1
            attended = contexts[unconditional] if unconditional >= 0 else None
            batch.codes[slot, position] = drawn_code(
                numbers, index, contexts[conditional], attended
            )
        batch.positions[:rows] += 1


class LateCopies:
    """Stands in for `Batch.fetch`: copies arrive after `delay` questions, and read the device's
    memory as late as that.
    """

    def __init__(self, batch: Batch, delay: int) -> None:
        self.batch, self.delay = batch, delay

    def fetch(self, slots: Sequence[int]) -> DeviceFuture[tuple[Tensor, ...]]:
        """As `Batch.fetch`."""
        questions = itertools.count()
        return DeviceFuture(
            lambda: next(questions) >= self.delay,
            lambda: (self.batch.codes[list(slots)], self.batch.failed[list(slots)]),
        )


def first_ints(values: Tensor, count: int) -> list[int]:
    """The first `count` elements as Python's integers."""
    return values[:count].tolist()


def fake_engine(config: EngineConfig, tokens: int = 16) -> tuple[Engine, FakeRunner]:
    """An engine around a `FakeRunner`."""
    engine = Engine(tiny_gpt(tokens), None, config, FakeRunner)
    assert isinstance(engine.runner, FakeRunner)
    return engine, engine.runner
