"""What bench_kernels.py measures: each operation of a step on random inputs of a model's shapes, beside its reference.

Weights and KV pages come in as many copies as no cache holds. Bytes of products and attention are the weights' and the KV cache's
alone, as in serve/floor.py: activations stay in the cache. The other operations have nothing else to move, so theirs are all that
they read and write.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from autoregressive.models.config import GPTConfig
from autoregressive.models.rope import rotary_table_2d
from kernels.attention import head_stride
from kernels.dispatch import Operations, torch_operations

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

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed numbers."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """To be written."""
        return torch.empty(shape, device=self.device, dtype=dtype or self.dtype)

    def copies(self, size: int) -> int:
        """How many of something of `size` bytes are cold when they are used in turn."""
        return max(2, -(-self.cold_bytes // size))

    def splits(self, outputs: int, inputs: int) -> int:
        """Partial sums of a product."""
        return self.operations.linear_splits(torch.empty(outputs, inputs, dtype=self.dtype, device="meta"), self.rows)


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    operation: str
    shape: str
    bytes: int  # that must be moved
    multiplications: int  # of a matrix product's elements; 0: counts as nothing
    copies: int
    run: Callable[[int], object]  # on a copy
    library: Callable[[int], object] | None  # cuBLAS's product on a copy
    error: Callable[[], float]  # relative, against the torch reference in float32; of the draw the share of other tokens


def cases(setting: Setting) -> Iterator[Case]:
    """Every operation of a step, each built when its turn comes: they need memory."""
    dim, ffn = setting.config.dim, setting.config.ffn_dim
    yield embed_case(setting)
    yield linear_case(setting, "qkv product", 3 * dim, dim)
    yield attention_case(setting)
    yield linear_case(setting, "output product", dim, dim)
    yield add_norm_case(setting)
    yield swiglu_case(setting)
    yield linear_case(setting, "down product", dim, ffn)
    yield head_case(setting)
    yield draw_case(setting)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN where something is NaN."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def linear_case(setting: Setting, name: str, outputs: int, inputs: int) -> Case:
    """A product whose consumer adds up its partial sums."""
    weights, x = _weights(setting, outputs, inputs)
    out = setting.empty(setting.splits(outputs, inputs), setting.rows, outputs, dtype=torch.float32)

    def run(copy: int) -> None:
        setting.operations.linear(x, weights[copy], out)

    def error() -> float:
        run(0)
        return relative_error(out.sum(dim=0), _product(x, weights[0]))

    return _product_case(setting, name, weights, x, run, error)


def head_case(setting: Setting) -> Case:
    """The logits, in one piece."""
    weights, x = _weights(setting, setting.config.vocab_size, setting.config.dim)
    out = setting.empty(setting.rows, setting.config.vocab_size, dtype=torch.float32)

    def run(copy: int) -> None:
        setting.operations.whole_linear(x, weights[copy], out)

    def error() -> float:
        run(0)
        return relative_error(out, _product(x, weights[0]))

    return _product_case(setting, "head", weights, x, run, error)


def swiglu_case(setting: Setting) -> Case:
    """The gated product; the library's is the product alone."""
    weights, x = _weights(setting, 2 * setting.config.ffn_dim, setting.config.dim)
    out = setting.empty(setting.rows, setting.config.ffn_dim)

    def run(copy: int) -> None:
        setting.operations.swiglu(x, weights[copy], out)

    def error() -> float:
        run(0)
        wanted = torch.empty_like(out, dtype=torch.float32)
        torch_operations().swiglu(x.float(), weights[0].float(), wanted)
        return relative_error(out, wanted)

    return _product_case(setting, "swiglu", weights, x, run, error)


