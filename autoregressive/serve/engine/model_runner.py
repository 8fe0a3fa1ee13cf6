"""Runs a transformer's passes over a batch: the layers' operations in order, captured as one CUDA
graph for each number of sequences and each window.

A pass reads the batch's device-side state and nothing else, so any number of passes can be enqueued
without the host. Its first operation (`embed`) starts only when everything before it has ended;
inside a pass, kernels overlap (programmatic dependent launch).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from autoregressive.devices import ieee_float32
from autoregressive.errors import Change, SettingError, tell
from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.exchange import Exchange
from autoregressive.serve.engine.kv_pages import KVPages, page_dtype
from autoregressive.serve.engine.layers import Layers, LayersFactory, ModelWeights
from autoregressive.serve.engine.lookahead import Lookahead
from autoregressive.weights.quantized import (
    can_be_paired,
    pair_products,
    quantization_of,
    quantize_products,
)
from kernels.attention import head_stride
from kernels.attention_reference import attention_reference
from kernels.operations import MANY_ROWS, Operations, select_operations, triton_runs_on
from kernels.sampling import MOST_LOGITS

# of a pass, up to which "auto" looks ahead on a CPU; with more, windows gain less than trials cost
_CPU_POSITIONS = 8
_LEAST_FP8 = (8, 9)  # compute capability


class ModelRunner:
    """Runs steps, and owns the KV pages.

    Args:
        gpt: in eval mode on its device, quantised as the config says. w1 and w3 of each layer are
            moved into one tensor, of which they become views. Quantised weights may change their
            order, of which they tell.
        shape: the batches' sizes.
        num_pages: pages of `shape.page_size` tokens; one page number holds all layers.
        exchange: with the other ranks, if `gpt` is one rank's part of a model.

    Raises:
        SettingError: the backend does not run on the model's device.
    """

    def __init__(
        self,
        gpt: Transformer,
        shape: BatchShape,
        num_pages: int,
        config: EngineConfig,
        exchange: Exchange | None = None,
    ) -> None:
        weight = gpt.output.weight
        self.model, self.shape, self.config, self.device = gpt.config, shape, config, weight.device
        self.num_pages = num_pages
        self.operations = self.make_operations(gpt)
        reaches_memory = exchange is not None and exchange.reaches_memory
        self._factory = layers_factory(gpt, self.operations, config, reaches_memory)
        if self._factory.pairs:
            pair_products(gpt)
        self.weights = ModelWeights.of(gpt)
        self.kv_pages = KVPages.zeros(gpt, num_pages, shape.page_size, config)
        self._sizes = pass_sizes(gpt, shape, config)
        plan = self._factory.plan(self._sizes)
        self._scratch = plan.allocate(self.device)
        self.exchange = exchange
        if exchange is not None:
            exchange.open(plan.shared)
        # by sequences and window
        self._layers: dict[tuple[int, int], Layers] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    @property
    def alive(self) -> bool:
        """Whether all other processes that it needs respond: it needs none."""
        return True

    @torch.no_grad()
    @ieee_float32()
    def prepare(self, batch: Batch, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles the kernels and captures a graph for every size of a pass. Does nothing where
        there are no graphs.

        Args:
            batch: empty, all padding: a pass of each size runs once.
            progress: called with graphs done and in all.
        """
        if not self.config.uses_graphs(self.device):
            return
        pool = torch.cuda.graph_pool_handle()
        # Largest first: the smaller ones' graphs then find memory in its pool.
        for done, (sequences, window) in enumerate(reversed(self._sizes)):
            self._pass(batch, sequences, window)
            torch.cuda.synchronize(self.device)
            # Nothing else holds the graph, so that it is freed with the others if this fails.
            self._graphs[sequences, window] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[sequences, window], pool=pool):
                self._pass(batch, sequences, window)
            if progress is not None:
                progress(done + 1, len(self._sizes))

    @ieee_float32()
    def run(self, batch: Batch, rows: int, images: int, passes: int, window: int) -> None:
        """Enqueues passes for the first `rows` rows and `images` images; does not wait for the
        device.
        """
        assert 1 <= images <= rows <= self.shape.max_rows
        one_pass: Callable[[], None] = partial(self._pass, batch, rows, window)
        if self._graphs:
            sizes = [size for size in self._graphs if size[0] >= rows and size[1] == window]
            one_pass = self._graphs[min(sizes)].replay
        for _ in range(passes):
            one_pass()

    def _pass(self, batch: Batch, sequences: int, window: int) -> None:
        """Draws the tokens of a window for each image of the first sequences. Padding among them
        touches no page and no code, so the draw may count an image for every sequence.
        """
        layers = self.layers_for(sequences, window)
        logits = layers.run(self.weights, self.kv_pages, batch)
        self.operations.draw_tokens(
            logits,
            batch.positions[:sequences],
            batch.limits[:sequences],
            batch.conditional_rows,
            batch.unconditional_rows,
            batch.guided_steps,
            batch.image_slots,
            batch.guidance_scales,
            batch.temperatures,
            batch.top_ks,
            batch.top_ps,
            batch.seeds,
            batch.image_indices,
            batch.codes,
            batch.lengths,
            batch.failed,
            batch.drafted,
            batch.accepted,
            layers.verdicts,
            images=sequences,
        )

    def layers_for(self, sequences: int, window: int = 1) -> Layers:
        """The layers that carry out passes of one size."""
        size = sequences, window
        if size not in self._layers:
            self._layers[size] = self._factory.make(*size, self._scratch, self.exchange)
        return self._layers[size]

    def make_operations(self, gpt: Transformer) -> Operations:
        """The operations that the device runs.

        Raises:
            SettingError: the backend does not run on the model's device.
        """
        return model_operations(gpt, self.config, tell)


