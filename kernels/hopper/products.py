"""Matrix products of few rows on Hopper: weights and inputs come as bulk copies, and a program asks
for all it can hold at once.

Like `kernels.linear` (the weights are the wide operand, and on their way before the wait for what
computes the input), but without the norms' kernels: `fused_project` adds its result to the residual
stream and prepares the next product's input itself, a sum over a cluster of programs taking the
place of partial sums in memory. A norm needs whole rows, which no program has, so the next product
divides: its input is residual * gain, not yet normed, beside the sums of squares.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.hopper.cluster import (
    cluster_sum,
    exchange_bytes,
    launch_clustered,
    meet,
    open_exchange,
)
from kernels.linear import row_tile

# What is not yet normed is kept this much smaller, so that a large residual stream fits into fp16:
# up to half a million. A smaller factor would lose more of a small one, below fp16's least normal
# number.
HEADROOM = 2.0**-3
_HEADROOM = gl.constexpr(HEADROOM)
_SHARED_MEMORY = 226 * 1024  # bytes of a program, the barriers' left out
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class FusedTiles:
    """How a product is cut up; from the measured table, or `kernels.tiles.default_fused_tiles`."""

    outputs: int  # outputs of a program; of the gated product, of each half
    inputs: int  # inputs of a tile
    splits: int  # programs along the inputs: of `project` the size of a cluster (1, 2, 4 or 8)
    stages: int  # tiles on their way at once; fewer where they do not fit
    warps: int

    def tiles(self, inputs: int) -> int:
        """Of a program, one after the other along the inputs."""
        return -(-inputs // (self.inputs * self.splits))

    def held(self, inputs: int, outputs: int, rows: int, cluster: int) -> int:
        """Tiles that a program holds."""
        tile_bytes = (outputs + rows) * self.inputs * 2
        held = min(
            self.stages,
            self.tiles(inputs),
            (_SHARED_MEMORY - exchange_bytes(outputs, rows, cluster)) // tile_bytes,
        )
        assert held >= 1, (self, outputs, rows)
        return held


@gluon.jit
def _start(
    weight,
    x,
    output,
    input_,
    row,
    OUTPUTS: gl.constexpr,
    ROWS: gl.constexpr,
    INPUTS: gl.constexpr,
    STAGES: gl.constexpr,
    CLUSTER: gl.constexpr,
):
    """Asks for the first tiles: weights at once, inputs after the wait, before which the programs
    of a cluster meet.
    """
    GATED: gl.constexpr = len(weight.block_shape) == 3
    box: gl.constexpr = [STAGES, 2, OUTPUTS // 2, INPUTS] if GATED else [STAGES, OUTPUTS, INPUTS]
    weights = gl.allocate_shared_memory(weight.dtype, box, weight.layout)
    values = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, INPUTS], x.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrived.index(stage), count=1)
    fence_async_shared()
    gdc_launch_dependents()
    for stage in gl.static_range(STAGES):
        mbarrier.expect(arrived.index(stage), (OUTPUTS + ROWS) * INPUTS * 2)
        _copy_weights(
            weight,
            output,
            input_ + stage * INPUTS,
            arrived.index(stage),
            weights.index(stage),
            GATED,
        )
    if CLUSTER > 1:
        meet()
    gdc_wait()  # only now is x valid
    for stage in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(
            x, [row, input_ + stage * INPUTS], arrived.index(stage), values.index(stage)
        )
    return weights, values, arrived


@gluon.jit
def _copy_weights(weight, output, input_, arrived, target, GATED: gl.constexpr):
    if GATED:
        tma.async_copy_global_to_shared(weight, [0, output, input_], arrived, target)
    else:
        tma.async_copy_global_to_shared(weight, [output, input_], arrived, target)


@gluon.jit
def _product(
    started,
    weight,
    x,
    output,
    input_,
    row,
    OUTPUTS: gl.constexpr,
    ROWS: gl.constexpr,
    INPUTS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The product [OUTPUTS, ROWS] of what `_start` asked for; asks for the other tiles as room
    becomes free.
    """
    weights, values, arrived = started
    GATED: gl.constexpr = len(weight.block_shape) == 3
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    total = gl.zeros([OUTPUTS, ROWS], gl.float32, layout)
    for tile in gl.static_range(TILES):
        mbarrier.wait(arrived.index(tile % STAGES), (tile // STAGES) & 1)
        tile_weights = weights.index(tile % STAGES).reshape([OUTPUTS, INPUTS])
        total = warpgroup_mma(
            tile_weights, values.index(tile % STAGES).permute((1, 0)), total, is_async=True
        )
        if tile + STAGES < TILES:
            total = warpgroup_mma_wait(0, deps=(total,))
            gl.thread_barrier()  # every warp has read the tile
            column = input_ + (tile + STAGES) * INPUTS
            mbarrier.expect(arrived.index(tile % STAGES), (OUTPUTS + ROWS) * INPUTS * 2)
            _copy_weights(
                weight,
                output,
                column,
                arrived.index(tile % STAGES),
                weights.index(tile % STAGES),
                GATED,
            )
            tma.async_copy_global_to_shared(
                x, [row, column], arrived.index(tile % STAGES), values.index(tile % STAGES)
            )
    return warpgroup_mma_wait(0, deps=(total,))


@gluon.jit
def _row_scales(
    squares,
    row,
    rows,
    WIDTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    LANES: gl.constexpr,
    ROWS: gl.constexpr,
    EPS: gl.constexpr,
):
    """What norms each row's product: [ROWS]. The sum's order depends on BLOCKS alone."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    own = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    block = gl.arange(0, LANES, layout=gl.SliceLayout(0, layout))[None, :]
    parts = gl.load(squares + block * rows + own, mask=(block < BLOCKS) & (own < rows), other=0.0)
    return gl.rsqrt(gl.sum(parts, 1) / WIDTH + EPS) / _HEADROOM


@gluon.jit(do_not_specialize=["rows"])
def _fused_linear_kernel(
    weight,  # [OUTPUTS, WIDTH], as a descriptor
    x,  # [rows, WIDTH], as a descriptor
    squares,  # [BLOCKS, rows] float32
    out,  # [splits, rows, OUTPUTS] float32
    rows,
    WIDTH: gl.constexpr,
    OUTPUTS: gl.constexpr,
    BLOCKS: gl.constexpr,
    LANES: gl.constexpr,
    EPS: gl.constexpr,
    ROW_TILE: gl.constexpr,
    OUTPUT_TILE: gl.constexpr,
    INPUT_TILE: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    first_output, split, first_row = (
        gl.program_id(0) * OUTPUT_TILE,
        gl.program_id(1),
        gl.program_id(2) * ROW_TILE,
    )
    first_input = split * (TILES * INPUT_TILE)
    started = _start(
        weight,
        x,
        first_output,
        first_input,
        first_row,
        OUTPUT_TILE,
        ROW_TILE,
        INPUT_TILE,
        STAGES,
        CLUSTER=1,
    )
    scales = _row_scales(squares, first_row, rows, WIDTH, BLOCKS, LANES, ROW_TILE, EPS)
    total = _product(
        started,
        weight,
        x,
        first_output,
        first_input,
        first_row,
        OUTPUT_TILE,
        ROW_TILE,
        INPUT_TILE,
        TILES,
        STAGES,
    )
    layout: gl.constexpr = total.type.layout
    total = total * gl.convert_layout(scales, gl.SliceLayout(0, layout))[None, :]
    output = first_output + gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))[:, None]
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    at = (split * rows + row).to(gl.int64) * OUTPUTS + output
    gl.store(out + at, total, mask=(row < rows) & (output < OUTPUTS))


@gluon.jit(do_not_specialize=["rows"])
def _fused_project_kernel(
    weight,  # [OUTPUTS, inputs], as a descriptor
    x,  # [rows, inputs], as a descriptor
    residual,  # [rows, OUTPUTS] float32
    gain,  # [OUTPUTS]
    normed,  # [rows, OUTPUTS]
    squares,  # [blocks, rows] float32
    rows,
    OUTPUTS: gl.constexpr,
    ROW_TILE: gl.constexpr,
    OUTPUT_TILE: gl.constexpr,
    INPUT_TILE: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    CLUSTER: gl.constexpr,
):
    rank, block = gl.program_id(0) % CLUSTER, gl.program_id(0) // CLUSTER
    first_output, first_row, first_input = (
        block * OUTPUT_TILE,
        gl.program_id(1) * ROW_TILE,
        rank * (TILES * INPUT_TILE),
    )
    if CLUSTER > 1:
        exchange = open_exchange(OUTPUT_TILE, ROW_TILE)
    OWN: gl.constexpr = ROW_TILE // CLUSTER
    layout: gl.constexpr = gl.BlockedLayout(
        [OUTPUT_TILE // 32, 1], [32, 1], [1, gl.num_warps()], [0, 1]
    )
    output = first_output + gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))
    row = first_row + rank * OWN + gl.arange(0, OWN, layout=gl.SliceLayout(0, layout))
    gains = gl.load(gain + output, mask=output < OUTPUTS, other=0.0).to(gl.float32)
    started = _start(
        weight,
        x,
        first_output,
        first_input,
        first_row,
        OUTPUT_TILE,
        ROW_TILE,
        INPUT_TILE,
        STAGES,
        CLUSTER,
    )
    live = (output < OUTPUTS)[:, None] & (row < rows)[None, :]
    at = row.to(gl.int64)[None, :] * OUTPUTS + output[:, None]
    grown = gl.load(residual + at, mask=live, other=0.0)
    total = _product(
        started,
        weight,
        x,
        first_output,
        first_input,
        first_row,
        OUTPUT_TILE,
        ROW_TILE,
        INPUT_TILE,
        TILES,
        STAGES,
    )
    if CLUSTER > 1:
        grown += cluster_sum(exchange, rank, total, layout, CLUSTER)
    else:
        grown += gl.convert_layout(total, layout)
    gl.store(residual + at, grown, mask=live)
    gl.store(
        normed + at, (grown * gains[:, None] * _HEADROOM).to(normed.dtype.element_ty), mask=live
    )
    gl.store(squares + block * rows + row, gl.sum(grown * grown, 0), mask=row < rows)


@gluon.jit(do_not_specialize=["rows"])
def _fused_swiglu_kernel(
    weight,  # [2, HIDDEN, WIDTH], as a descriptor
    x,  # [rows, WIDTH], as a descriptor
    squares,  # [BLOCKS, rows] float32
    out,  # [rows, HIDDEN]
    rows,
    WIDTH: gl.constexpr,
    HIDDEN: gl.constexpr,
    BLOCKS: gl.constexpr,
    LANES: gl.constexpr,
    EPS: gl.constexpr,
    ROW_TILE: gl.constexpr,
    HALF: gl.constexpr,
    INPUT_TILE: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    first_output, first_row = gl.program_id(0) * HALF, gl.program_id(1) * ROW_TILE
    started = _start(
        weight, x, first_output, 0, first_row, 2 * HALF, ROW_TILE, INPUT_TILE, STAGES, CLUSTER=1
    )
    scales = _row_scales(squares, first_row, rows, WIDTH, BLOCKS, LANES, ROW_TILE, EPS)
    total = _product(
        started,
        weight,
        x,
        first_output,
        0,
        first_row,
        2 * HALF,
        ROW_TILE,
        INPUT_TILE,
        TILES,
        STAGES,
    )
    product_layout: gl.constexpr = total.type.layout
    total = total * gl.convert_layout(scales, gl.SliceLayout(0, product_layout))[None, :]
    pairs = total.reshape([2, HALF, ROW_TILE]).permute((1, 2, 0))  # [HALF, ROW_TILE, 2]
    WARPS: gl.constexpr = gl.num_warps()
    pair_layout: gl.constexpr = gl.BlockedLayout(
        [1, ROW_TILE // WARPS, 2], [32, 1, 1], [1, WARPS, 1], [2, 1, 0]
    )
    gate, up = gl.convert_layout(pairs, pair_layout).split()
    hidden = gate / (1 + gl.exp(-gate)) * up
    layout: gl.constexpr = hidden.type.layout
    output = first_output + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))[:, None]
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    live = (row < rows) & (output < HIDDEN)
    gl.store(out + row.to(gl.int64) * HIDDEN + output, hidden.to(out.dtype.element_ty), mask=live)


def fused_linear(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, tiles: FusedTiles, *, eps: float
) -> None:
    """Partial sums of norm(x) W^T.

    Args:
        x: [rows, width], 16-bit: residual * gain * HEADROOM; width a multiple of 8.
        squares: float32 [blocks, rows]; their sum over the first dimension is that of the
            residual's squares.
        weight: [outputs, width], contiguous.
        out: float32 [tiles.splits, rows, outputs]; their sum over the first dimension is the
            product.
    """
    rows, width = x.shape
    outputs = weight.shape[0]
    assert out.shape == (tiles.splits, rows, outputs), (out.shape, tiles)
    row_block = row_tile(rows)
    grid = (triton.cdiv(outputs, tiles.outputs), tiles.splits, triton.cdiv(rows, row_block))
    _fused_linear_kernel[grid](
        _descriptor(weight, tiles.outputs, tiles.inputs),
        _descriptor(x, row_block, tiles.inputs),
        squares,
        out,
        rows,
        WIDTH=width,
        OUTPUTS=outputs,
        BLOCKS=squares.shape[0],
        LANES=_lanes(squares),
        EPS=eps,
        ROW_TILE=row_block,
        OUTPUT_TILE=tiles.outputs,
        INPUT_TILE=tiles.inputs,
        TILES=tiles.tiles(width),
        STAGES=tiles.held(width, tiles.outputs, row_block, cluster=1),
        num_warps=tiles.warps,
        launch_pdl=True,
    )


def fused_project(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gain: Tensor,
    normed: Tensor,
    squares: Tensor,
    tiles: FusedTiles,
) -> None:
    """Adds x W^T to the residual stream, and prepares the next product's input.

    Args:
        x: [rows, inputs], 16-bit; inputs a multiple of 8.
        weight: [width, inputs], contiguous.
        residual: float32 [rows, width], updated.
        gain: [width], of the norm that follows.
        normed: [rows, width], written: residual * gain * HEADROOM.
        squares: float32 [blocks of tiles.outputs of the width, rows], written: sums of the
            residual's squares.
    """
    rows, inputs = x.shape
    width = weight.shape[0]
    blocks, row_block = triton.cdiv(width, tiles.outputs), row_tile(rows)
    assert squares.shape == (blocks, rows), (squares.shape, tiles)
    # else two warps would hold, and send, the same sums
    assert tiles.outputs >= 16 * tiles.warps, tiles
    launch_clustered(
        _fused_project_kernel,
        (blocks, triton.cdiv(rows, row_block)),
        tiles.splits,
        _descriptor(weight, tiles.outputs, tiles.inputs),
        _descriptor(x, row_block, tiles.inputs),
        residual,
        gain,
        normed,
        squares,
        rows,
        OUTPUTS=width,
        ROW_TILE=row_block,
        OUTPUT_TILE=tiles.outputs,
        INPUT_TILE=tiles.inputs,
        TILES=tiles.tiles(inputs),
        STAGES=tiles.held(inputs, tiles.outputs, row_block, cluster=tiles.splits),
        CLUSTER=tiles.splits,
        num_warps=tiles.warps,
        launch_pdl=True,
    )


def fused_swiglu(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, tiles: FusedTiles, *, eps: float
) -> None:
    """silu(W1 norm(x)) * (W3 norm(x)).

    Args:
        x, squares: as of `fused_linear`.
        weight: [2 * hidden, width], contiguous, W1 above W3.
        out: [rows, hidden], written.
    """
    rows, width = x.shape
    hidden, row_block = weight.shape[0] // 2, row_tile(rows)
    assert tiles.splits == 1, tiles
    _fused_swiglu_kernel[(triton.cdiv(hidden, tiles.outputs), triton.cdiv(rows, row_block))](
        _descriptor(weight.view(2, hidden, width), 2, tiles.outputs, tiles.inputs),
        _descriptor(x, row_block, tiles.inputs),
        squares,
        out,
        rows,
        WIDTH=width,
        HIDDEN=hidden,
        BLOCKS=squares.shape[0],
        LANES=_lanes(squares),
        EPS=eps,
        ROW_TILE=row_block,
        HALF=tiles.outputs,
        INPUT_TILE=tiles.inputs,
        TILES=tiles.tiles(width),
        STAGES=tiles.held(width, 2 * tiles.outputs, row_block, cluster=1),
        num_warps=tiles.warps,
        launch_pdl=True,
    )


def _descriptor(tensor: Tensor, *box: int) -> TensorDescriptor:
    """What bulk copies of boxes of a tensor need; what lies outside the tensor is copied
    as zeros.
    """
    return TensorDescriptor.from_tensor(
        tensor, list(box), gl.NVMMASharedLayout.get_default_for(list(box), _DTYPES[tensor.dtype])
    )


def _lanes(squares: Tensor) -> int:
    return max(32, triton.next_power_of_2(squares.shape[0]))


def fused_linear_reference(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float
) -> None:
    """The same in torch: the product in the first of the partial sums, zeros in the others."""
    out[0] = torch.nn.functional.linear(x, weight) * _row_scales_reference(x, squares, eps)
    out[1:] = 0


def fused_project_reference(
    x: Tensor, weight: Tensor, residual: Tensor, gain: Tensor, normed: Tensor, squares: Tensor
) -> None:
    """The same in torch: all squares in the first block."""
    residual += torch.nn.functional.linear(x, weight)
    normed.copy_(residual * gain * HEADROOM)
    squares.zero_()
    squares[0] = residual.square().sum(dim=1)


def fused_swiglu_reference(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float
) -> None:
    """The same in torch."""
    gate, up = (
        torch.nn.functional.linear(x, weight) * _row_scales_reference(x, squares, eps)
    ).chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _row_scales_reference(x: Tensor, squares: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(squares.sum(dim=0) / x.shape[1] + eps)[:, None] / HEADROOM
