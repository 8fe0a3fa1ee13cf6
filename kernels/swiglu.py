"""The gated half of the feed-forward layer: silu(W1 x) * (W3 x), with W1 and W3 in one matrix.

For few rows one kernel does all: a program takes the same outputs of both halves over all inputs,
so that nothing needs a second pass. For many rows the product is a library's, and `gate` does the
rest.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import pdl_option, row_tile


@dataclass(frozen=True)
class SwigluTiles:
    """How the product is cut up."""

    outputs: int  # outputs of a program, of each half
    inputs: int  # inputs of one tile
    early: int  # tiles whose weights are loaded before the wait
    stages: int  # depth of the pipeline that streams the rest
    warps: int


@triton.jit(do_not_specialize=["rows"])
def _swiglu_kernel(
    x,  # [rows, INPUTS]
    weight,  # [2 * HIDDEN, INPUTS]: W1 above W3
    out,  # [rows, HIDDEN]
    rows,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROW_TILE: tl.constexpr,
    HALF: tl.constexpr,
    INPUT_TILE: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    block, row_block = tl.program_id(0), tl.program_id(1)
    row = row_block * ROW_TILE + tl.arange(0, ROW_TILE)
    row_mask = row < rows
    index = tl.arange(0, 2 * HALF)
    output = tl.where(index < HALF, block * HALF + index, HIDDEN + block * HALF + index - HALF)
    offset = tl.arange(0, INPUT_TILE)
    weight_rows = weight + output[:, None].to(tl.int64) * INPUTS
    x_rows = x + row[None, :] * INPUTS
    if LAUNCH_PDL:
        gdc_launch_dependents()
    early_weights: tl.tuple = ()
    for tile in tl.static_range(EARLY):
        column = tile * INPUT_TILE + offset
        early_weights = early_weights + (
            tl.load(weight_rows + column[None, :], mask=(column < INPUTS)[None, :], other=0.0),
        )
    if LAUNCH_PDL:
        gdc_wait()  # README, rules 1 and 3: weights come before it, x after it
    total = tl.zeros([2 * HALF, ROW_TILE], tl.float32)
    for tile in tl.range(EARLY, (INPUTS + INPUT_TILE - 1) // INPUT_TILE, num_stages=STAGES):
        column = tile * INPUT_TILE + offset
        weights = tl.load(weight_rows + column[None, :], mask=(column < INPUTS)[None, :], other=0.0)
        values = tl.load(
            x_rows + column[:, None], mask=row_mask[None, :] & (column < INPUTS)[:, None], other=0.0
        )
        total = tl.dot(weights, values, total, input_precision="ieee")
    early_values: tl.tuple = ()
    for tile in tl.static_range(EARLY):
        column = tile * INPUT_TILE + offset
        values = tl.load(
            x_rows + column[:, None], mask=row_mask[None, :] & (column < INPUTS)[:, None], other=0.0
        )
        early_values = early_values + (values,)
    for tile in tl.static_range(EARLY):
        total = tl.dot(early_weights[tile], early_values[tile], total, input_precision="ieee")
    # [HALF, ROW_TILE] each
    gate, up = tl.split(tl.permute(tl.reshape(total, [2, HALF, ROW_TILE]), [1, 2, 0]))
    hidden = gate / (1 + tl.exp(-gate)) * up
    column = block * HALF + tl.arange(0, HALF)
    tl.store(
        out + row[None, :] * HIDDEN + column[:, None],
        hidden.to(out.dtype.element_ty),
        mask=row_mask[None, :],
    )


def swiglu(x: Tensor, weight: Tensor, out: Tensor, tiles: SwigluTiles, *, launch_pdl: bool) -> None:
    """silu(W1 x) * (W3 x).

    Args:
        x: [rows, inputs]
        weight: [2 * hidden, inputs], W1 above W3; hidden is a multiple of `tiles.outputs`.
        out: [rows, hidden]
    """
    rows, inputs = x.shape
    hidden = weight.shape[0] // 2
    assert (
        hidden % tiles.outputs == 0 and tiles.early * tiles.inputs <= inputs + tiles.inputs - 1
    ), (hidden, tiles)
    row_block = row_tile(rows)
    _swiglu_kernel[(hidden // tiles.outputs, triton.cdiv(rows, row_block))](
        x,
        weight,
        out,
        rows,
        INPUTS=inputs,
        HIDDEN=hidden,
        ROW_TILE=row_block,
        HALF=tiles.outputs,
        INPUT_TILE=tiles.inputs,
        EARLY=tiles.early,
        STAGES=tiles.stages,
        LAUNCH_PDL=launch_pdl,
        num_warps=tiles.warps,
        **pdl_option(launch_pdl),
    )


def swiglu_reference(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """The same in torch."""
    gate, up = torch.nn.functional.linear(x, weight).chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


@triton.jit
def _gate_kernel(products, out, HIDDEN: tl.constexpr, TILE: tl.constexpr, LAUNCH_PDL: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1)
    column = block * TILE + tl.arange(0, TILE)
    mask = column < HIDDEN
    at = products + row.to(tl.int64) * 2 * HIDDEN + column
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()  # README, rule 3: all that is read is the product's
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + HIDDEN, mask=mask, other=0.0).to(tl.float32)
    hidden = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row.to(tl.int64) * HIDDEN + column, hidden.to(out.dtype.element_ty), mask=mask)


def gate(products: Tensor, out: Tensor, *, launch_pdl: bool) -> None:
    """silu of the first half times the second.

    Args:
        products: [rows, 2 * hidden]
        out: [rows, hidden]
    """
    rows, hidden = out.shape
    _gate_kernel[(triton.cdiv(hidden, 1024), rows)](
        products,
        out,
        HIDDEN=hidden,
        TILE=1024,
        LAUNCH_PDL=launch_pdl,
        num_warps=4,
        **pdl_option(launch_pdl),
    )


def gate_reference(products: Tensor, out: Tensor) -> None:
    """The same in torch."""
    gate, up = products.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)