def attention_case(setting: Setting) -> Case:
    """Attention and its combining kernel, over pages in random order."""
    config, rows, itemsize = setting.config, setting.rows, setting.dtype.itemsize
    heads, size = config.n_head, config.head_size
    pages_of_row = -(-setting.context // _PAGE_SIZE)
    pages = (2, rows * pages_of_row, heads, _PAGE_SIZE, head_stride(size, itemsize))
    kv = setting.random(setting.copies(prod(pages) * itemsize), *pages)
    table = torch.randperm(rows * pages_of_row, device=setting.device).to(torch.int32).view(rows, pages_of_row)
    positions = torch.full((rows,), setting.context - 1, dtype=torch.int32, device=setting.device)
    qkv = setting.random(setting.splits(3 * config.dim, config.dim), rows, 3 * config.dim, dtype=torch.float32)
    rotary = rotary_table_2d(config.grid, size).to(setting.device)
    chunks = setting.operations.attention_chunks(config.block_size, itemsize)
    mixed, stats = (setting.empty(rows, heads, chunks, wide, dtype=torch.float32) for wide in (size, 2))
    out = setting.empty(rows, config.dim)

    def run(copy: int) -> None:
        setting.operations.attention(qkv, rotary, kv[copy, 0], kv[copy, 1], table, positions, mixed, stats, out)

    def error() -> float:
        keys, values = kv[0].float()  # before the kernel writes the newest token
        run(0)
        wanted = torch.empty_like(out, dtype=torch.float32)
        torch_operations().attention(qkv, rotary, keys, values, table, positions, mixed, stats, wanted)
        return relative_error(out, wanted)

    kv_bytes = rows * setting.context * 2 * config.dim * itemsize
    return Case("attention", f"{heads} x {size}, {setting.context} tokens", kv_bytes, 0, len(kv), run, None, error)


def add_norm_case(setting: Setting) -> Case:
    """The residual stream after the attention's output product."""
    dim, rows = setting.config.dim, setting.rows
    residual, gain, normed = setting.random(rows, dim, dtype=torch.float32), setting.random(dim), setting.empty(rows, dim)
    partials = setting.random(setting.splits(dim, dim), rows, dim, dtype=torch.float32)

    def run(_: int) -> None:
        setting.operations.add_norm(residual, partials, gain, normed, eps=_EPS)

    def error() -> float:
        own, wanted = residual.clone(), torch.empty_like(normed, dtype=torch.float32)
        run(0)
        torch_operations().add_norm(own, partials, gain, wanted, eps=_EPS)
        return relative_error(normed, wanted)

    moved = 2 * residual.nbytes + partials.nbytes + gain.nbytes + normed.nbytes
    return Case("add_norm", f"{partials.shape[0]} x {dim}", moved, 0, 1, run, None, error)


def embed_case(setting: Setting) -> Case:
    """The start of a step, at positions beyond the first."""
    config, rows, device = setting.config, setting.rows, setting.device
    codes = torch.randint(0, config.vocab_size, (rows, config.block_size), dtype=torch.int32, device=device)
    slots, labels = torch.arange(rows, dtype=torch.int32, device=device), torch.zeros(rows, dtype=torch.int32, device=device)
    positions = torch.full((rows,), setting.context - 1, dtype=torch.int32, device=device)
    tables = setting.random(config.vocab_size, config.dim), setting.random(config.num_classes + 1, config.dim)
    gain, normed = setting.random(config.dim), setting.empty(rows, config.dim)
    residual = setting.empty(rows, config.dim, dtype=torch.float32)

    def run(_: int) -> None:
        setting.operations.embed(codes, slots, positions, labels, *tables, gain, residual, normed, eps=_EPS)

    def error() -> float:
        run(0)
        own, wanted = torch.empty_like(residual), torch.empty_like(normed, dtype=torch.float32)
        torch_operations().embed(codes, slots, positions, labels, *tables, gain, own, wanted, eps=_EPS)
        return relative_error(normed, wanted)

    moved = residual.nbytes + 2 * normed.nbytes + gain.nbytes
    return Case("embed", f"{config.dim}", moved, 0, 1, run, None, error)


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

    return Case("draw", f"{vocab}", logits.nbytes, 0, 1, lambda _: draw(setting.operations, own), None, error)


def _weights(setting: Setting, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Copies [copies, outputs, inputs], and something to multiply by [rows, inputs]; results are about 1."""
    copies = setting.copies(outputs * inputs * setting.dtype.itemsize)
    return setting.random(copies, outputs, inputs), setting.random(setting.rows, inputs).mul_(inputs**-0.5)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """The reference's, in float32 [rows, outputs]."""
    wanted = torch.empty(x.shape[0], weight.shape[0], device=x.device)
    torch_operations().whole_linear(x.float(), weight.float(), wanted)
    return wanted


def _product_case(
    setting: Setting, name: str, weights: Tensor, x: Tensor, run: Callable[[int], object], error: Callable[[], float]
) -> Case:
    copies, outputs, inputs = weights.shape
    product = setting.empty(setting.rows, outputs)

    def library(copy: int) -> None:
        torch.mm(x, weights[copy].t(), out=product)

    size = outputs * inputs * setting.dtype.itemsize
    return Case(name, f"{outputs} x {inputs}", size, outputs * inputs * setting.rows, copies, run, library, error)
