"""Ranks that share a model as threads of this process: the real layers, runners and batches."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from typing_extensions import override

from autoregressive.models.gpt import Transformer
from autoregressive.models.ranks import Rank
from autoregressive.serve.engine.batch import Batch, BatchShape, BatchUpdate
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.exchange import Exchange
from autoregressive.serve.engine.model_runner import ModelRunner
from kernels.hopper.peers import Inboxes

_PATIENCE_SECONDS = 60.0


class Table:
    """What the ranks lay out for each other. One of them computes at a time, as the interpreter of
    kernels needs it.
    """

    def __init__(self, count: int) -> None:
        self.laid_out: list[Tensor | None] = [None] * count
        self.met = threading.Barrier(count, timeout=_PATIENCE_SECONDS)
        self.turn = threading.Lock()


class ThreadExchange(Exchange):
    """Copies from what the others have laid out."""

    def __init__(self, table: Table, number: int) -> None:
        self._table, self._number = table, number
        self.calls = 0

    @override
    def gather(self, own: Tensor, parts: Tensor) -> None:
        table, self.calls = self._table, self.calls + 1
        table.laid_out[self._number] = own
        self._meet()
        for part, theirs in zip(parts, table.laid_out, strict=True):
            assert theirs is not None
            part.copy_(theirs)
        self._meet()

    def _meet(self) -> None:
        self._table.turn.release()
        try:
            self._table.met.wait()
        finally:
            self._table.turn.acquire()


class ThreadPeers(ThreadExchange):
    """Has inboxes, which `fused_runners` takes."""

    reaches_memory = True

    def __init__(self, table: Table, number: int) -> None:
        super().__init__(table, number)
        self.last = ""  # name of the inbox that was used last
        self.ranks = len(table.laid_out)

    @override
    def open(self, shared: Mapping[str, int]) -> None:
        self.inboxes = {
            name: cast(Inboxes, ThreadInboxes(self, name, count)) for name, count in shared.items()
        }


@dataclass(frozen=True)
class ThreadInboxes:
    """One inbox of each rank, which must be used as those of GPUs."""

    exchange: ThreadPeers
    name: str
    places: int

    def gather(self, own: Tensor) -> Tensor:
        """What each rank has, in the order of ranks."""
        assert self.exchange.last != self.name, "no other inbox was used in between"
        self.exchange.last = self.name
        parts = own.new_empty(self.exchange.ranks, *own.shape)
        assert parts.numel() <= self.places
        self.exchange.gather(own, parts)
        return parts


def part_of(gpt: Transformer, rank: Rank) -> Transformer:
    """One rank's part of a whole model."""
    with torch.device("meta"):
        part = Transformer(replace(gpt.config, ranks=rank.count))
    weight = gpt.output.weight
    part = part.to(weight.dtype).to_empty(device=weight.device)
    whole = gpt.state_dict()
    with torch.no_grad():
        for name, target in part.state_dict().items():
            place = rank.part_of(name)
            if place is None:
                target.copy_(whole[name])
            else:
                place.copy_from(whole[name], target)
    return part.eval().requires_grad_(False)


class ThreadedRanks:
    """Runs a whole model as ranks that share it; fulfils the `Runner` protocol.

    After each span it asserts that all ranks hold the same bits.
    """

    alive = True

    def __init__(
        self,
        gpt: Transformer,
        shape: BatchShape,
        num_pages: int,
        config: EngineConfig,
        count: int = 2,
        make_runner: type[ModelRunner] = ModelRunner,
        make_exchange: type[ThreadExchange] = ThreadExchange,
    ) -> None:
        self.num_pages = num_pages
        self.table = Table(count)
        self.runners = []
        for number in range(count):
            part = part_of(gpt, Rank(number, count))
            one = replace(config, tensor_parallel_size=count)
            exchange = make_exchange(self.table, number)
            self.runners.append(make_runner(part, shape, num_pages, one, exchange))
        self.batches = [Batch(shape, self.runners[0].device) for _ in range(count)]
        self._updates: list[BatchUpdate] = []

    def prepare(self, batch: Batch, progress: Callable[[int, int], None] | None = None) -> None:
        """Takes the engine's batch for that of rank 0."""
        self.batches[0] = batch
        batch.on_update = self._updates.append

    def run(self, batch: Batch, rows: int, images: int, passes: int, window: int) -> None:
        """Runs the span on all ranks, each in a thread."""

        @torch.no_grad()
        def work(number: int) -> None:
            with self.table.turn:
                if number > 0:
                    for update in self._updates:
                        self.batches[number].follow(update)
                self.runners[number].run(self.batches[number], rows, images, passes, window)

        with ThreadPoolExecutor(len(self.runners)) as pool:
            list(pool.map(work, range(len(self.runners))))
        self._updates.clear()
        self._check(rows, window)

    def _check(self, rows: int, window: int) -> None:
        first, *others = (runner.layers_for(rows, window) for runner in self.runners)
        for layers in others:
            assert torch.equal(layers.residual, first.residual)
            assert torch.equal(layers.logits, first.logits)
        for batch in self.batches[1:]:
            for name in ("codes", "slot_state", "positions", "limits", "page_table"):
                assert torch.equal(getattr(batch, name), getattr(self.batches[0], name)), name
