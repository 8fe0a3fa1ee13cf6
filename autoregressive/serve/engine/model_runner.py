"""Runs a transformer's steps over a batch: the layers' operations in order, captured as one CUDA graph for each number of rows.

A step reads the batch's device-side state and nothing else, so any number of steps can be enqueued without the host. Its first
operation (`embed`) starts only when everything before it has ended; inside a step, kernels overlap (programmatic dependent launch).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from math import prod

import torch
from torch import Tensor

from autoregressive.common.devices import ieee_float32
from autoregressive.common.errors import tell
from autoregressive.models.gpt import Transformer, TransformerBlock
from autoregressive.serve.engine.batch import Batch, BatchShape
from kernels.attention import attention_reference, head_stride
from kernels.dispatch import MANY_ROWS, Operations, StreamProducts, select_operations


@dataclass(frozen=True)
class RunnerConfig:
    """How steps are carried out."""

    attention_backend: str = "auto"  # "auto", "triton" or "torch"
    enforce_eager: bool = False  # no CUDA graphs
    deterministic: bool = False  # the same numbers whatever the batch: no library products for many rows

    def uses_graphs(self, device: torch.device) -> bool:
        """Whether steps are captured, for each of `row_buckets`; else they run with any number of rows."""
        return device.type == "cuda" and not self.enforce_eager

    def uses_library(self, device: torch.device, rows: int) -> bool:
        """Whether products of so many rows are a library's."""
        return device.type == "cuda" and not self.deterministic and rows > MANY_ROWS


@dataclass(frozen=True)
class LayerWeights:
    """One layer's parameters: the model's own memory, as the operations take it."""

    attention_gain: Tensor  # [width]
    qkv: Tensor  # [3 * width, width]
    output: Tensor  # [width, width]
    ffn_gain: Tensor  # [width]
    gate_up: Tensor  # [2 * ffn width, width]: w1 above w3
    down: Tensor  # [width, ffn width]


@dataclass(frozen=True)
class Workspace:
    """What the operations of a step leave to each other, for one number of rows."""

    residual: Tensor  # float32 [rows, width]
    normed: Tensor  # [rows, width]
    qkv: Tensor  # [splits, rows, 3 * width]
    mixed_chunks: Tensor  # float32 [rows, heads, chunks, head_size]
    chunk_stats: Tensor  # float32 [rows, heads, chunks, 2]
    mixed: Tensor  # [rows, width]
    hidden: Tensor  # [rows, ffn width]
    logits: Tensor  # float32 [rows, vocabulary]
    scratch: "PlainScratch | StreamScratch"


@dataclass(frozen=True)
class PlainScratch:
    """What products leave that a kernel of its own adds and norms."""

    projected: Tensor  # [splits, rows, width]
    down: Tensor  # [splits, rows, width]
    gate_up: Tensor | None = None  # [rows, 2 * ffn width], for many rows


@dataclass(frozen=True)
class StreamScratch:
    """What products leave that add and norm themselves: float32 sums of the residual stream's squares, [blocks, rows]."""

    squares: Tensor  # for a layer's attention
    ffn_squares: Tensor  # for its feed-forward half