def check_device(
    config: EngineConfig, device: torch.device, quantization: str | None = None
) -> None:
    """Finds out whether a device runs what the settings ask for.

    Args:
        quantization: of the weights as they are, where the settings do not say.

    Raises:
        SettingError: the backend does not run there, or fp8 does not.
    """
    asked = config.quantization or quantization
    remedy = "use int8" if config.quantization else "convert the original weights to int8"
    for name, value, others in (
        ("quantization", asked, remedy),
        ("kv_cache_dtype", config.kv_cache_dtype, "use int8"),
    ):
        if value == "fp8" and device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            if (major, minor) < _LEAST_FP8:
                told = f"{device} has compute capability {major}.{minor}, and fp8 takes 8.9"
                raise SettingError(name, value, f"{told}; {others}")
    if config.attention_backend == "triton" and not triton_runs_on(device):
        told = f"{device} is no GPU of compute capability 8.0 or above; use auto or torch"
        raise SettingError("attention_backend", "triton", told)


def quantize_as_configured(gpt: Transformer, config: EngineConfig) -> None:
    """Quantises the weights of a model in its place, if the settings ask for it and they are not
    quantised yet.

    Raises:
        SettingError: they are quantised in another way, or the device does not run fp8.
    """
    there, asked = quantization_of(gpt), config.quantization
    check_device(config, gpt.output.weight.device, there)
    if asked is not None and there is None:
        quantize_products(gpt, asked)
    elif asked not in (None, there):
        raise SettingError("quantization", asked, f"the weights are {there} already; leave it out")


def layers_factory(
    gpt: Transformer,
    operations: Operations,
    config: EngineConfig,
    reaches_memory: bool = False,
) -> LayersFactory:
    """The factory of the layers that steps use."""
    weight = gpt.output.weight
    library = weight.device.type == "cuda" and not config.deterministic
    quantized = quantization_of(gpt) is not None
    return LayersFactory(
        gpt.config,
        weight.dtype,
        operations,
        library,
        quantized,
        pairable=can_be_paired(gpt),
        reaches_memory=reaches_memory,
    )


def make_lookahead(gpt: Transformer, config: EngineConfig) -> Lookahead:
    """What chooses the windows of passes. "auto" keeps to a token a pass on a GPU that runs torch's
    attention: there the tokens of a row depend on how many positions a pass has.

    Raises:
        SettingError: the backend does not run on the model's device.
    """
    operations = model_operations(gpt, config, tell=_nobody)
    if not gpt.output.weight.is_cuda:
        return Lookahead(config.lookahead, most_positions=_CPU_POSITIONS)
    torch_attends = operations.attention is attention_reference
    return Lookahead("off" if config.lookahead == "auto" and torch_attends else config.lookahead)


