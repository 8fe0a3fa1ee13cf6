"""The ways to carry out a pass's layers: one class each, for one number of rows.

A pass feeds each sequence its newest token and, in a window of more than one, guesses behind it.
Each of them is a row: row r is new token r % window of sequence r // window.

`LayersFactory.kind` chooses the class, and nothing else asks which one it is. A new way to carry
out a step is one more class here and one line there. The engine, the tuner and the benchmarks run
the same objects.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from typing_extensions import override

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import Transformer, TransformerBlock
from autoregressive.serve.engine.batch import Batch
from autoregressive.serve.engine.exchange import TERMS, Exchange
from autoregressive.serve.engine.kv_pages import KVPages, LayerPages
from autoregressive.weights.quantized import join_halves, weights_of
from kernels.operations import MANY_ROWS, FusedProducts, Operations
from kernels.quantization import Weights

Dims = tuple[int, ...]
# Gives memory for a tensor of any values: name, shape and dtype. Tensors of one name and dtype may
# share it.
Empty = Callable[[str, Dims, torch.dtype], Tensor]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's parameters as the operations take them. They share the model's memory.

    Of several ranks each has a part of the heads and of the feed-forward layer.
    """

    attention_norm: Tensor  # [width]
    qkv: Weights  # [3 * width of the heads, width]
    output: Weights  # [width, width of the heads]
    ffn_norm: Tensor  # [width]
    gate_up: Weights  # [2 * ffn width, width]: w1 above w3
    down: Weights  # [width, ffn width]

    @classmethod
    @torch.no_grad()
    def of(cls, block: TransformerBlock) -> "LayerWeights":
        """Takes the parameters of a block.

        w1 and w3 move into one tensor and become views of it, so that nothing is held twice.
        """
        attention, feed_forward = block.attention, block.feed_forward
        return cls(
            attention_norm=block.attention_norm.weight,
            qkv=weights_of(attention.wqkv),
            output=weights_of(attention.wo),
            ffn_norm=block.ffn_norm.weight,
            gate_up=join_halves(feed_forward.w1, feed_forward.w3),
            down=weights_of(feed_forward.w2),
        )


@dataclass(frozen=True)
class ModelWeights:
    """A transformer's parameters as the operations take them."""

    token_embedding: Tensor  # [vocabulary, width]
    class_embedding: Tensor  # [classes + 1, width]
    layers: list[LayerWeights]
    final_norm: Tensor  # [width]
    head: Tensor  # [vocabulary, width]; of several ranks each has a part
    rotary: Tensor  # float32 [tokens + 1, head_size / 2, 2]

    @classmethod
    def of(cls, gpt: Transformer) -> "ModelWeights":
        """Takes the parameters of a model; see `LayerWeights.of`."""
        return cls(
            token_embedding=gpt.tok_embeddings.weight,
            class_embedding=gpt.cls_embedding.embedding_table.weight,
            layers=[
                LayerWeights.of(block)
                for block in gpt.layers
                if isinstance(block, TransformerBlock)
            ],
            final_norm=gpt.norm.weight,
            head=gpt.output.weight,
            rotary=gpt.freqs_cis,
        )

    @property
    def next_norms(self) -> list[Tensor]:
        """The weight of the norm that follows each layer."""
        return [*(layer.attention_norm for layer in self.layers[1:]), self.final_norm]


