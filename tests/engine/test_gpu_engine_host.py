"""The engine's host side on a GPU, around a small runner: where it waits, how far it runs ahead,
whether it mixes anything up.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from fake_runner import VOCABULARY, tiny_gpt
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.request import Request, RequestState

pytestmark = pytest.mark.gpu

TOKENS = 64


class ArithmeticRunner:
    """Draws codes from sums over what a row has written into its pages; on any device, without
    waiting for it.
    """

    def __init__(
        self, gpt: Transformer, shape: BatchShape, num_pages: int, config: EngineConfig
    ) -> None:
        self.page_size, self.num_pages = shape.page_size, num_pages
        device = gpt.tok_embeddings.weight.device
        self.pages = torch.full((num_pages, shape.page_size), 10**9, device=device)  # poison
        self.weights = torch.arange(1, shape.pages_per_row * shape.page_size + 1, device=device)
        self.sleep_cycles = 0  # of a step, on the device
        self.spans: list[torch.cuda.Event] = []
        self.steps: list[int] = []
        self.most_in_flight = 0

    @property
    def alive(self) -> bool:
        return True

    def prepare(self, batch: Batch, progress: Callable[[int, int], None] | None = None) -> None:
        """Nothing is compiled."""

    def run(self, batch: Batch, rows: int, images: int, passes: int, window: int) -> None:
        """As the protocol says, for windows of one position."""
        assert window == 1
        self.most_in_flight = max(
            self.most_in_flight, 1 + sum(not span.query() for span in self.spans)
        )
        self.steps.append(passes)
        for _ in range(passes):
            if self.sleep_cycles:
                torch.cuda._sleep(self.sleep_cycles)
            self._step(batch, rows, images)
        if self.pages.is_cuda:
            self.spans.append(torch.cuda.Event())
            self.spans[-1].record()

    def _step(self, batch: Batch, rows: int, images: int) -> None:
        positions = batch.positions[:rows].long()
        fed = batch.codes[batch.row_slots[:rows].long(), (positions - 1).clamp(min=0)]
        fed = torch.where(positions > 0, fed, 1000 + batch.labels[:rows])
        tables = batch.page_table[:rows].long()
        page = tables.gather(1, (positions // self.page_size)[:, None])[:, 0]
        self.pages[page, positions % self.page_size] = (fed * 31 + positions).long()
        seen = self.weights[None] <= positions[:, None] + 1  # [rows, positions of a row]
        written = self.pages[tables.clamp(0, len(self.pages) - 1)].flatten(1)
        sums = torch.where(seen, written * self.weights, 0).sum(1)  # [rows]
        self._draw(batch, images, positions, sums)
        move_on(batch, rows, 1)

    def _draw(self, batch: Batch, images: int, positions: Tensor, sums: Tensor) -> None:
        conditional, unconditional = (
            batch.conditional_rows[:images].long(),
            batch.unconditional_rows[:images].long(),
        )
        other = torch.where(unconditional >= 0, 3 * sums[unconditional.clamp(min=0)], 0)
        keys = (
            batch.seeds[:images] % 1009 + 17 * batch.image_indices[:images] + batch.top_ks[:images]
        )
        drawn = (sums[conditional] + other + keys) % VOCABULARY
        batch.codes[batch.image_slots[:images].long(), positions[conditional]] = drawn.int()


def move_on(batch: Batch, rows: int, tokens: int) -> None:
    """Moves rows and their images to later positions."""
    batch.positions[:rows] += tokens
    batch.lengths.index_copy_(0, batch.row_slots[:rows].long(), batch.positions[:rows])


@contextmanager
def no_hidden_waits() -> Iterator[None]:
    """Every synchronisation that torch does unasked is an error; waiting for an event is not."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_engine(config: EngineConfig, device: str = "cuda") -> tuple[Engine, ArithmeticRunner]:
    engine = Engine(tiny_gpt(TOKENS).to(device), None, config, ArithmeticRunner)
    assert isinstance(engine.runner, ArithmeticRunner)
    return engine, engine.runner


