"""The process of a rank other than 0, of those that share a model (tensor parallelism): what it is
told, and what it does.

It has its part of the model, a batch and a runner. It follows rank 0 in every change of the batch
and every span, and draws the same tokens from the same logits, so it answers nothing.
"""

import socket
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import Store

from autoregressive.devices import limit_cpu_threads
from autoregressive.errors import UserError
from autoregressive.models.ranks import Rank
from autoregressive.serve.engine.batch import Batch, BatchShape, BatchUpdate
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.exchange import Exchange, ExchangeKind, connect, join_store
from autoregressive.serve.engine.memory import pool_pages, saying_what_needs_less_memory
from autoregressive.serve.engine.model_runner import ModelRunner
from autoregressive.serve.worker.messages import Heartbeat, StartFailed
from autoregressive.serve.worker.process import settle_heap
from autoregressive.serve.worker.transport import Outbox, receive, start_heartbeats
from autoregressive.weights.finding import ModelSettings
from autoregressive.weights.loading import load_gpt

_LAST_WORDS_SECONDS = 5.0  # for a rank's last messages to be written
LOSS_SECONDS = 1.0  # at most from the failure of an exchange until the loss behind it is known


@dataclass(frozen=True)
class RankLoaded:
    """A rank's message: its part is loaded, and its memory holds so many pages."""

    num_pages: int


@dataclass(frozen=True)
class Prepare:
    """Rank 0's message: each rank has so many pages. They may meet now."""

    num_pages: int


@dataclass(frozen=True)
class Span:
    """Rank 0's message: the arguments of `Runner.run`."""

    rows: int
    images: int
    passes: int
    window: int


TO_RANK: dict[str, type] = {kind.__name__: kind for kind in (Prepare, BatchUpdate, Span)}
FROM_RANK: dict[str, type] = {kind.__name__: kind for kind in (RankLoaded, StartFailed, Heartbeat)}


@dataclass(frozen=True)
class RankRecipe:
    """What the ranks are built of."""

    model: ModelSettings
    checkpoint: Path | None  # of the transformer; None: random weights
    config: EngineConfig
    devices: tuple[torch.device, ...]  # by rank
    exchange: ExchangeKind

    def rank(self, number: int) -> Rank:
        """One of the ranks."""
        return Rank(number, len(self.devices))

    def connect(self, number: int, store: Store) -> Exchange:
        """Joins the ranks as one of them; waits for the others."""
        return connect(self.exchange, store, self.rank(number), self.devices[number])


def follow(recipe: RankRecipe, number: int, port: int, connection: socket.socket) -> None:
    """The life of a rank other than 0: it does what rank 0 tells until its connection ends.

    Args:
        port: of the store by which the ranks find each other.

    Raises:
        SystemExit: its part could not be loaded, for a reason that the user can mend.
        EOFError: rank 0 has gone.
        Exception: it cannot go on.
    """
    outbox = Outbox(connection, "events")
    start_heartbeats(outbox)
    device = recipe.devices[number]
    try:
        with (
            saying_what_needs_less_memory(replace(recipe.model, device=device), recipe.config),
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        ):
            _follow(recipe, number, port, connection, outbox)
    except UserError as error:
        outbox.put(StartFailed(error.parts, error.remedies))
        sys.exit(2)
    except RuntimeError:
        # Another rank's loss shows here, too, and rank 0 then ends this process. It tells nothing
        # of its own meanwhile.
        time.sleep(LOSS_SECONDS)
        raise
    finally:
        outbox.close(_LAST_WORDS_SECONDS)


def _follow(
    recipe: RankRecipe, number: int, port: int, connection: socket.socket, outbox: Outbox
) -> NoReturn:
    config, device = recipe.config, recipe.devices[number]
    model = replace(recipe.model, device=device)
    gpt = load_gpt(model, recipe.checkpoint, rank=recipe.rank(number))
    limit_cpu_threads(gpt.config, device, config.engines_on_cpu)
    shape = BatchShape.of(config.max_num_seqs, gpt.config.block_size, config.page_size)
    batch = Batch(shape, device)
    outbox.put(RankLoaded(pool_pages(gpt, shape, config)))
    (prepare,) = receive(connection, TO_RANK)
    exchange = recipe.connect(number, join_store(port, recipe.rank(number).count))
    runner = ModelRunner(gpt, shape, prepare.num_pages, config, exchange)
    runner.prepare(batch)
    settle_heap()
    with torch.no_grad():
        while True:
            for message in receive(connection, TO_RANK):
                match message:
                    case BatchUpdate():
                        batch.follow(message)
                    case Span(rows=rows, images=images, passes=passes, window=window):
                        runner.run(batch, rows, images, passes, window)