class Layers(ABC):
    """Carries out a pass from its embeddings to its logits, for one number of rows.

    Args:
        sequences: of the pass.
        window: new tokens of a sequence.
        config: the model's shape.
        dtype: of its weights, before they are quantised.
        operations: what the device runs. Each operation has the name of its kernel: `linear` is
            kernels/linear.py's or its reference, `embed` and `add_norm` are kernels/norm.py's,
            `draw_tokens` is kernels/sampling.py's. On Hopper `attention` and `fused` are those of
            kernels/hopper/.
        empty: gives the scratch memory; a constructor asks for all that its steps need.
        exchange: with the other ranks, if several share the model; None, too, where only memory is
            counted.
    """

    qkv: Tensor  # [splits, rows, 3 * width of the heads]
    # Where the products norm their inputs: [blocks, rows], sums of the residual stream's squares.
    squares: Tensor | None = None
    headroom = 1.0  # scales what the products norm themselves, so that fp16 holds it

    def __init__(
        self,
        config: GPTConfig,
        dtype: torch.dtype,
        operations: Operations,
        sequences: int,
        window: int,
        empty: Empty,
        exchange: Exchange | None = None,
    ) -> None:
        self.config, self.dtype, self.operations = config, dtype, operations
        self.sequences, self.rows = sequences, (rows := sequences * window)
        self.exchange = exchange
        # float32 numbers of each part of the memory that the ranks' GPUs reach, by name
        self.shared: dict[str, int] = {}
        width, heads = config.dim, config.heads_of_rank
        chunks = operations.attention_chunks(config.block_size)
        self.residual = empty("residual", (rows, width), torch.float32)
        self.normed = empty("normed", (rows, width), dtype)
        self.chunk_out = empty("chunk_out", (rows, heads, chunks, config.head_size), torch.float32)
        self.chunk_stats = empty("chunk_stats", (rows, heads, chunks, 2), torch.float32)
        self.attn_out = empty("attn_out", (rows, config.width_of_rank), dtype)
        self.hidden = empty("hidden", (rows, config.ffn_of_rank), dtype)
        self.logits = empty("logits", (rows, config.vocab_size), torch.float32)
        self.verdicts = empty("verdicts", (rows,), torch.int32)
        self._allocate(empty)

    @abstractmethod
    def _allocate(self, empty: Empty) -> None:
        """Asks for the scratch memory that only this way needs."""

    def run(self, weights: ModelWeights, kv_pages: KVPages, batch: Batch) -> Tensor:
        """Feeds the new tokens of every sequence.

        Returns:
            Float32 [rows, vocabulary]: `self.logits`, overwritten by the next step.
        """
        self.embed(
            weights.token_embedding,
            weights.class_embedding,
            weights.layers[0].attention_norm,
            batch,
        )
        for layer, next_norm, pages in zip(
            weights.layers, weights.next_norms, kv_pages.layers, strict=True
        ):
            self.layer(layer, next_norm, pages, weights.rotary, batch)
        self.head(weights.head)
        return self.logits

    def embed(self, tokens: Tensor, classes: Tensor, next_norm: Tensor, batch: Batch) -> None:
        """Starts the residual stream, and prepares the first layer's input.

        Args:
            tokens: [vocabulary, width], the embedding of codes.
            classes: [classes + 1, width], the embedding of labels.
            next_norm: [width], the weight of the norm that follows.
        """
        self.operations.embed(
            batch.codes,
            batch.row_slots[: self.sequences],
            batch.positions[: self.sequences],
            batch.limits[: self.sequences],
            batch.labels[: self.sequences],
            tokens,
            classes,
            next_norm,
            self.residual,
            self.normed,
            self.squares,
            eps=self.config.norm_eps,
            headroom=self.headroom,
        )

    @abstractmethod
    def layer(
        self,
        layer: LayerWeights,
        next_norm: Tensor,
        kv_pages: LayerPages,
        rotary: Tensor,
        batch: Batch,
    ) -> None:
        """Adds one layer to the residual stream, and prepares the next one's input.

        Args:
            next_norm: [width], the weight of the norm that follows.
            kv_pages: of this layer.
        """

    @abstractmethod
    def head(self, head: Tensor) -> None:
        """Writes `logits`, from the residual stream normed by `next_norm` of the last layer."""

    def attend(self, kv_pages: LayerPages, rotary: Tensor, batch: Batch) -> None:
        """Writes the new tokens' keys and values to their pages, and `attn_out`.

        One kernel attends within each chunk of the context, and another combines the chunks.
        """
        key_pages, value_pages = kv_pages.pages
        self.operations.attention(
            self.qkv,
            rotary,
            key_pages,
            value_pages,
            batch.page_table[: self.sequences],
            batch.positions[: self.sequences],
            batch.limits[: self.sequences],
            self.chunk_out,
            self.chunk_stats,
            self.attn_out,
            kv_pages.scales,
        )