class ModelRunner:
    """See the module. Owns the KV pages.

    Args:
        gpt: in eval mode on its device. w1 and w3 of each layer are moved into one tensor, of which they become views.
        shape: the batches' sizes.
        num_pages: pages of `shape.page_size` tokens; one page number holds all layers.

    Raises:
        ValueError: the backend does not run on the model's device.
    """

    def __init__(self, gpt: Transformer, shape: BatchShape, num_pages: int, config: RunnerConfig) -> None:
        model, weight = gpt.config, gpt.output.weight
        self.gpt, self.model, self.shape, self.config = gpt, model, shape, config
        self.device, self.dtype = weight.device, weight.dtype
        self.operations = select_operations(
            self.device, self.dtype, model.n_head, model.head_size, config.attention_backend, tell=tell
        )
        self.token_embedding, self.class_embedding = gpt.tok_embeddings.weight, gpt.cls_embedding.embedding_table.weight
        self.layers = [layer_weights(block) for block in gpt.layers if isinstance(block, TransformerBlock)]
        self.final_gain, self.head = gpt.norm.weight, weight
        self.rotary = gpt.freqs_cis
        stride = head_stride(model.head_size, weight.element_size())
        pages = (model.n_layer, 2, num_pages, model.n_head, shape.page_size, stride)
        self.kv_pages = torch.zeros(pages, dtype=self.dtype, device=self.device)
        self.workspaces = WorkspaceFactory(self)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    @ieee_float32()
    def prepare(self, batch: Batch, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles the kernels and captures a graph for every bucket of rows; without effect where there are no graphs.

        Args:
            batch: empty, all padding: the steps run once for each bucket.
            progress: called with buckets done and in all.
        """
        if not self.config.uses_graphs(self.device):
            return
        buckets = row_buckets(self.shape.max_rows)
        pool = None
        # Largest first: the smaller buckets' graphs then find memory in its pool.
        for done, rows in enumerate(reversed(buckets)):
            self._step(batch, rows)
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(batch, rows)
            pool = pool or graph.pool()
            self._graphs[rows] = graph
            if progress is not None:
                progress(done + 1, len(buckets))

    @ieee_float32()
    def run(self, batch: Batch, rows: int, images: int, steps: int) -> None:
        """Enqueues `steps` steps for the first `rows` rows and `images` images; does not wait for the device."""
        assert 1 <= images <= rows <= self.shape.max_rows
        bucket = next(size for size in row_buckets(self.shape.max_rows) if size >= rows) if self._graphs else rows
        for _ in range(steps):
            if self._graphs:
                self._graphs[bucket].replay()
            else:
                self._step(batch, bucket)

    def _step(self, batch: Batch, rows: int) -> None:
        """One token for the first `rows` rows: padding among them touches no page and no code."""
        operations, space = self.operations, self.workspaces.for_rows(rows)
        stream = operations.stream if isinstance(space.scratch, StreamScratch) else None
        operations.embed(
            batch.codes,
            batch.row_slots[:rows],
            batch.positions[:rows],
            batch.labels[:rows],
            self.token_embedding,
            self.class_embedding,
            self.layers[0].attention_gain,
            space.residual,
            space.normed,
            space.scratch.squares if isinstance(space.scratch, StreamScratch) else None,
            eps=self.model.norm_eps,
            headroom=1.0 if stream is None else stream.headroom,
        )
        next_gains = [layer.attention_gain for layer in self.layers[1:]] + [self.final_gain]
        for layer, kv_pages, next_gain in zip(self.layers, self.kv_pages, next_gains, strict=True):
            attend = partial(self._attend, space, kv_pages, batch.page_table[:rows], batch.positions[:rows])
            if stream is not None and isinstance(space.scratch, StreamScratch):
                self._streamed_layer(stream, space, space.scratch, layer, next_gain, attend)
            else:
                assert isinstance(space.scratch, PlainScratch)
                self._layer(space, space.scratch, layer, next_gain, attend)
        self._head(space)
        operations.draw_tokens(
            space.logits,
            batch.positions,
            batch.conditional_rows,
            batch.unconditional_rows,
            batch.image_slots,
            batch.guidance_scales,
            batch.temperatures,
            batch.top_ks,
            batch.top_ps,
            batch.seeds,
            batch.image_indices,
            batch.codes,
            batch.failed,
            images=rows,
        )

    def _layer(
        self, space: Workspace, scratch: PlainScratch, layer: LayerWeights, next_gain: Tensor, attend: Callable[[], None]
    ) -> None:
        """A layer whose norms have kernels of their own."""
        operations, eps = self.operations, self.model.norm_eps
        self._linear(space.normed, layer.qkv, space.qkv)
        attend()
        self._linear(space.mixed, layer.output, scratch.projected)
        operations.add_norm(space.residual, scratch.projected, layer.ffn_gain, space.normed, eps=eps)
        if scratch.gate_up is None:
            operations.swiglu(space.normed, layer.gate_up, space.hidden)
        else:
            torch.mm(space.normed, layer.gate_up.t(), out=scratch.gate_up)
            operations.gate(scratch.gate_up, space.hidden)
        self._linear(space.hidden, layer.down, scratch.down)
        operations.add_norm(space.residual, scratch.down, next_gain, space.normed, eps=eps)

    def _streamed_layer(
        self,
        stream: StreamProducts,
        space: Workspace,
        scratch: StreamScratch,
        layer: LayerWeights,
        next_gain: Tensor,
        attend: Callable[[], None],
    ) -> None:
        """A layer whose products norm their inputs and add themselves to the residual stream: two links less in its chain."""
        eps = self.model.norm_eps
        stream.linear(space.normed, scratch.squares, layer.qkv, space.qkv, eps=eps)
        attend()
        stream.project(space.mixed, layer.output, space.residual, layer.ffn_gain, space.normed, scratch.ffn_squares)
        stream.swiglu(space.normed, scratch.ffn_squares, layer.gate_up, space.hidden, eps=eps)
        stream.project(space.hidden, layer.down, space.residual, next_gain, space.normed, scratch.squares)

    def _attend(self, space: Workspace, kv_pages: Tensor, page_table: Tensor, positions: Tensor) -> None:
        key_pages, value_pages = kv_pages
        self.operations.attention(
            space.qkv,
            self.rotary,
            key_pages,
            value_pages,
            page_table,
            positions,
            space.mixed_chunks,
            space.chunk_stats,
            space.mixed,
        )

    def _linear(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        if self.many(x.shape[0]):
            torch.mm(x, weight.t(), out=out[0])
        else:
            self.operations.linear(x, weight, out)

    def _head(self, space: Workspace) -> None:
        stream = self.operations.stream
        if stream is not None and isinstance(space.scratch, StreamScratch):
            stream.head(space.normed, space.scratch.squares, self.head, space.logits, eps=self.model.norm_eps)
        elif self.many(space.logits.shape[0]):
            torch.mm(space.normed, self.head.t(), out_dtype=torch.float32, out=space.logits)
        else:
            self.operations.whole_linear(space.normed, self.head, space.logits)

    def many(self, rows: int) -> bool:
        """Whether products of so many rows are a library's."""
        return self.config.uses_library(self.device, rows)


@dataclass(frozen=True)
class WorkspacePlan:
    """The workspaces' tensors as shapes: what `WorkspaceFactory` allocates, and `StepBytes` sums up before it does."""

    gpt: Transformer
    shape: BatchShape
    config: RunnerConfig
    operations: Operations

    def tensors(self, rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of `Workspace`, for one number of rows."""
        model, weight = self.gpt.config, self.gpt.output.weight
        block = self.gpt.layers[0]
        assert isinstance(block, TransformerBlock)
        attention, width, ffn, dtype = block.attention, model.dim, model.ffn_dim, weight.dtype
        many = self.config.uses_library(weight.device, rows)
        chunks = (rows, model.n_head, self.operations.attention_chunks(self.shape.tokens, dtype.itemsize))

        stream = None if many else self.operations.stream

        def partials(weight: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
            if many:
                return (1, rows, weight.shape[0]), dtype
            splits = self.operations.linear_splits(weight, rows) if stream is None else stream.linear_splits(weight)
            return (splits, rows, weight.shape[0]), torch.float32

        output, down = attention.wo.weight, block.feed_forward.w2.weight
        found = {
            "residual": ((rows, width), torch.float32),
            "normed": ((rows, width), dtype),
            "qkv": partials(attention.wqkv.weight),
            "mixed_chunks": ((*chunks, model.head_size), torch.float32),
            "chunk_stats": ((*chunks, 2), torch.float32),
            "mixed": ((rows, width), dtype),
            "hidden": ((rows, ffn), dtype),
            "logits": ((rows, model.vocab_size), torch.float32),
        }
        if stream is not None:
            found["squares"] = (stream.project_blocks(down), rows), torch.float32
            found["ffn_squares"] = (stream.project_blocks(output), rows), torch.float32
        else:
            found |= {"projected": partials(output), "down": partials(down)}
            found |= {"gate_up": ((rows, 2 * ffn), dtype)} if many else {}
        return found

    def memory(self) -> dict[tuple[str, torch.dtype], int]:
        """Elements of each piece of memory that the workspaces of all numbers of rows share."""
        most = self.shape.max_rows
        graphs = self.config.uses_graphs(self.gpt.output.weight.device)
        elements: dict[tuple[str, torch.dtype], int] = {}
        for rows in row_buckets(most) if graphs else range(1, most + 1):
            for name, (dims, dtype) in self.tensors(rows).items():
                elements[name, dtype] = max(elements.get((name, dtype), 0), prod(dims))
        return elements


class WorkspaceFactory:
    """Cuts workspaces out of memory that all of them share: only one step runs at a time."""

    def __init__(self, runner: ModelRunner) -> None:
        self._plan = WorkspacePlan(runner.gpt, runner.shape, runner.config, runner.operations)
        sizes = self._plan.memory().items()
        self._memory = {(name, dtype): torch.empty(size, dtype=dtype, device=runner.device) for (name, dtype), size in sizes}
        self._made: dict[int, Workspace] = {}

    def for_rows(self, rows: int) -> Workspace:
        """The workspace for that many rows: tensors at the start of the memory of their names."""
        if rows not in self._made:
            planned = self._plan.tensors(rows)
            tensors = {name: self._memory[name, dtype][: prod(dims)].view(dims) for name, (dims, dtype) in planned.items()}
            kind = StreamScratch if "squares" in tensors else PlainScratch
            scratch = kind(**{field.name: tensors.pop(field.name) for field in fields(kind) if field.name in tensors})
            self._made[rows] = Workspace(scratch=scratch, **tensors)
        return self._made[rows]


@torch.no_grad()
def layer_weights(block: TransformerBlock) -> LayerWeights:
    """A block's parameters; w1 and w3 move into one tensor and become views of it, so that nothing is held twice."""
    attention, feed_forward = block.attention, block.feed_forward
    gate_up = torch.cat([feed_forward.w1.weight, feed_forward.w3.weight])
    feed_forward.w1.weight.data, feed_forward.w3.weight.data = gate_up.chunk(2)
    return LayerWeights(
        attention_gain=block.attention_norm.weight,
        qkv=attention.wqkv.weight,
        output=attention.wo.weight,
        ffn_gain=block.ffn_norm.weight,
        gate_up=gate_up,
        down=feed_forward.w2.weight,
    )


def row_buckets(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for; from 32 on, each is at most a third more than the one before."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512]
    step = 128
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] + step)
    return [size for size in sizes if size < max_rows] + [max_rows]


def page_bytes(gpt: Transformer, page_size: int) -> int:
    """Memory of one page in all layers, keys and values."""
    model, itemsize = gpt.config, gpt.output.weight.element_size()
    return 2 * model.n_layer * model.n_head * page_size * head_stride(model.head_size, itemsize) * itemsize


@dataclass(frozen=True)
class StepBytes:
    """Memory that the steps of a model take beside its weights and pages."""

    workspaces: int
    gathered: int  # at most, in passing: what torch's attention makes of the pages of all rows; 0 where the kernel runs

    @classmethod
    def of(cls, gpt: Transformer, shape: BatchShape, config: RunnerConfig) -> "StepBytes":
        """From shapes alone, before any of it is taken.

        Raises:
            ValueError: the backend does not run on the model's device.
        """
        model, device, dtype = gpt.config, gpt.output.weight.device, gpt.output.weight.dtype
        operations = select_operations(
            device, dtype, model.n_head, model.head_size, config.attention_backend, tell=lambda message: None
        )
        memory = WorkspacePlan(gpt, shape, config, operations).memory()
        workspaces = sum(elements * dtype.itemsize for (_, dtype), elements in memory.items())
        if operations.attention is not attention_reference:
            return cls(workspaces, 0)
        # Beside the keys in float32, two copies of the values and, of 16-bit ones, a third in float32: 12 bytes an element.
        tokens = shape.max_rows * shape.pages_per_row * shape.page_size
        return cls(workspaces, 12 * tokens * model.n_head * head_stride(model.head_size, dtype.itemsize))
