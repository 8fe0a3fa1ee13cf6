"""What a decode step is made of, and which implementation carries out each operation: Triton where
it can, else torch. This is the one place where that is chosen.

Every operation takes the same tensors in both. It has the name of its kernel, whose file says what
it does: `kernels.norm`, `linear`, `attention`, `swiglu`, `sampling`, and `kernels.hopper`. Triton
needs compute capability 8.0; its attention the head sizes in `HEAD_SIZES`; programmatic dependent
launch 9.0. On 9.0 (Hopper) 16-bit weights have products and an attention of their own. With
TRITON_INTERPRET=1 the Triton kernels run on a CPU, slowly; Hopper's do not.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels import BACKENDS
from kernels.attention import HEAD_SIZES, AttentionTiles, attention
from kernels.attention_reference import attention_reference
from kernels.hopper.attention import hopper_attention
from kernels.hopper.many_rows_attention import many_rows_attention, takes_pages
from kernels.hopper.many_rows_products import (
    many_rows_linear,
    many_rows_project,
    many_rows_swiglu,
)
from kernels.hopper.many_rows_quantized_products import (
    many_rows_quantized_linear,
    many_rows_quantized_project,
    many_rows_quantized_swiglu,
)
from kernels.hopper.peers import Inboxes, gather_parts
from kernels.hopper.products import (
    HEADROOM,
    SQUARES_BLOCK,
    fused_linear,
    fused_project,
    fused_swiglu,
)
from kernels.hopper.quantized_products import (
    quantized_linear,
    quantized_project,
    quantized_swiglu,
)
from kernels.hopper.scaled_attention import many_rows_scaled_attention, scaled_attention
from kernels.linear import (
    gate,
    gate_reference,
    linear,
    linear_reference,
    swiglu,
    swiglu_reference,
)
from kernels.norm import add_norm, add_norm_reference, embed, embed_reference
from kernels.quantization import Weights
from kernels.sampling import draw_tokens
from kernels.sampling_reference import draw_tokens as draw_tokens_reference
from kernels.tiles import (
    ATTENTION,
    FUSED_HEAD,
    FUSED_LINEAR,
    FUSED_PROJECT,
    FUSED_SWIGLU,
    LINEAR,
    QUANTIZED_LINEAR,
    QUANTIZED_PROJECT,
    QUANTIZED_SWIGLU,
    SWIGLU,
    WHOLE_LINEAR,
    Section,
    TileTable,
    tile_table,
)

# Up to here, reading the weights decides how long a product takes. Above, multiplying does: larger
# tiles are faster or, where there are none, a library's product.
MANY_ROWS = 64


# What each operation takes. Its kernel's function says what the arguments mean.


class _Embed(Protocol):
    def __call__(
        self,
        codes: Tensor,
        row_slots: Tensor,
        positions: Tensor,
        limits: Tensor,
        labels: Tensor,
        token_embedding: Tensor,
        class_embedding: Tensor,
        norm_weight: Tensor,
        residual: Tensor,
        normed: Tensor,
        squares: Tensor | None = None,
        *,
        eps: float,
        headroom: float = 1.0,
    ) -> None:
        """Writes residual, normed and, where given, squares."""


class _MatrixProduct(Protocol):
    def __call__(self, x: Tensor, weight: Weights, out: Tensor) -> None:
        """Writes out."""


class _PagedAttention(Protocol):
    def __call__(
        self,
        qkv: Tensor,
        rotary: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        page_table: Tensor,
        positions: Tensor,
        limits: Tensor,
        chunk_out: Tensor,
        chunk_stats: Tensor,
        out: Tensor,
        kv_scales: Tensor | None = None,
    ) -> None:
        """Writes the new tokens' keys and values, and out."""


class _AddNorm(Protocol):
    def __call__(
        self, residual: Tensor, partials: Tensor, norm_weight: Tensor, normed: Tensor, *, eps: float
    ) -> None:
        """Writes residual and normed."""


class _DrawTokens(Protocol):
    def __call__(
        self,
        logits: Tensor,
        positions: Tensor,
        limits: Tensor,
        conditional_rows: Tensor,
        unconditional_rows: Tensor,
        guided_steps: Tensor,
        image_slots: Tensor,
        guidance_scales: Tensor,
        temperatures: Tensor,
        top_ks: Tensor,
        top_ps: Tensor,
        seeds: Tensor,
        image_indices: Tensor,
        codes: Tensor,
        lengths: Tensor,
        failed: Tensor,
        drafted: Tensor,
        accepted: Tensor,
        verdicts: Tensor,
        *,
        images: int,
    ) -> None:
        """Writes codes, positions, and what is counted of each image."""