class PlainLayers(Layers):
    """Uses kernels that run everywhere, and read quantised weights, too. Products leave partial
    sums, which the kernels of the norms add up.
    """

    def _allocate(self, empty: Empty) -> None:
        width, heads, ffn = self.config.dim, self.config.width_of_rank, self.config.ffn_of_rank
        self.qkv = self._partials(empty, "qkv", 3 * heads, width)
        self.projected = self._terms(empty, "projected", width, heads)
        self.down = self._terms(empty, "down", width, ffn)

    def _partials(self, empty: Empty, name: str, outputs: int, inputs: int) -> Tensor:
        """Memory for what `product` writes."""
        splits = self.operations.linear_splits(outputs, inputs)
        return empty(name, (splits, self.rows, outputs), torch.float32)

    def _terms(self, empty: Empty, name: str, outputs: int, inputs: int) -> Tensor:
        """Memory for what `project` writes."""
        return self._partials(empty, name, outputs, inputs)

    @override
    def layer(
        self,
        layer: LayerWeights,
        next_norm: Tensor,
        kv_pages: LayerPages,
        rotary: Tensor,
        batch: Batch,
    ) -> None:
        self.product(self.normed, layer.qkv, self.qkv)
        self.attend(kv_pages, rotary, batch)
        self.project(self.attn_out, layer.output, self.projected)
        self.add(self.projected, layer.ffn_norm)
        self.gated_product(layer.gate_up)
        self.project(self.hidden, layer.down, self.down)
        self.add(self.down, next_norm)

    def add(self, terms: Tensor, next_norm: Tensor) -> None:
        """Adds terms [count, rows, width] to the residual stream, and norms it."""
        eps = self.config.norm_eps
        self.operations.add_norm(self.residual, terms, next_norm, self.normed, eps=eps)

    @override
    def head(self, head: Tensor) -> None:
        self.whole_product(head, self.logits)

    def product(self, x: Tensor, weight: Weights, out: Tensor) -> None:
        """Writes x W^T as partial sums [splits, rows, outputs]."""
        self.operations.linear(x, weight, out)

    def project(self, x: Tensor, weight: Weights, out: Tensor) -> None:
        """Writes x W^T as terms [count, rows, width], which `add` takes."""
        self.product(x, weight, out)

    def whole_product(self, weight: Tensor, out: Tensor) -> None:
        """Writes `normed` W^T as float32 [rows, outputs]."""
        self.operations.whole_linear(self.normed, weight, out)

    def gated_product(self, gate_up: Weights) -> None:
        """Writes `hidden` from `normed`."""
        self.operations.swiglu(self.normed, gate_up, self.hidden)


class LibraryLayers(PlainLayers):
    """Uses the products of cuBLAS, which are faster for many rows than those of `PlainLayers`."""

    def _allocate(self, empty: Empty) -> None:
        super()._allocate(empty)
        self.gate_up = empty("gate_up", (self.rows, 2 * self.config.ffn_of_rank), self.dtype)

    def _partials(self, empty: Empty, name: str, outputs: int, inputs: int) -> Tensor:
        return empty(name, (1, self.rows, outputs), self.dtype)

    def product(self, x: Tensor, weight: Weights, out: Tensor) -> None:
        """Writes x W^T [1, rows, outputs]."""
        assert isinstance(weight, Tensor)
        torch.mm(x, weight.t(), out=out[0])

    def whole_product(self, weight: Tensor, out: Tensor) -> None:
        """Writes `normed` W^T as float32 [rows, outputs]."""
        torch.mm(self.normed, weight.t(), out_dtype=torch.float32, out=out)

    def gated_product(self, gate_up: Weights) -> None:
        """Writes `hidden` from `normed`."""
        assert isinstance(gate_up, Tensor)
        torch.mm(self.normed, gate_up.t(), out=self.gate_up)
        self.operations.gate(self.gate_up, self.hidden)