def test_codes_are_those_of_each_request_alone_on_a_cpu() -> None:
    """Fails if pages or slots are reused too early, an upload is overwritten on its way, or a step
    waits for the device.
    """
    config = EngineConfig(max_num_seqs=12, page_size=4, num_pages=120, lookahead="off")
    engine, runner = make_engine(config)
    runner.sleep_cycles = 1_900_000  # a step of a millisecond or more: the host is well ahead
    alone, _ = make_engine(EngineConfig(max_num_seqs=12, page_size=4, lookahead="off"), "cpu")
    generator = random.Random(0)
    requests: list[Request] = []
    for _ in range(60):
        scale, interval = generator.choice([1.0, 4.0]), generator.choice([-1, 0, 7, 30])
        top_k, seed, n = (
            generator.randint(0, 9),
            generator.randrange(2**63),
            generator.randint(1, 2),
        )
        params = SamplingParams(scale, interval, top_k=top_k, seed=seed, n=n)
        requests.append(engine.submit(generator.randrange(10), params))
        with no_hidden_waits():
            for _ in range(generator.randint(0, 4)):
                engine.step()
                engine.audit()
        if generator.random() < 0.2:
            engine.cancel(generator.choice(requests))
    with no_hidden_waits():
        while engine.wait_for_work(timeout=0):
            engine.step()
            engine.audit()
    assert runner.most_in_flight == 2
    finished = [request for request in requests if request.state is RequestState.FINISHED]
    assert len(finished) > 30
    for request in finished:
        assert request.codes is not None
        same = alone.submit(request.class_label, request.params)
        while not same.ended:
            alone.step()
        assert same.codes is not None
        assert torch.equal(request.codes, same.codes)


def test_a_cancel_takes_effect_soon() -> None:
    """Fails if the host runs so far ahead that a cancelled request is computed for more than 16
    steps or 0.25 s.
    """
    for step_ms in (1, 40):
        engine, runner = make_engine(EngineConfig(max_num_seqs=4, lookahead="off"))
        runner.sleep_cycles = step_ms * 1_900_000  # about 1.9 GHz
        first, _ = (
            engine.submit(1, SamplingParams(top_k=5)),
            engine.submit(2, SamplingParams(top_k=5)),
        )
        while first.steps < 20:
            engine.step()
        on_device = first.steps
        engine.cancel(first)
        start = time.monotonic()
        while not first.ended:
            engine.step()
        torch.cuda.synchronize()
        print(
            f"steps of {step_ms} ms: spans of {max(runner.steps)}; cancelled after "
            f"{time.monotonic() - start:.3f} s"
        )
        assert first.state is RequestState.CANCELLED
        assert first.steps == on_device
        assert runner.most_in_flight == 2
        assert max(runner.steps) <= 8
        assert max(runner.steps[2:]) * 2 * step_ms <= 300


def test_a_failed_image_fails_its_request() -> None:
    """Fails if the flag is read before its image has ended, or not at all."""
    engine, _ = make_engine(EngineConfig(max_num_seqs=4, lookahead="off"))
    bad, good = engine.submit(1, SamplingParams(top_k=5)), engine.submit(2, SamplingParams(top_k=5))
    engine.step()
    engine.batch.failed[engine.scheduler.running[0].slots[0]] = 1
    while not (bad.ended and good.ended):
        engine.step()
    assert (bad.state, good.state) == (RequestState.FAILED, RequestState.FINISHED)


def test_the_host_is_quick_enough_for_small_steps() -> None:
    """Says what a span costs the host; fails if one of 16 rows, without the runner's own work,
    takes a millisecond.
    """

    class IdleRunner(ArithmeticRunner):
        def run(self, batch: Batch, rows: int, images: int, passes: int, window: int) -> None:
            """Only counts."""
            self.steps.append(passes)
            move_on(batch, rows, passes)

    for rows, most_ms in ((16, 1.0), (512, 20.0)):
        engine = Engine(tiny_gpt(576).cuda(), None, EngineConfig(max_num_seqs=rows), IdleRunner)
        assert isinstance(engine.runner, IdleRunner)
        engine.generate([1] * (rows // 2), SamplingParams(top_k=5))
        engine.runner.steps.clear()
        start = time.perf_counter()
        engine.generate([1] * (rows // 2), SamplingParams(top_k=5))
        span_ms = 1000 * (time.perf_counter() - start) / len(engine.runner.steps)
        print(f"{rows} rows: {span_ms:.3f} ms of the host a span, {len(engine.runner.steps)} spans")
        assert span_ms < most_ms
