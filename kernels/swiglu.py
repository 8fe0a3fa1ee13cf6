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

from kernels.linear import pdl_option, product, row_tile


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
    HIDDEN_TILE: tl.constexpr,
    INPUT_TILE: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    block, row_block = tl.program_id(0), tl.program_id(1)
    row = row_block * ROW_TILE + tl.arange(0, ROW_TILE)
    row_mask = row < rows
    index = tl.arange(0, 2 * HIDDEN_TILE)
    output = tl.where(
        index < HIDDEN_TILE,
        block * HIDDEN_TILE + index,
        HIDDEN + block * HIDDEN_TILE + index - HIDDEN_TILE,
    )
    offset = tl.arange(0, INPUT_TILE)
    total = product(
        weight + output[:, None].to(tl.int64) * INPUTS,
        x + row[None, :] * INPUTS,
        0,
        offset,
        None,
        row_mask,
        INPUTS=INPUTS,
        WHOLE_TILES=True,
        OUTPUT_TILE=2 * HIDDEN_TILE,
        ROW_TILE=ROW_TILE,
        INPUT_TILE=INPUT_TILE,
        TILES=(INPUTS + INPUT_TILE - 1) // INPUT_TILE,
        EARLY=EARLY,
        STAGES=STAGES,
        LAUNCH_PDL=LAUNCH_PDL,
    )
    # [HIDDEN_TILE, ROW_TILE] each
    gate, up = tl.split(tl.permute(tl.reshape(total, [2, HIDDEN_TILE, ROW_TILE]), [1, 2, 0]))
    hidden = gate / (1 + tl.exp(-gate)) * up
    column = block * HIDDEN_TILE + tl.arange(0, HIDDEN_TILE)
    tl.store(
        out + row[None, :] * HIDDEN + column[:, None],
        hidden.to(out.dtype.element_ty),
        mask=row_mask[None, :],
    )


def swiglu(x: Tensor, weight: Tensor, out: Tensor, tiles: SwigluTiles, *, launch_pdl: bool) -> None:
    """Writes silu(W1 x) * (W3 x).

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
        HIDDEN_TILE=tiles.outputs,
        INPUT_TILE=tiles.inputs,
        EARLY=tiles.early,
        STAGES=tiles.stages,
        LAUNCH_PDL=launch_pdl,
        num_warps=tiles.warps,
        **pdl_option(launch_pdl),
    )


def swiglu_reference(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Does the same as `swiglu` in torch."""
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
    """Writes silu of the first half times the second half.

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
    """Does the same as `gate` in torch."""
    gate, up = products.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)