class SplitLayers(PlainLayers):
    """Carries out one rank's part of a model that several ranks share.

    Before the residual stream is added to, and behind the head, the ranks exchange what they have.
    From there on all of them hold the same bits. Each rank sends one term of a sum. So its product
    is written in one piece: the partial sums of all splits would be many times as many bytes.
    """

    def _allocate(self, empty: Empty) -> None:
        super()._allocate(empty)
        config, rows = self.config, self.rows
        self.terms_of_ranks = empty("terms", (config.ranks, rows, config.dim), torch.float32)
        part = rows, config.vocabulary_of_rank
        self.own_logits = empty("own_logits", part, torch.float32)
        self.parts = empty("parts", (config.ranks, *part), torch.float32)
        self.shared = {TERMS: max(rows * config.dim, self.own_logits.numel())}

    @override
    def _terms(self, empty: Empty, name: str, outputs: int, inputs: int) -> Tensor:
        return empty(name, (1, self.rows, outputs), torch.float32)

    @override
    def project(self, x: Tensor, weight: Weights, out: Tensor) -> None:
        self.operations.whole_linear(x, weight, out[0])

    @override
    def add(self, terms: Tensor, next_norm: Tensor) -> None:
        assert self.exchange is not None
        super().add(self.exchange.collect(terms[0], self.terms_of_ranks), next_norm)

    @override
    def head(self, head: Tensor) -> None:
        assert self.exchange is not None
        self.whole_product(head, self.own_logits)
        self.exchange.gather(self.own_logits, self.parts)
        by_rank = self.logits.unflatten(1, (self.config.ranks, -1))
        by_rank.copy_(self.parts.transpose(0, 1))


class SplitLibraryLayers(SplitLayers, LibraryLayers):
    """The same with the products of cuBLAS. The terms of sums over ranks are float32."""

    @override
    def project(self, x: Tensor, weight: Weights, out: Tensor) -> None:
        assert isinstance(weight, Tensor)
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out[0])


class FusedLayers(Layers):
    """Uses products that norm their inputs and add themselves to the residual stream. A layer has
    two kernels fewer then.

    See kernels/hopper/products.py.
    """

    squares: Tensor

    def products_of(self, operations: Operations) -> FusedProducts | None:
        """The products of this way."""
        return operations.fused

    def _allocate(self, empty: Empty) -> None:
        products = self.products_of(self.operations)
        assert products is not None
        self.products = products
        width = self.config.dim
        self.headroom = products.headroom
        outputs = 3 * self.config.width_of_rank
        splits = products.linear_splits(outputs, width, self.rows)
        self.qkv = empty("qkv", (splits, self.rows, outputs), torch.float32)
        # Sums of the residual stream's squares, for a layer's attention and for its feed-forward
        # half.
        squares = products.project_blocks(width), self.rows
        self.squares = empty("squares", squares, torch.float32)
        self.ffn_squares = empty("ffn_squares", squares, torch.float32)

    @override
    def layer(
        self,
        layer: LayerWeights,
        next_norm: Tensor,
        kv_pages: LayerPages,
        rotary: Tensor,
        batch: Batch,
    ) -> None:
        products, eps = self.products, self.config.norm_eps
        products.linear(self.normed, self.squares, layer.qkv, self.qkv, eps=eps)
        self.attend(kv_pages, rotary, batch)
        self.project("attention", self.attn_out, layer.output, layer.ffn_norm, self.ffn_squares)
        products.swiglu(self.normed, self.ffn_squares, layer.gate_up, self.hidden, eps=eps)
        self.project("ffn", self.hidden, layer.down, next_norm, self.squares)

    def project(
        self, name: str, x: Tensor, weight: Weights, next_norm: Tensor, squares: Tensor
    ) -> None:
        """Adds x W^T to the residual stream; writes `normed` and `squares`.

        Args:
            name: of the half of the layer, "attention" or "ffn".
        """
        self.products.project(x, weight, self.residual, next_norm, self.normed, squares)

    @override
    def head(self, head: Tensor) -> None:
        self.products.head(self.normed, self.squares, head, self.logits, eps=self.config.norm_eps)


