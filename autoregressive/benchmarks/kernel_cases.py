"""What bench_kernels.py measures: each operation of a step on random inputs of a model's shapes,
beside its reference.

The operations are called by the objects that carry out a step's layers (engine/layers.py), in their
scratch memory. Weights and KV pages come in as many copies as no cache holds. Bytes of products and
attention are the weights' and the KV cache's alone, as in serve/floor.py: activations stay in the
cache. The other operations have nothing else to move, so theirs are all that they read and write.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.config import GPTConfig
from autoregressive.models.rope import rotary_table_2d
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.kv_pages import LayerPages
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
from kernels.operations import (
    FusedProducts,
    Operations,
    attends_at_once,
    torch_operations,
)
from kernels.quantization import PAIRED_INPUTS, QuantizedMatrix, Weights, quantize

_PAGE_SIZE = 16
_CELLS = 2**13  # tokens of an image to draw: more than a benchmark launches


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
    quantization: str | None = None  # of the layers' weights
    page_dtype: torch.dtype | None = None  # fp8 or int8; None: `dtype`

    @property
    def factory(self) -> LayersFactory:
        """The factory of layers that the engine uses in its default configuration."""
        blocks = self.config.dim % PAIRED_INPUTS == 0 == self.config.ffn_dim % PAIRED_INPUTS
        return LayersFactory(
            self.config,
            self.dtype,
            self.operations,
            library=True,
            quantized=self.quantization is not None,
            pairable=self.quantization in ("fp8", "int8") and blocks,
        )

    @cached_property
    def layers(self) -> Layers:
        """The layers that carry out a step of so many rows, with scratch memory of their own."""
        return self.factory.make(
            self.rows,
            1,
            lambda name, dims, dtype: torch.empty(dims, dtype=dtype, device=self.device),
        )

    @cached_property
    def batch(self) -> Batch:
        """Rows at the context, each with pages of its own in random order."""
        batch = Batch(BatchShape.of(self.rows, self.config.block_size, _PAGE_SIZE), self.device)
        batch.positions.fill_(self.context - 1)
        batch.limits.fill_(self.context)
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
        """Normally distributed numbers of this shape, on the device that is measured."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def copies(self, *shape: int) -> Tensor:
        """So many random tensors of a shape that they are cold when they are used in turn."""
        return self.random(self._cold_copies(prod(shape) * self.dtype.itemsize), *shape)

    def weights(self, outputs: int, inputs: int) -> Sequence[Weights]:
        """Likewise, of the weights of a layer's product."""
        if self.quantization is None:
            return list(self.copies(outputs, inputs))
        first = self._quantized(outputs, inputs)
        others = range(1, self._cold_copies(first.nbytes))
        return [first, *(self._quantized(outputs, inputs) for _ in others)]

    def _quantized(self, outputs: int, inputs: int) -> QuantizedMatrix:
        assert self.quantization is not None
        matrix = quantize(self.random(outputs, inputs), self.quantization)
        return matrix.pair() if self.factory.pairs else matrix

    def pages(self, *shape: int) -> tuple[Tensor, Tensor | None]:
        """Likewise, of keys and values; and, of those of a byte, the scales of all copies.

        Args:
            shape: [2, pages, heads, page_size, stride]
        """
        if self.page_dtype is None:
            return self.copies(*shape), None
        copies = self._cold_copies(prod(shape) * self.page_dtype.itemsize)
        pages = torch.empty(copies, *shape, dtype=self.page_dtype, device=self.device)
        for copy in pages:
            copy.copy_(self.random(*shape) * 32)
        return pages, torch.full(shape[:-1], 1 / 32, device=self.device)

    def _cold_copies(self, size: int) -> int:
        """How many copies of so many bytes no cache holds."""
        return max(2, -(-self.cold_bytes // size))

    def input(self, inputs: int) -> Tensor:
        """Inputs [rows, inputs] of a product, scaled so that its results are about 1."""
        return self.random(self.rows, inputs).mul_(inputs**-0.5)


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


def case_of(
    name: str,
    operation: Callable[..., object],
    reference: Callable[..., object],
    tensors: Sequence[Tensor | Sequence[Weights]],
    *,
    shape: str,
    moved: int,
    whole: Sequence[int] = (),
    partial_sums: Sequence[int] = (),
    cold: int | None = None,
) -> Case:
    """An operation and its reference, which take the same tensors.

    Args:
        moved: bytes.
        whole: places of the tensors that are compared.
        partial_sums: places of those whose sums over the first dimension are compared.
        cold: the place of several copies, one of which is taken at a time.
    """

    def taken(copy: int) -> list[Any]:
        return [tensor[copy] if at == cold else tensor for at, tensor in enumerate(tensors)]

    def run(copy: int) -> None:
        operation(*taken(copy))

    def error() -> float:
        given = taken(0)
        exact: list[Any] = [_exact(each) for each in given]
        operation(*given)
        reference(*exact)
        pairs = [
            *((given[at], exact[at]) for at in whole),
            *((given[at].sum(dim=0), exact[at].sum(dim=0)) for at in partial_sums),
        ]
        # NaN if one of them is, which Python's `max` may pass over
        return float(torch.tensor([relative_error(*pair) for pair in pairs]).max())

    return Case(name, shape, moved, run, error, copies=1 if cold is None else len(tensors[cold]))


def _exact(given: Weights) -> Weights:
    """What the reference takes: in float32, unless it is quantised."""
    if isinstance(given, QuantizedMatrix):
        return given
    widened = given.is_floating_point() and given.itemsize > 1
    return given.to(torch.float32 if widened else given.dtype, copy=True)


def product_case(
    setting: Setting,
    name: str,
    operation: Callable[..., object],
    reference: Callable[..., object],
    tensors: Sequence[Tensor | Sequence[Weights]],
    *,
    whole: Sequence[int] = (),
    partial_sums: Sequence[int] = (),
    cold: int = 1,
) -> Case:
    """A product by copies of weights [outputs, inputs]; the library's is the product alone, and
    there is none by quantised weights.

    Args:
        tensors: [rows, inputs] first. The others are as of `case_of`.
        cold: the place of the weights.
    """
    x, weights = tensors[0], tensors[cold]
    assert isinstance(x, Tensor)
    outputs, inputs = weights[0].shape
    product = torch.empty(setting.rows, outputs, dtype=x.dtype, device=x.device)
    case = case_of(
        name,
        operation,
        reference,
        tensors,
        shape=f"{outputs} x {inputs}",
        moved=weights[0].nbytes,
        whole=whole,
        partial_sums=partial_sums,
        cold=cold,
    )
    case = replace(case, multiplications=outputs * inputs * setting.rows)
    if isinstance(weights[0], QuantizedMatrix):
        return case

    def library(copy: int) -> Tensor:
        weight = weights[copy]
        assert isinstance(weight, Tensor)
        return torch.mm(x, weight.t(), out=product)

    return replace(case, library=library)


def plain_cases(setting: Setting, layers: PlainLayers) -> Iterator[Case]:
    """A layer whose norms have kernels of their own, and the head."""
    config, operations, reference = setting.config, setting.operations, torch_operations()
    dim, ffn, eps = config.dim, config.ffn_dim, config.norm_eps

    def linear(name: str, outputs: int, inputs: int, out: Tensor) -> Case:
        """A product whose consumer adds up the partial sums."""
        return product_case(
            setting,
            name,
            layers.product,
            reference.linear,
            (setting.input(inputs), setting.weights(outputs, inputs), out),
            partial_sums=[2],
        )

    def of_normed(
        name: str,
        product: Callable[[Tensor], None],
        exact: Callable[..., None],
        weights: Sequence[Weights],
        out: Tensor,
    ) -> Case:
        """A product of what the norm before it has left."""
        tensors = (layers.normed.normal_().mul_(dim**-0.5), weights, out)
        return product_case(
            setting, name, lambda x, weight, out: product(weight), exact, tensors, whole=[2]
        )

    yield linear("qkv product", 3 * dim, dim, layers.qkv)
    yield from attention_cases(setting)
    yield linear("output product", dim, dim, layers.projected)
    partials = layers.projected.normal_()
    tensors = (layers.residual.normal_(), partials, setting.random(dim), layers.normed)
    yield case_of(
        "add_norm",
        partial(operations.add_norm, eps=eps),
        partial(reference.add_norm, eps=eps),
        tensors,
        shape=f"{partials.shape[0]} x {dim}",
        moved=tensors[0].nbytes + sum(tensor.nbytes for tensor in tensors),
        whole=[0, 3],
    )
    weights = setting.weights(2 * ffn, dim)
    yield of_normed("swiglu", layers.gated_product, reference.swiglu, weights, layers.hidden)
    if isinstance(layers, LibraryLayers):
        both = setting.random(*layers.gate_up.shape)
        yield case_of(
            "gate",
            operations.gate,
            reference.gate,
            (both, layers.hidden),
            shape=f"{ffn}",
            moved=both.nbytes + layers.hidden.nbytes,
            whole=[1],
        )
    yield linear("down product", dim, ffn, layers.down)
    head = list(setting.copies(config.vocab_size, dim))
    yield of_normed("head", layers.head, reference.whole_linear, head, layers.logits)


def fused_cases(setting: Setting, layers: FusedLayers) -> Iterator[Case]:
    """A layer whose products norm their inputs and add themselves to the residual stream, and the
    head.
    """
    dim, ffn, eps = setting.config.dim, setting.config.ffn_dim, setting.config.norm_eps
    fused, reference = layers.products, reference_products()

    def norming(
        name: str,
        kind: str,
        weights: Sequence[Weights],
        squares: Tensor,
        out: Tensor,
        **compared: list[int],
    ) -> Case:
        """Norms its input, by `squares` [blocks, rows] as the product before leaves them."""
        residual = setting.random(setting.rows, dim, dtype=torch.float32)
        blocks = residual.square().tensor_split(squares.shape[0], dim=1)
        squares.copy_(torch.stack([block.sum(dim=1) for block in blocks]))
        norm_weight = setting.random(dim).mul_(dim**-0.5)
        x = (residual * norm_weight * HEADROOM).to(setting.dtype)
        product, exact = (
            partial(getattr(products, kind), eps=eps) for products in (fused, reference)
        )
        return product_case(
            setting,
            name,
            product,
            exact,
            (x, squares, weights, out),
            cold=2,
            **compared,
        )

    def project(name: str, inputs: int, squares: Tensor) -> Case:
        """Adds itself to the residual stream, and prepares the next product's input; the library's
        only multiplies.
        """
        tensors = (
            setting.input(inputs),
            setting.weights(dim, inputs),
            layers.residual.normal_(),
            setting.random(dim),
            layers.normed,
            squares,
        )
        return product_case(
            setting,
            name,
            fused.project,
            reference.project,
            tensors,
            whole=[2, 4],
            partial_sums=[5],
        )

    squares, ffn_squares = layers.squares, layers.ffn_squares
    qkv = setting.weights(3 * dim, dim)
    yield norming("qkv product", "linear", qkv, squares, layers.qkv, partial_sums=[3])
    yield from attention_cases(setting)
    yield project("output product", dim, ffn_squares)
    gate_up = setting.weights(2 * ffn, dim)
    yield norming("swiglu", "swiglu", gate_up, ffn_squares, layers.hidden, whole=[3])
    yield project("down product", ffn, squares)
    head = list(setting.copies(setting.config.vocab_size, dim))
    yield norming("head", "head", head, squares, layers.logits, whole=[3])


def reference_products() -> FusedProducts:
    """The torch references of `Operations.fused`, nothing cut up."""

    def head(x: Tensor, squares: Tensor, weight: Weights, out: Tensor, *, eps: float) -> None:
        fused_linear_reference(x, squares, weight, out[None], eps=eps)

    return FusedProducts(
        linear=fused_linear_reference,
        linear_splits=lambda outputs, inputs, rows: 1,
        project=fused_project_reference,
        project_blocks=lambda outputs: 1,
        swiglu=fused_swiglu_reference,
        head=head,
        headroom=HEADROOM,
    )


def attention_cases(setting: Setting) -> Iterator[Case]:
    """Attention over pages in random order; and, where a kernel combines its chunks, that one
    alone.
    """
    config, rows, layers, batch = setting.config, setting.rows, setting.layers, setting.batch
    heads, size = config.n_head, config.head_size
    itemsize = (setting.page_dtype or setting.dtype).itemsize
    shape = (rows * setting.pages_of_row, heads, _PAGE_SIZE, head_stride(size, itemsize))
    pages, scales = setting.pages(2, *shape)
    scale_bytes = 0 if scales is None else scales.itemsize
    rotary = rotary_table_2d(config.grid, size).to(setting.device)

    def exact(qkv: Tensor, kv: Tensor, *others: Tensor) -> None:
        tensors: tuple[Any, ...] = (*others, scales)
        torch_operations().attention(qkv, rotary, *kv, *tensors)

    yield case_of(
        "attention",
        lambda qkv, kv, *others: layers.attend(LayerPages(kv, scales), rotary, batch),
        exact,
        (
            layers.qkv.normal_(),
            pages,
            batch.page_table,
            batch.positions,
            batch.limits,
            layers.chunk_out,
            layers.chunk_stats,
            layers.attn_out,
        ),
        shape=f"{heads} x {size}, {setting.context} tokens",
        moved=rows * setting.context * 2 * heads * (size * itemsize + scale_bytes),
        whole=[7],
        cold=1,
    )
    tiles = setting.attention_tiles
    hopper = isinstance(layers, FusedLayers)
    if tiles is not None and not (hopper and attends_at_once(rows, rows, _PAGE_SIZE, tiles)):
        yield combine_case(setting, tiles)


def combine_case(setting: Setting, tiles: AttentionTiles) -> Case:
    """The chunks' results, where those beyond the context are NaN."""
    config, rows = setting.config, setting.rows
    heads, size = config.n_head, config.head_size
    chunks, written = tiles.chunks(config.block_size), tiles.chunks(setting.context)
    attn_out = setting.random(rows, heads, chunks, size, dtype=torch.float32)
    # largest score, sum of weights
    stats = setting.random(rows, heads, chunks, 2, dtype=torch.float32)
    stats[..., 1].abs_().add_(1)
    for each in (attn_out, stats):
        each[:, :, written:] = torch.nan
    positions = torch.full((rows,), setting.context - 1, dtype=torch.int32, device=setting.device)
    out = torch.empty_like(setting.layers.attn_out)
    return case_of(
        "combine",
        partial(combine, tiles=tiles, launch_pdl=setting.launch_pdl),
        partial(combine_reference, chunk=tiles.chunk),
        (attn_out, stats, positions, positions + 1, out),
        shape=f"{heads} x {size}, {written} chunks",
        moved=rows * heads * written * (size + 2) * attn_out.itemsize + out.nbytes,
        whole=[4],
    )


def embed_case(setting: Setting) -> Case:
    """The start of a step, at positions beyond the first."""
    config, layers, batch = setting.config, setting.layers, setting.batch
    width = config.dim
    weights = (
        setting.random(config.vocab_size, width),
        setting.random(config.num_classes + 1, width),
        setting.random(width),
    )
    fed = (batch.codes, batch.row_slots, batch.positions, batch.limits, batch.labels)
    written = [layers.residual, layers.normed]
    if layers.squares is not None:  # the first product norms
        written.append(layers.squares)
    return case_of(
        "embed",
        lambda *tensors: layers.embed(*weights, batch),
        partial(torch_operations().embed, eps=config.norm_eps, headroom=layers.headroom),
        (*fed, *weights, *written),
        shape=f"{width}",
        moved=sum(tensor.nbytes for tensor in written)
        + (setting.rows + 1) * width * setting.dtype.itemsize,
        whole=range(8, 8 + len(written)),
    )


def draw_case(setting: Setting) -> Case:
    """Guided pairs, top-k 2000 (or half of a smaller vocabulary)."""
    vocab, rows, device = setting.config.vocab_size, setting.rows, setting.device
    images = rows // 2
    logits = setting.random(rows, vocab, dtype=torch.float32)
    each = torch.arange(images, dtype=torch.int32, device=device)
    pairs = (2 * each, 2 * each + 1, torch.full_like(each, _CELLS), each)
    scales, ones = torch.full((images,), 4.0, device=device), torch.ones(images, device=device)
    sampling = (scales, ones, torch.full_like(each, min(2000, vocab // 2)), ones, each.long(), each)

    def drawing(operations: Operations) -> tuple[Callable[[int], None], Tensor]:
        """Draws one token more at each call; and the codes that it writes."""
        positions = torch.zeros(rows, dtype=torch.int32, device=device)
        limits = torch.full_like(positions, _CELLS)
        codes = torch.zeros(images, _CELLS, dtype=torch.int32, device=device)
        changed = (codes, *torch.zeros(5, images, dtype=torch.int32, device=device))

        def draw(_: int) -> None:
            operations.draw_tokens(
                logits, positions, limits, *pairs, *sampling, *changed, images=images
            )

        return draw, codes

    def error() -> float:
        found = []
        for operations in (setting.operations, torch_operations()):
            draw, codes = drawing(operations)
            draw(0)
            found.append(codes[:, 0])
        return float((found[0] != found[1]).double().mean())

    return Case("draw", f"{vocab}", logits.nbytes, drawing(setting.operations)[0], error)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN where something is NaN."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
