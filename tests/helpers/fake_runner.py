"""A runner that keeps the promises of the real one at the cost of a hash, and checks the engine's
as it goes.

A row "writes its KV" into its pages and "attends" to all of it, so that a page shared, lost or
moved changes the codes. It computes windows as the device does. On the CPU only.
"""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
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


@lru_cache(maxsize=4096)
def codes_alone(
    label: int, numbers: tuple[float, ...], image_index: int, guided_steps: int, tokens: int
) -> tuple[int, ...]:
    """The codes of one image, drawn one after the other; knows no page and no batch."""
    codes: list[int] = []
    conditional: list[int] = []
    unconditional: list[int] = []
    for position in range(tokens):
        newest = codes[-1] if codes else -1
        conditional.append(key_value(label, position, newest))
        unconditional.append(key_value(CLASSES, position, newest))
        other = unconditional if position < guided_steps else None
        codes.append(drawn_code(numbers, image_index, conditional, other))
    return tuple(codes)


def expected_codes(request: Request, tokens: int) -> list[list[int]]:
    """What a request's images must be, whatever ran beside them and however large the windows."""
    params = request.params
    guided = [
        params.cfg_scale > 1 and (params.cfg_interval < 0 or position <= params.cfg_interval + 1)
        for position in range(tokens)
    ]
    return [
        list(codes_alone(request.class_label, draw_numbers(params), index, sum(guided), tokens))
        for index in range(request.first_image, request.first_image + params.n)
    ]


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
        self.shape, self.config, self.num_pages = shape, config, num_pages
        self.pages = np.full((num_pages, shape.page_size), -12345, dtype=np.int64)  # poison
        self.spans: list[int] = []  # passes
        self.windows: list[int] = []  # of the spans
        self.step_seconds = 0.0
        # (seed, image index, position) whose logits are NaN
        self.fails: set[tuple[int, int, int]] = set()
        self.before_span: Callable[[int], None] = lambda passes: None
        # share of the guesses that an oracle puts right before each pass; None: there is no oracle
        self.right_share: float | None = None
        self.random = random.Random(0)

    @property
    def alive(self) -> bool:
        return True

    def prepare(self, batch: Batch, progress: Callable[[int, int], None] | None = None) -> None:
        """Nothing is compiled; the batch must be empty."""
        self._check_padding(batch, 0, 0)
        if progress is not None:
            progress(1, 1)

    def run(self, batch: Batch, rows: int, images: int, passes: int, window: int) -> None:
        """As the protocol says."""
        assert passes > 0
        assert window > 0
        self.before_span(passes)
        self.spans.append(passes)
        self.windows.append(window)
        self._check_padding(batch, rows, images)
        self._check_pages(batch, rows)
        drawn = [self._image(batch, image) for image in range(images)]
        for _ in range(passes):
            time.sleep(self.step_seconds)
            for image in drawn:
                if self.right_share is not None:
                    self._guess(batch, image, window, self.right_share)
                self._pass(batch, image, window)

    def _check_padding(self, batch: Batch, rows: int, images: int) -> None:
        slots = batch.row_slots.long()
        assert (batch.positions == batch.lengths[slots]).all()
        assert (batch.positions[:rows] >= 0).all()
        assert (batch.positions[rows:] == -1).all()
        assert (batch.limits[rows:] == 0).all()
        assert (slots[rows:] == self.shape.num_slots).all()
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
        return first_ints(batch.page_table[row], -(-int(batch.limits[row]) // self.shape.page_size))

    def _image(self, batch: Batch, image: int) -> "_Image":
        pair = [int(batch.conditional_rows[image]), int(batch.unconditional_rows[image])]
        floats = (batch.guidance_scales, batch.temperatures, batch.top_ps)
        seed = int(batch.seeds[image])
        return _Image(
            slot=int(batch.image_slots[image]),
            index=int(batch.image_indices[image]),
            seed=seed,
            numbers=(*(float(values[image]) for values in floats), int(batch.top_ks[image]), seed),
            guided_steps=int(batch.guided_steps[image]),
            rows=[
                _Row(
                    row,
                    int(batch.labels[row]),
                    int(batch.limits[row]),
                    self._pages_of(batch, row),
                    batch.codes[int(batch.row_slots[row])].numpy(),
                )
                for row in pair
                if row >= 0
            ],
        )

    def _guess(self, batch: Batch, image: "_Image", window: int, right_share: float) -> None:
        """Puts guesses where the next pass looks for them."""
        label, position = image.rows[0].label, int(batch.lengths[image.slot])
        end = min(position + window - 1, self.shape.tokens)
        true = codes_alone(
            label, image.numbers, image.index, image.guided_steps, self.shape.tokens
        )[position:end]
        guesses = [
            code if self.random.random() < right_share else (code + 1) % VOCABULARY for code in true
        ]
        batch.codes[image.slot].numpy()[position:end] = guesses

    def _pass(self, batch: Batch, image: "_Image", window: int) -> None:
        """Draws a window's codes of one image, and keeps those up to and including the first behind
        a wrong guess.
        """
        slot, begin = image.slot, int(batch.positions[image.rows[0].row])
        count = min(window, image.rows[0].limit - begin)
        if count <= 0:
            return
        contexts = [self._attend(row, begin, window) for row in image.rows]
        drawn = []
        for at in range(begin, begin + count):
            other = contexts[1][: at + 1] if at < image.guided_steps else None
            assert other is None or len(other) == at + 1, "an unconditional row has no page"
            drawn.append(drawn_code(image.numbers, image.index, contexts[0][: at + 1], other))
        codes = batch.codes[slot].numpy()[begin : begin + count]
        guesses = codes.tolist()
        kept = 1
        while kept < count and drawn[kept - 1] == guesses[kept - 1]:
            kept += 1
        codes[:] = drawn
        kept_positions = range(begin, begin + kept)
        if self.fails and any((image.seed, image.index, at) in self.fails for at in kept_positions):
            batch.failed[slot] = 1
        batch.slot_state[:, slot] += torch.tensor([kept, 0, count - 1, kept - 1])
        for row in image.rows:
            batch.positions[row.row] += kept

    def _attend(self, row: "_Row", begin: int, window: int) -> list[int]:
        """Writes a row's window, and returns what it has written from its start on."""
        end = min(begin + window, row.limit)
        for at in range(begin, end):
            newest = int(row.codes[at - 1]) if at else -1
            page = row.pages[at // self.shape.page_size]
            self.pages[page, at % self.shape.page_size] = key_value(row.label, at, newest)
        return self.pages[row.pages].flatten()[: max(begin, end)].tolist()


@dataclass(frozen=True)
class _Row:
    """What the device has of a row, but for its position."""

    row: int
    label: int
    limit: int
    pages: list[int]
    codes: np.ndarray  # of its image


@dataclass(frozen=True)
class _Image:
    """What the device has of an image."""

    slot: int
    index: int
    seed: int
    numbers: tuple[float, ...]
    guided_steps: int
    rows: list[_Row]


class LateCopies:
    """Stands in for `Batch.fetch` and `Batch.fetch_lengths`: copies arrive after `delay` questions.
    Codes are read from the device's memory as late as that, because nobody else may have them.
    """

    def __init__(self, batch: Batch, delay: int) -> None:
        self.batch, self.delay = batch, delay

    def fetch(self, slots: Sequence[int]) -> DeviceFuture[tuple[Tensor, ...]]:
        """As `Batch.fetch`."""
        index = list(slots)
        return DeviceFuture(
            self._questions(),
            lambda: (self.batch.codes[index], self.batch.slot_state[:, index]),
        )

    def fetch_lengths(self) -> DeviceFuture[Tensor]:
        """As `Batch.fetch_lengths`."""
        lengths = self.batch.lengths.clone()
        return DeviceFuture(self._questions(), lambda: lengths)

    def _questions(self) -> Callable[[], bool]:
        questions = itertools.count()
        return lambda: next(questions) >= self.delay


def first_ints(values: Tensor, count: int) -> list[int]:
    """The first `count` elements as Python's integers."""
    return values[:count].tolist()


def fake_engine(config: EngineConfig, tokens: int = 16) -> tuple[Engine, FakeRunner]:
    """An engine around a `FakeRunner`."""
    engine = Engine(tiny_gpt(tokens), None, config, FakeRunner)
    assert isinstance(engine.runner, FakeRunner)
    return engine, engine.runner
