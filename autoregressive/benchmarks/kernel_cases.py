"""What bench_kernels.py measures: each operation of a step on random inputs of a model's shapes,
beside its reference.

The operations are called by the objects that carry out a step's layers (engine/layers.py), in their
scratch memory. Weights and KV pages come in as many copies as no cache holds. Bytes of products and
attention are the weights' and the KV cache's alone, as in serve/floor.py: activations stay in the
cache. The other operations have nothing else to move, so theirs are all that they read and write.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from autoregressive.models.config import GPTConfig
from autoregressive.models.rope import rotary_table_2d
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.layers import (
    FusedLayers,
    Layers,
    LayersFactory,
    LibraryLayers,
    PlainLayers,
)
from kernels.attention import AttentionTiles, combine, head_stride
from kernels.attention_reference import combine_reference
from kernels.hopper.products import HEADROOM
from kernels.hopper.products_reference import (
    fused_linear_reference,
    fused_project_reference,
    fused_swiglu_reference,
)
from kernels.operations import FusedProducts, Operations, torch_operations

_PAGE_SIZE = 16
_CELLS = 2**13  # tokens of an image to draw: more than a benchmark launches
_EPS = 1e-5


@dataclass(frozen=True)
class Setting:
    """A model's shape, and what runs it."""

    config: GPTConfig
    rows: int
    context: int  # tokens that each row attends to, the newest included
    device: torch.device
    dtype: torch.dtype
    operations: Operations
    cold_bytes: int  # so much between two uses of the same memory leaves no cache warm
    # of the operations' attention; None: torch's, which has no chunks to combine
    attention_tiles: AttentionTiles | None = None
    launch_pdl: bool = False

    @property
    def factory(self) -> LayersFactory:
        """The factory of layers that the engine uses in its default configuration."""
        return LayersFactory(self.config, self.dtype, self.operations, library=True)

    @cached_property
    def layers(self) -> Layers:
        """The layers that carry out a step of so many rows, with scratch memory of their own."""
        return self.factory.make(
            self.rows, lambda name, dims, dtype: self.empty(*dims, dtype=dtype)
        )

    @cached_property
    def batch(self) -> Batch:
        """Rows at the context, each with pages of its own in random order."""
        batch = Batch(BatchShape.of(self.rows, self.config.block_size, _PAGE_SIZE), self.device)
        batch.positions.fill_(self.context - 1)
        batch.labels.zero_()
        batch.row_slots.copy_(torch.arange(self.rows))
        batch.codes.random_(0, self.config.vocab_size)
        pages = self.pages_of_row
        batch.page_table[:, :pages] = torch.randperm(self.rows * pages).view(self.rows, pages)
        return batch

    @property
    def pages_of_row(self) -> int:
        """How many pages the context fills, the last one in part."""
        return -(-self.context // _PAGE_SIZE)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed numbers."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that is to be written."""
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def copies(self, size: int) -> int:
        """How many of something of `size` bytes are cold when they are used in turn."""
        return max(2, -(-self.cold_bytes // size))


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    operation: str
    shape: str
    bytes: int  # that must be moved
    run: Callable[[int], object]  # on a copy
    # relative, against the torch reference in float32; of the draw the share of other tokens
    error: Callable[[], float]
    multiplications: int = 0  # of a matrix product's elements; 0: counts as nothing
    copies: int = 1  # of weights or pages
    library: Callable[[int], object] | None = None  # cuBLAS's product on a copy


def cases(setting: Setting) -> Iterator[Case]:
    """Every operation of a step, each built when its turn comes: they need memory."""
    yield embed_case(setting)
    if isinstance(setting.layers, FusedLayers):
        yield from fused_cases(setting, setting.layers)
    else:
        assert isinstance(setting.layers, PlainLayers)
        yield from plain_cases(setting, setting.layers)
    yield draw_case(setting)


def plain_cases(setting: Setting, layers: PlainLayers) -> Iterator[Case]:
    """A layer whose norms have kernels of their own, and the head."""
    dim, ffn, vocab = setting.config.dim, setting.config.ffn_dim, setting.config.vocab_size
    reference = torch_operations()

    def linear(name: str, inputs: int, out: Tensor) -> Case:
        """A product whose consumer adds up the partial sums."""
        x = _input(setting, inputs)

        def product(weight: Tensor) -> None:
            layers.product(x, weight, out)

        return product_case(setting, name, x, out.shape[2], out, product, reference.linear)

    yield linear("qkv product", dim, layers.qkv)
    yield from attention_cases(setting)
    yield linear("output product", dim, layers.projected)
    yield add_norm_case(setting, layers)
    x, hidden, logits = _normed(setting), layers.hidden, layers.logits
    yield product_case(
        setting, "swiglu", x, 2 * ffn, hidden, layers.gated_product, reference.swiglu
    )
    if isinstance(layers, LibraryLayers):
        yield gate_case(setting, layers)
    yield linear("down product", ffn, layers.down)
    yield product_case(
        setting, "head", _normed(setting), vocab, logits, layers.head, reference.whole_linear
    )


def fused_cases(setting: Setting, layers: FusedLayers) -> Iterator[Case]:
    """A layer whose products norm their inputs and add themselves to the residual stream, and the
    head.
    """
    dim, ffn, vocab = setting.config.dim, setting.config.ffn_dim, setting.config.vocab_size
    fused, reference = layers.products, reference_products()

    def norming(
        name: str,
        outputs: int,
        squares: Tensor,
        out: Tensor,
        product: Callable[..., None],
        exact: Callable[..., None],
    ) -> Case:
        """Norms its input, by `squares` [blocks, rows] as the product before leaves them."""
        x = _input_of_fused(setting, squares)

        def run(weight: Tensor) -> None:
            product(x, squares, weight, out, eps=_EPS)

        def compare(x: Tensor, weight: Tensor, wanted: Tensor) -> None:
            exact(x, squares, weight, wanted, eps=_EPS)

        return product_case(setting, name, x, outputs, out, run, compare)

    squares, ffn_squares = layers.squares, layers.ffn_squares
    yield norming("qkv product", 3 * dim, squares, layers.qkv, fused.linear, reference.linear)
    yield from attention_cases(setting)
    yield project_case(setting, layers, "output product", dim, ffn_squares)
    yield norming("swiglu", 2 * ffn, ffn_squares, layers.hidden, fused.swiglu, reference.swiglu)
    yield project_case(setting, layers, "down product", ffn, squares)
    yield norming("head", vocab, squares, layers.logits, fused.head, reference.head)


def attention_cases(setting: Setting) -> Iterator[Case]:
    """Attention as a whole, and alone the kernel that ends it."""
    yield attention_case(setting)
    if setting.attention_tiles is not None:
        yield combine_case(setting, setting.attention_tiles)


def reference_products() -> FusedProducts:
    """The torch references of `Operations.fused`, nothing cut up."""

    def head(x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
        fused_linear_reference(x, squares, weight, out[None], eps=eps)

    return FusedProducts(
        linear=fused_linear_reference,
        linear_splits=lambda outputs, inputs: 1,
        project=fused_project_reference,
        project_blocks=lambda outputs, inputs: 1,
        swiglu=fused_swiglu_reference,
        head=head,
        headroom=HEADROOM,
    )


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN where something is NaN."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def largest(errors: Iterable[float]) -> float:
    """The largest error. It is NaN if one of them is, which `max` may pass over."""
    return float(torch.tensor(list(errors)).max())


def compared(
    run: Callable[[int], object], out: Tensor, reference: Callable[[Tensor], object]
) -> Callable[[], float]:
    """A function that measures the error of one run.

    Args:
        out: what `run` writes, [rows, columns] or partial sums of it.
        reference: writes the same into the float32 tensor that it is given.
    """

    def error() -> float:
        run(0)
        wanted = torch.empty_like(out, dtype=torch.float32)
        reference(wanted)
        whole = (each.view(-1, *out.shape[-2:]).sum(dim=0) for each in (out, wanted))
        return relative_error(*whole)

    return error


def product_case(
    setting: Setting,
    name: str,
    x: Tensor,
    outputs: int,
    out: Tensor,
    product: Callable[[Tensor], object],
    reference: Callable[[Tensor, Tensor, Tensor], object],
) -> Case:
    """A product by weights [outputs, inputs]; the library's is the product alone.

    Args:
        x: [rows, inputs]
        out: written by `product`, [rows, columns] or partial sums of it.
        product: of `x` and one copy of the weights.
        reference: of `x`, the weights and a tensor like `out` to write, all in float32.
    """
    weights = _weights(setting, outputs, x.shape[1])

    def run(copy: int) -> None:
        product(weights[copy])

    def compare(wanted: Tensor) -> None:
        reference(x.float(), weights[0].float(), wanted)

    return _timed_product(setting, name, weights, x, run, compared(run, out, compare))


def gate_case(setting: Setting, layers: LibraryLayers) -> Case:
    """The gate alone, of a product of both halves."""
    products, out = setting.random(*layers.gate_up.shape), layers.hidden

    def run(_: int) -> None:
        setting.operations.gate(products, out)

    error = compared(run, out, lambda wanted: torch_operations().gate(products.float(), wanted))
    return Case("gate", f"{setting.config.ffn_dim}", products.nbytes + out.nbytes, run, error)


def project_case(
    setting: Setting, layers: FusedLayers, name: str, inputs: int, squares: Tensor
) -> Case:
    """A product that adds itself to the residual stream, and prepares the next one's input; the
    library's only multiplies.
    """
    dim, normed = setting.config.dim, layers.normed
    weights, x = _weights(setting, dim, inputs), _input(setting, inputs)
    residual, norm_weight = layers.residual.normal_(), setting.random(dim)

    def run(copy: int) -> None:
        layers.products.project(x, weights[copy], residual, norm_weight, normed, squares)

    def error() -> float:
        own, wanted, sums = (
            residual.clone(),
            torch.empty_like(normed, dtype=torch.float32),
            torch.empty_like(squares),
        )
        run(0)
        fused_project_reference(
            x.float(), weights[0].float(), own, norm_weight.float(), wanted, sums
        )
        pairs = (residual, own), (normed, wanted), (squares.sum(dim=0), sums.sum(dim=0))
        return largest(relative_error(*pair) for pair in pairs)

    return _timed_product(setting, name, weights, x, run, error)


def attention_case(setting: Setting) -> Case:
    """Attention and its combining kernel, over pages in random order."""
    config, rows, itemsize, layers, batch = (
        setting.config,
        setting.rows,
        setting.dtype.itemsize,
        setting.layers,
        setting.batch,
    )
    heads, size = config.n_head, config.head_size
    pages = (2, rows * setting.pages_of_row, heads, _PAGE_SIZE, head_stride(size, itemsize))
    kv = setting.random(setting.copies(prod(pages) * itemsize), *pages)
    rotary = rotary_table_2d(config.grid, size).to(setting.device)
    layers.qkv.normal_()

    def run(copy: int) -> None:
        layers.attend(kv[copy], rotary, batch)

    def error() -> float:
        keys, values = kv[0].float()  # before the kernel writes the newest token
        run(0)
        wanted = torch.empty_like(layers.attn_out, dtype=torch.float32)
        scratch = layers.chunk_out, layers.chunk_stats
        torch_operations().attention(
            layers.qkv, rotary, keys, values, batch.page_table, batch.positions, *scratch, wanted
        )
        return relative_error(layers.attn_out, wanted)

    kv_bytes = rows * setting.context * 2 * config.dim * itemsize
    shape = f"{heads} x {size}, {setting.context} tokens"
    return Case("attention", shape, kv_bytes, run, error, copies=len(kv))


def combine_case(setting: Setting, tiles: AttentionTiles) -> Case:
    """The chunks' results, where those beyond the context are NaN."""
    config, rows = setting.config, setting.rows
    heads, size = config.n_head, config.head_size
    chunks, written = tiles.chunks(config.block_size), tiles.chunks(setting.context)
    attn_out = setting.random(rows, heads, chunks, size, dtype=torch.float32)
    # largest score, sum of weights
    stats = setting.random(rows, heads, chunks, 2, dtype=torch.float32)
    stats[..., 1].abs_().add_(1)
    for partial in (attn_out, stats):
        partial[:, :, written:] = torch.nan
    positions = torch.full((rows,), setting.context - 1, dtype=torch.int32, device=setting.device)
    out = setting.empty(rows, config.dim)

    def run(_: int) -> None:
        combine(attn_out, stats, positions, out, tiles, launch_pdl=setting.launch_pdl)

    def reference(wanted: Tensor) -> None:
        combine_reference(attn_out, stats, positions, wanted, tiles.chunk)

    moved = rows * heads * written * (size + 2) * attn_out.itemsize + out.nbytes
    shape = f"{heads} x {size}, {written} chunks"
    return Case("combine", shape, moved, run, compared(run, out, reference))


def add_norm_case(setting: Setting, layers: PlainLayers) -> Case:
    """The residual stream after the attention's output product."""
    dim = setting.config.dim
    residual, norm_weight, normed = layers.residual.normal_(), setting.random(dim), layers.normed
    partials = layers.projected.normal_()

    def run(_: int) -> None:
        setting.operations.add_norm(residual, partials, norm_weight, normed, eps=_EPS)

    def error() -> float:
        own, wanted = residual.clone(), torch.empty_like(normed, dtype=torch.float32)
        run(0)
        torch_operations().add_norm(own, partials, norm_weight, wanted, eps=_EPS)
        return relative_error(normed, wanted)

    moved = 2 * residual.nbytes + partials.nbytes + norm_weight.nbytes + normed.nbytes
    return Case("add_norm", f"{partials.shape[0]} x {dim}", moved, run, error)


def embed_case(setting: Setting) -> Case:
    """The start of a step, at positions beyond the first."""
    config, layers, batch = setting.config, setting.layers, setting.batch
    tables = (
        setting.random(config.vocab_size, config.dim),
        setting.random(config.num_classes + 1, config.dim),
    )
    norm_weight = setting.random(config.dim)
    written = [layers.residual, layers.normed]
    headroom = 1.0
    if isinstance(layers, FusedLayers):  # the first product norms
        written.append(layers.squares)
        headroom = layers.products.headroom

    def run(_: int) -> None:
        layers.embed(*tables, norm_weight, batch)

    def error() -> float:
        run(0)
        wanted = [torch.empty_like(each, dtype=torch.float32) for each in written]
        fed = (batch.codes, batch.row_slots, batch.positions, batch.labels)
        torch_operations().embed(*fed, *tables, norm_weight, *wanted, eps=_EPS, headroom=headroom)
        return largest(relative_error(*pair) for pair in zip(written, wanted, strict=True))

    moved = (
        sum(each.nbytes for each in written)
        + (setting.rows + 1) * config.dim * setting.dtype.itemsize
    )
    return Case("embed", f"{config.dim}", moved, run, error)


def draw_case(setting: Setting) -> Case:
    """Guided pairs, top-k 2000 (or half of a smaller vocabulary)."""
    vocab, rows, device = setting.config.vocab_size, setting.rows, setting.device
    images = rows // 2
    logits = setting.random(rows, vocab, dtype=torch.float32)
    each = torch.arange(images, dtype=torch.int32, device=device)
    pairs = (2 * each, 2 * each + 1, each)
    scales, ones = torch.full((images,), 4.0, device=device), torch.ones(images, device=device)
    sampling = (scales, ones, torch.full_like(each, min(2000, vocab // 2)), ones, each.long(), each)

    def state() -> tuple[Tensor, Tensor, Tensor]:
        """Positions, codes and failures, which a draw changes."""
        positions = torch.zeros(rows, dtype=torch.int32, device=device)
        codes = torch.zeros(images, _CELLS, dtype=torch.int32, device=device)
        return positions, codes, torch.zeros_like(each)

    def draw(operations: Operations, changed: tuple[Tensor, Tensor, Tensor]) -> None:
        positions, codes, failed = changed
        operations.draw_tokens(logits, positions, *pairs, *sampling, codes, failed, images=images)

    own = state()

    def error() -> float:
        got, wanted = state(), state()
        draw(setting.operations, got)
        draw(torch_operations(), wanted)
        return float((got[1][:, 0] != wanted[1][:, 0]).double().mean())

    def run(_: int) -> None:
        draw(setting.operations, own)

    return Case("draw", f"{vocab}", logits.nbytes, run, error)


def _weights(setting: Setting, outputs: int, inputs: int) -> Tensor:
    """Random weights in several copies, [copies, outputs, inputs]."""
    return setting.random(
        setting.copies(outputs * inputs * setting.dtype.itemsize), outputs, inputs
    )


def _input(setting: Setting, inputs: int) -> Tensor:
    """Inputs [rows, inputs] of a product, scaled so that its results are about 1."""
    return setting.random(setting.rows, inputs).mul_(inputs**-0.5)


def _input_of_fused(setting: Setting, squares: Tensor) -> Tensor:
    """The same [rows, width], as the product before leaves it for one that norms it; writes its
    sums of squares [blocks, rows].
    """
    dim = setting.config.dim
    residual = setting.random(setting.rows, dim, dtype=torch.float32)
    norm_weight = setting.random(dim).mul_(dim**-0.5)
    blocks = residual.square().tensor_split(squares.shape[0], dim=1)
    squares.copy_(torch.stack([block.sum(dim=1) for block in blocks]))
    return (residual * norm_weight * HEADROOM).to(setting.dtype)


def _normed(setting: Setting) -> Tensor:
    """The same inputs [rows, width], in the memory that the last norm writes."""
    return setting.layers.normed.normal_().mul_(setting.config.dim**-0.5)


def _timed_product(
    setting: Setting,
    name: str,
    weights: Tensor,
    x: Tensor,
    run: Callable[[int], object],
    error: Callable[[], float],
) -> Case:
    copies, outputs, inputs = weights.shape
    product = setting.empty(setting.rows, outputs)

    def library(copy: int) -> None:
        torch.mm(x, weights[copy].t(), out=product)

    return Case(
        name,
        f"{outputs} x {inputs}",
        outputs * inputs * setting.dtype.itemsize,
        run,
        error,
        multiplications=outputs * inputs * setting.rows,
        copies=copies,
        library=library,
    )