def pass_sizes(gpt: Transformer, shape: BatchShape, config: EngineConfig) -> list[tuple[int, int]]:
    """The numbers of sequences that passes are carried out with, and the windows of each.

    Raises:
        SettingError: the backend does not run on the model's device, or the largest pass has more
            logits than a draw addresses.
    """
    counts = set(range(1, shape.max_rows + 1))
    lookahead = make_lookahead(gpt, config)
    if config.uses_graphs(gpt.output.weight.device):
        # Padding must not lead beyond the positions up to which sums have a fixed order.
        edges = {MANY_ROWS // window for window in lookahead.windows(1)}
        counts &= {*row_buckets(shape.max_rows), *edges}
    sizes = [(count, window) for count in sorted(counts) for window in lookahead.windows(count)]
    positions, most = max(map(prod, sizes)), MOST_LOGITS // gpt.config.vocab_size
    if positions > most:
        told = f"{shape.max_rows} rows make passes of {positions} positions; at most {most} can be"
        remedies = [Change("lower", "lookahead"), Change("lower", "max_num_seqs")]
        raise SettingError("lookahead", config.lookahead, told, remedies)
    return sizes


def model_operations(
    gpt: Transformer, config: EngineConfig, tell: Callable[[str], None]
) -> Operations:
    """The operations for a model on its device.

    Args:
        tell: called with one line for the user where something falls back.

    Raises:
        SettingError: the backend does not run on the model's device.
    """
    weight, model = gpt.output.weight, gpt.config
    check_device(config, weight.device, quantization_of(gpt))
    return select_operations(
        weight.device,
        weight.dtype,
        model.heads_of_rank,
        model.head_size,
        config.attention_backend,
        tell=tell,
    )


def _nobody(message: str) -> None:
    """Tells a message to nobody: to the user it is told once, by the runner."""


def row_buckets(max_rows: int) -> list[int]:
    """The numbers of rows that graphs are captured for. From 32 on, each is at most a third more
    than the one before.
    """
    sizes = [1, 2, *range(4, 16, 4), *range(16, 64, 8), *range(64, 128, 16)]
    sizes += [*range(128, 256, 32), *range(256, 512, 64), *range(512, max_rows, 128)]
    return [size for size in sizes if size < max_rows] + [max_rows]


@dataclass(frozen=True)
class StepBytes:
    """Memory that the passes of a model take beside its weights and pages."""

    scratch: int
    # at most, in passing: what torch's attention makes of the pages of all rows, or its products of
    # quantised weights; 0 where the kernels run
    gathered: int

    @classmethod
    def of(cls, gpt: Transformer, shape: BatchShape, config: EngineConfig) -> "StepBytes":
        """Computes the memory from shapes alone, before any of it is taken.

        Raises:
            SettingError: the backend does not run on the model's device.
        """
        operations = model_operations(gpt, config, tell=_nobody)
        sizes = pass_sizes(gpt, shape, config)
        # of ranks, whichever way of their exchange takes more
        ways = (False,) if gpt.config.ranks == 1 else (False, True)
        factories = (layers_factory(gpt, operations, config, way) for way in ways)
        scratch = max(factory.plan(sizes).bytes for factory in factories)
        if operations.attention is not attention_reference:
            return cls(scratch, 0)
        # Beside the keys in float32, two copies of the values and, of narrower ones, a third in
        # float32: 12 bytes an element. Of every query's scores there are as many copies.
        tokens = shape.max_rows * shape.pages_per_row * shape.page_size
        window = max(window for _, window in sizes)
        stride = head_stride(gpt.config.head_size, page_dtype(gpt, config).itemsize)
        gathered = 12 * tokens * gpt.config.heads_of_rank * (stride + window)
        if quantization_of(gpt) is not None:
            # torch's products make float32 of the weights, and then the products' dtype
            model = gpt.config
            largest = max(2 * model.ffn_dim, 3 * model.dim) * model.dim
            gathered = max(gathered, largest * (4 + gpt.output.weight.element_size()))
        return cls(scratch, gathered)