@dataclass(frozen=True)
class Operations:
    """What a decode step is made of."""

    embed: _Embed
    linear: _MatrixProduct  # leaves partial sums
    linear_splits: Callable[[int, int], int]  # outputs, inputs -> partial sums of `linear`
    whole_linear: _MatrixProduct  # `linear` in one piece; out: [rows, outputs]
    swiglu: _MatrixProduct
    gate: Callable[[Tensor, Tensor], None]  # products, out
    attention: _PagedAttention
    attention_chunks: Callable[[int], int]  # tokens -> chunks of its scratch tensors
    add_norm: _AddNorm
    draw_tokens: _DrawTokens
    # take the place of `linear`, `swiglu` and `add_norm`
    fused: "FusedProducts | None" = None
    quantized: "FusedProducts | None" = None  # likewise, for paired weights of the layers


class _NormingProduct(Protocol):
    def __call__(
        self, x: Tensor, squares: Tensor, weight: Weights, out: Tensor, *, eps: float
    ) -> None:
        """Writes out."""


class _Project(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Weights,
        residual: Tensor,
        norm_weight: Tensor,
        normed: Tensor,
        squares: Tensor,
    ) -> None:
        """Writes residual, normed and squares."""


class _ProjectOfRanks(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Weights,
        residual: Tensor,
        norm_weight: Tensor,
        normed: Tensor,
        squares: Tensor,
        inboxes: Inboxes,
    ) -> None:
        """Writes residual, normed and squares."""


@dataclass(frozen=True)
class ProductsOfRanks:
    """What ranks that share a model have in place of others; see kernels/hopper/peers.py."""

    project: _ProjectOfRanks
    gather: Callable[[Tensor, Inboxes, Tensor], None]  # this rank's logits, inboxes, all logits


@dataclass(frozen=True)
class FusedProducts:
    """A layer's products where each norms its own input and adds itself to the residual stream; see
    kernels/hopper/products.py.
    """

    linear: _NormingProduct  # leaves partial sums
    # outputs, inputs, rows -> partial sums of `linear`
    linear_splits: Callable[[int, int, int], int]
    project: _Project
    project_blocks: Callable[[int], int]  # outputs -> blocks of squares that `project` writes
    swiglu: _NormingProduct
    head: _NormingProduct  # out: logits [rows, outputs]
    headroom: float  # factor of every x
    of_ranks: ProductsOfRanks | None = None


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on the device: on a GPU of compute capability 8.0 and above, or
    in the interpreter.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


def select_operations(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_size: int,
    backend: str,
    *,
    tell: Callable[[str], None],
) -> Operations:
    """The operations for a model's shape on a device.

    Args:
        backend: "auto", "torch", or "triton", which must run on the device.
        tell: called with one line for the user where something falls back.
    """
    assert backend in BACKENDS
    if backend == "torch" or not triton_runs_on(device):
        assert backend != "triton"
        if backend == "auto" and device.type == "cuda":
            tell(
                "this GPU's compute capability is below 8.0: torch's operations take the place of "
                "the Triton kernels"
            )
        return torch_operations()
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    operations = triton_operations(
        tile_table(capability, dtype),
        heads,
        head_size,
        launch_pdl=capability >= (9, 0),
        hopper=capability == (9, 0) and dtype.itemsize == 2,
    )
    if head_size in HEAD_SIZES:
        return operations
    tell(
        f"head size {head_size} has no Triton attention ({', '.join(map(str, HEAD_SIZES))} have): "
        "torch's takes its place"
    )
    return replace(
        operations,
        attention=attention_reference,
        attention_chunks=torch_operations().attention_chunks,
    )


def torch_operations() -> Operations:
    """The torch references, for every device and dtype. Nothing is fused."""
    return Operations(
        embed=embed_reference,
        linear=linear_reference,
        linear_splits=lambda outputs, inputs: 1,
        whole_linear=linear_reference,
        swiglu=swiglu_reference,
        gate=gate_reference,
        attention=attention_reference,
        attention_chunks=lambda tokens: 1,
        add_norm=add_norm_reference,
        draw_tokens=draw_tokens_reference,
    )


def triton_operations(
    table: TileTable,
    heads: int,
    head_size: int,
    *,
    launch_pdl: bool,
    hopper: bool = False,
) -> Operations:
    """The Triton kernels, cut up as the table says.

    Args:
        hopper: with those that only compute capability 9.0 runs, for 16-bit activations.
    """
    attention_tiles = table.find(ATTENTION, heads, head_size)
    return Operations(
        embed=partial(embed, launch_pdl=launch_pdl),
        linear=_tiled(partial(linear, launch_pdl=launch_pdl), table, LINEAR),
        linear_splits=lambda outputs, inputs: table.find(LINEAR, outputs, inputs).splits(inputs),
        whole_linear=_tiled(partial(linear, launch_pdl=launch_pdl), table, WHOLE_LINEAR),
        swiglu=_tiled(partial(swiglu, launch_pdl=launch_pdl), table, SWIGLU),
        gate=partial(gate, launch_pdl=launch_pdl),
        attention=(
            partial(_hopper_attention, tiles=attention_tiles)
            if hopper
            else partial(attention, tiles=attention_tiles, launch_pdl=launch_pdl)
        ),
        attention_chunks=attention_tiles.chunks,
        add_norm=partial(add_norm, launch_pdl=launch_pdl),
        # Positions are of an earlier step: every step starts after the one before it has ended (see
        # `embed`).
        draw_tokens=partial(draw_tokens, early_positions=True),
        fused=fused_products(table) if hopper else None,
        quantized=quantized_products(table) if hopper else None,
    )