class FusedSplitLayers(FusedLayers):
    """Uses such products for one rank's part of a model, on GPUs that reach each other's memory.
    The products that enter the residual stream add up over ranks themselves.

    See kernels/hopper/peers.py.
    """

    @override
    def _allocate(self, empty: Empty) -> None:
        super()._allocate(empty)
        assert self.products.of_ranks is not None
        self.of_ranks = self.products.of_ranks
        part = self.rows, self.config.vocabulary_of_rank
        self.own_logits = empty("own_logits", part, torch.float32)
        terms, logits = self.residual.numel(), self.own_logits.numel()
        sizes = {"attention": terms, "ffn": terms, "logits": logits}
        self.shared = {name: self.config.ranks * size for name, size in sizes.items()}

    @override
    def project(
        self, name: str, x: Tensor, weight: Weights, next_norm: Tensor, squares: Tensor
    ) -> None:
        assert self.exchange is not None
        inboxes = self.exchange.inboxes[name]
        tensors = self.residual, next_norm, self.normed, squares
        self.of_ranks.project(x, weight, *tensors, inboxes)

    @override
    def head(self, head: Tensor) -> None:
        eps = self.config.norm_eps
        self.products.head(self.normed, self.squares, head, self.own_logits, eps=eps)
        assert self.exchange is not None
        inboxes = self.exchange.inboxes["logits"]
        self.of_ranks.gather(self.own_logits, inboxes, self.logits)


class QuantizedLayers(FusedLayers):
    """Uses such products by weights of a byte, which are paired.

    See kernels/hopper/quantized_products.py.
    """

    @override
    def products_of(self, operations: Operations) -> FusedProducts | None:
        return operations.quantized


class ScratchPlan:
    """Memory that the layers for several numbers of rows share, because only one step runs at a
    time. It is counted before any is taken.
    """

    def __init__(self) -> None:
        # by name and dtype, the most of any number of rows
        self._elements: dict[tuple[str, torch.dtype], int] = {}
        # float32 numbers that ranks share, by name, the most of any number of rows
        self.shared: dict[str, int] = {}

    def count(self, name: str, dims: Dims, dtype: torch.dtype) -> Tensor:
        """Returns a tensor without memory; see `Empty`."""
        self._elements[name, dtype] = max(self._elements.get((name, dtype), 0), prod(dims))
        return torch.empty(dims, dtype=dtype, device="meta")

    @property
    def bytes(self) -> int:
        """Bytes of all that was asked for."""
        own = sum(elements * dtype.itemsize for (_, dtype), elements in self._elements.items())
        return own + 4 * sum(self.shared.values())

    def allocate(self, device: torch.device) -> Empty:
        """Takes the memory. Returns what gives the layers their part of it."""
        memory = {
            (name, dtype): torch.empty(elements, dtype=dtype, device=device)
            for (name, dtype), elements in self._elements.items()
        }
        return lambda name, dims, dtype: memory[name, dtype][: prod(dims)].view(dims)


@dataclass(frozen=True)
class LayersFactory:
    """Makes the layers for any number of rows.

    Args:
        library: products of many rows may be a library's.
        quantized: whether the weights of the layers' products are.
        pairable: whether all of these can be paired.
        reaches_memory: as of `Exchange`.
    """

    config: GPTConfig
    dtype: torch.dtype
    operations: Operations
    library: bool
    quantized: bool = False
    pairable: bool = False
    reaches_memory: bool = False

    @property
    def pairs(self) -> bool:
        """Whether the layers take paired weights, for any number of rows."""
        alone = self.config.ranks == 1
        return self.pairable and alone and self.operations.quantized is not None

    def kind(self, rows: int) -> type[Layers]:
        """The class that carries out a step of so many rows. This is the one place where it is
        decided.
        """
        by_library = self.library and rows > MANY_ROWS and not self.quantized
        if self.config.ranks > 1:
            if self.operations.fused is not None and self.reaches_memory:
                return FusedSplitLayers
            return SplitLibraryLayers if by_library else SplitLayers
        if self.quantized:
            return QuantizedLayers if self.pairs else PlainLayers
        if self.operations.fused is not None:
            return FusedLayers
        return LibraryLayers if by_library else PlainLayers

    def make(
        self, sequences: int, window: int, empty: Empty, exchange: Exchange | None = None
    ) -> Layers:
        """The layers for passes of one size, in memory that `empty` gives."""
        kind = self.kind(sequences * window)
        settings = self.config, self.dtype, self.operations
        return kind(*settings, sequences, window, empty, exchange)

    def plan(self, sizes: list[tuple[int, int]]) -> ScratchPlan:
        """The memory that the layers for all of these sequences and windows share."""
        plan = ScratchPlan()
        for sequences, window in sizes:
            layers = self.make(sequences, window, plan.count)
            for name, count in layers.shared.items():
                plan.shared[name] = max(plan.shared.get(name, 0), count)
        return plan
