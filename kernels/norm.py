"""The residual stream: its start (a row's embedding) and its growth (partial sums of a product),
each with the norm that follows.

The residual stream is float32; what is normalised goes to the next product in the weights' dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import pdl_option
from kernels.lookahead import row_position, row_positions_reference


@triton.jit(do_not_specialize=["rows", "cells", "vocabulary", "classes"])
def _embed_kernel(
    codes,  # [slots, cells]
    row_slots,  # [sequences]
    positions,  # [sequences]
    limits,  # [sequences]
    labels,  # [sequences]
    token_embedding,  # [vocabulary, WIDTH]
    class_embedding,  # [classes, WIDTH]
    norm_weight,  # [WIDTH]
    residual,  # [rows, WIDTH] float32
    normed,  # [rows, WIDTH]
    squares,  # [BLOCKS, rows] float32
    rows,
    cells,
    vocabulary,
    classes,
    WINDOW: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_TILE: tl.constexpr,
    HEADROOM: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    row = tl.program_id(0)
    offset = tl.arange(0, TILE)
    mask = offset < WIDTH
    if LAUNCH_PDL:
        gdc_launch_dependents()  # and no wait: README, rule 2
    weight = tl.load(norm_weight + offset, mask=mask, other=0.0).to(tl.float32)
    position = row_position(positions, limits, row, WINDOW)
    slot = tl.load(row_slots + row // WINDOW).to(tl.int64)
    label = tl.load(labels + row // WINDOW)
    token = tl.load(codes + slot * cells + position - 1, mask=position > 0, other=0)
    # Clamped: whatever a damaged model drew, no address outside the tables is read.
    token = tl.minimum(tl.maximum(token, 0), vocabulary - 1).to(tl.int64)
    label = tl.minimum(tl.maximum(label, 0), classes - 1).to(tl.int64)
    x = tl.load(token_embedding + token * WIDTH + offset, mask=mask & (position > 0), other=0.0).to(
        tl.float32
    )
    x += tl.load(
        class_embedding + label * WIDTH + offset, mask=mask & (position <= 0), other=0.0
    ).to(tl.float32)
    total = tl.sum(x * x, 0)
    if BLOCKS > 0:  # the next product divides
        block = tl.arange(0, BLOCKS_TILE)
        tl.store(
            squares + block * rows + row, tl.where(block == 0, total, 0.0), mask=block < BLOCKS
        )
        scale = HEADROOM
    else:
        scale = tl.rsqrt(total / WIDTH + EPS)
    at = row.to(tl.int64) * WIDTH + offset
    tl.store(residual + at, x, mask=mask)
    tl.store(normed + at, (x * scale * weight).to(normed.dtype.element_ty), mask=mask)


def embed(
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
    launch_pdl: bool,
) -> None:
    """Starts the residual stream of every row and norms it. A row starts with its class at position
    0, else with the token before it, which has been drawn or guessed.

    Row r is new token r % window of sequence r // window.

    The first kernel of a step. It is launched without the programmatic attribute, so that every
    kernel of earlier steps is complete before any kernel of this step starts: what these may load
    early is complete by that.

    Args:
        codes: int32 [slots, cells], tokens of the images.
        row_slots, labels: int32 [sequences]
        positions: int32 [sequences], of the first new token; below 0 for padding. There are
            rows / sequences new tokens, the window.
        limits: int32 [sequences]. Of a row at or beyond its sequence's limit, or of padding, any
            finite values come out.
        token_embedding: [vocabulary, width]; class_embedding: [classes, width].
        norm_weight: [width], of the first layer.
        residual: float32 [rows, width], written.
        normed: [rows, width], written: the first layer's input, rms-normed times norm_weight.
        squares: float32 [blocks, rows]; if given, the norm is left to the first product
            (kernels/hopper/products.py). `normed` is then residual * norm_weight * headroom, and
            the residual's sum of squares is written to the first block.
    """
    rows, width = residual.shape
    tile = triton.next_power_of_2(width)
    _embed_kernel[(rows,)](
        codes,
        row_slots,
        positions,
        limits,
        labels,
        token_embedding,
        class_embedding,
        norm_weight,
        residual,
        normed,
        squares,
        rows,
        codes.shape[1],
        token_embedding.shape[0],
        class_embedding.shape[0],
        WINDOW=rows // len(positions),
        EPS=eps,
        WIDTH=width,
        TILE=tile,
        BLOCKS=0 if squares is None else squares.shape[0],
        BLOCKS_TILE=1 if squares is None else triton.next_power_of_2(squares.shape[0]),
        HEADROOM=headroom,
        LAUNCH_PDL=launch_pdl,
        num_warps=_warps(tile),
    )


def embed_reference(
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
    """Does the same as `embed` in torch."""
    window = len(residual) // len(positions)
    at = row_positions_reference(positions, limits, window).long()
    slots, labels = (each.long().repeat_interleave(window) for each in (row_slots, labels))
    tokens = codes[slots, (at - 1).clamp(min=0)].long().clamp(0, token_embedding.shape[0] - 1)
    classes = class_embedding[labels.clamp(0, class_embedding.shape[0] - 1)]
    residual.copy_(torch.where(at[:, None] > 0, token_embedding[tokens], classes))
    if squares is None:
        normed.copy_(_rms_norm(residual, norm_weight, eps))
    else:
        normed.copy_(residual * norm_weight.float() * headroom)
        squares.zero_()
        squares[0] = residual.square().sum(dim=1)


@triton.jit(do_not_specialize=["rows"])
def _add_norm_kernel(
    residual,  # [rows, WIDTH] float32
    partials,  # [SPLITS, rows, WIDTH]
    norm_weight,  # [WIDTH]
    normed,  # [rows, WIDTH]
    rows,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    row = tl.program_id(0)
    offset = tl.arange(0, TILE)
    mask = offset < WIDTH
    at = row.to(tl.int64) * WIDTH + offset
    if LAUNCH_PDL:
        gdc_launch_dependents()
    weight = tl.load(norm_weight + offset, mask=mask, other=0.0).to(tl.float32)
    if LAUNCH_PDL:
        gdc_wait()  # README, rules 1 and 3: the norm's weight comes before it, sums after it
    x = tl.load(residual + at, mask=mask, other=0.0)
    parts: tl.tuple = ()
    for split in tl.static_range(SPLITS):  # all on their way before the first is added
        parts = parts + (
            tl.load(partials + split * rows.to(tl.int64) * WIDTH + at, mask=mask, other=0.0),
        )
    for split in tl.static_range(SPLITS):
        x += parts[split].to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + EPS)
    tl.store(residual + at, x, mask=mask)
    tl.store(normed + at, (x * scale * weight).to(normed.dtype.element_ty), mask=mask)


def add_norm(
    residual: Tensor,
    partials: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    *,
    eps: float,
    launch_pdl: bool,
) -> None:
    """Adds a product's partial sums to the residual stream, in order, and norms the result for the
    next product.

    Args:
        residual: float32 [rows, width], updated.
        partials: [splits, rows, width]; or of ranks [ranks, rows, width], a whole term of each.
        norm_weight: [width]
        normed: [rows, width], written: x / rms(x) * norm_weight.
    """
    splits, rows, width = partials.shape
    tile = triton.next_power_of_2(width)
    _add_norm_kernel[(rows,)](
        residual,
        partials,
        norm_weight,
        normed,
        rows,
        EPS=eps,
        WIDTH=width,
        TILE=tile,
        SPLITS=splits,
        LAUNCH_PDL=launch_pdl,
        num_warps=_warps(tile),
        **pdl_option(launch_pdl),
    )


def add_norm_reference(
    residual: Tensor, partials: Tensor, norm_weight: Tensor, normed: Tensor, *, eps: float
) -> None:
    """Does the same as `add_norm` in torch."""
    for partial in partials:
        residual += partial
    normed.copy_(_rms_norm(residual, norm_weight, eps))


def _rms_norm(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * norm_weight.float()


def _warps(tile: int) -> int:
    """Warps for four elements a thread, so that they stay in few registers."""
    return max(1, min(32, tile // 128))