def _hopper_attention(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    limits: Tensor,
    chunk_out: Tensor,
    chunk_stats: Tensor,
    out: Tensor,
    kv_scales: Tensor | None = None,
    *,
    tiles: AttentionTiles,
) -> None:
    """The attention of many rows where it can be; its result is the same."""
    tensors = qkv, rotary, key_pages, value_pages, page_table, positions, limits
    scratch = chunk_out, chunk_stats
    if attends_at_once(qkv.shape[1], len(positions), key_pages.shape[2], tiles):
        if kv_scales is None:
            many_rows_attention(*tensors, out, tiles)
        else:
            many_rows_scaled_attention(*tensors, out, kv_scales, tiles)
    elif kv_scales is None:
        hopper_attention(*tensors, *scratch, out, tiles)
    else:
        scaled_attention(*tensors, *scratch, out, kv_scales, tiles)


def attends_at_once(rows: int, sequences: int, page_size: int, tiles: AttentionTiles) -> bool:
    """Whether Hopper's attention is one kernel, and leaves no chunks to combine."""
    alone = rows == sequences and tiles.warps == 1
    return rows > MANY_ROWS and alone and takes_pages(page_size)


def fused_products(table: TileTable) -> FusedProducts:
    """Hopper's products, cut up as the table says. Those of many rows have tiles of their own, and
    the same sums.
    """

    def linear_splits(outputs: int, inputs: int, rows: int) -> int:
        return 1 if rows > MANY_ROWS else table.find(FUSED_LINEAR, outputs, inputs).splits

    linear = _by_rows(fused_linear, many_rows_linear)
    return FusedProducts(
        linear=_tiled(linear, table, FUSED_LINEAR, weight_at=2),
        linear_splits=linear_splits,
        project=_tiled(_by_rows(fused_project, many_rows_project), table, FUSED_PROJECT),
        project_blocks=lambda outputs: -(-outputs // SQUARES_BLOCK),
        swiglu=_tiled(_by_rows(fused_swiglu, many_rows_swiglu), table, FUSED_SWIGLU, weight_at=2),
        head=_tiled(linear, table, FUSED_HEAD, weight_at=2),
        headroom=HEADROOM,
        of_ranks=ProductsOfRanks(_tiled(fused_project, table, FUSED_PROJECT), gather_parts),
    )


def quantized_products(table: TileTable) -> FusedProducts:
    """Hopper's products by paired weights of a byte, cut up as the table says. The head has weights
    of 16 bits, so it is the product of `fused_products`.
    """
    fused = fused_products(table)

    def linear_splits(outputs: int, inputs: int, rows: int) -> int:
        return 1 if rows > MANY_ROWS else table.find(QUANTIZED_LINEAR, outputs, inputs).splits

    linear = _by_rows(quantized_linear, many_rows_quantized_linear)
    project = _by_rows(quantized_project, many_rows_quantized_project)
    swiglu = _by_rows(quantized_swiglu, many_rows_quantized_swiglu)
    return replace(
        fused,
        linear=_tiled(linear, table, QUANTIZED_LINEAR, weight_at=2),
        linear_splits=linear_splits,
        project=_tiled(project, table, QUANTIZED_PROJECT),
        swiglu=_tiled(swiglu, table, QUANTIZED_SWIGLU, weight_at=2),
    )


def _by_rows(few: Callable[..., None], many: Callable[..., None]) -> Callable[..., None]:
    """A product of few or of many rows, as its input has."""

    def run(x: Tensor, *tensors: Tensor, **options: Any) -> None:
        (many if len(x) > MANY_ROWS else few)(x, *tensors, **options)

    return run


def _tiled(
    product: Callable[..., None], table: TileTable, section: Section[Any], weight_at: int = 1
) -> Callable[..., None]:
    """A product that looks up its tiles.

    Args:
        weight_at: the place of the weights among its tensors.
    """

    def run(*tensors: Tensor, **numbers: float) -> None:
        product(*tensors, tiles=table.of_weight(section, tensors[weight_at]), **numbers)

    return run
