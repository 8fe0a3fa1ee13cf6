"""Matrix products of few rows on Hopper: weights and inputs come as bulk copies, and a program asks
for all it can hold at once.

Like `kernels.linear` (the weights are the wide operand, and on their way before the wait for what
computes the input), but without the norms' kernels: `fused_project` adds its result to the residual
stream and prepares the next product's input itself, a sum over a cluster of programs taking the
place of partial sums in memory. A norm needs whole rows, which no program has, so the next product
divides: its input is residual * norm_weight, not yet normed, beside the sums of squares.
"""

from dataclasses import dataclass
from typing import Any

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
from triton.language.core import _aggregate as aggregate
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.hopper.cluster import (
    cluster_sum,
    cluster_sum_room,
    exchange_bytes,
    launch_clustered,
    meet,
    open_exchange,
)
from kernels.hopper.peers import Inboxes, sum_over_ranks
from kernels.linear import row_tile

# What is not yet normed is kept this much smaller, so that a large residual stream fits into fp16:
# up to half a million. A smaller factor would lose more of a small one, below fp16's least normal
# number.
HEADROOM = 2.0**-3
_HEADROOM = gl.constexpr(HEADROOM)
SHARED_MEMORY = 226 * 1024  # bytes of a program, the barriers' left out
MULTIPROCESSORS = 132  # of an H100 or H200; another number would change the order of sums
# Outputs whose squares are added up together; a multiple of it is a program's.
SQUARES_BLOCK = 64
_BLOCK = gl.constexpr(SQUARES_BLOCK)
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class FusedTiles:
    """How a product is cut up; from the measured table, or `kernels.tiles.fused_rule`."""

    outputs: int  # outputs of a program; of the gated product, of each half
    inputs: int  # inputs of a tile
    splits: int  # programs along the inputs: of `project` the size of a cluster (1, 2 or 4)
    stages: int  # tiles on their way at once; fewer where they do not fit
    warps: int

    def tiles(self, inputs: int) -> int:
        """Tiles of a program, which it takes one after the other along the inputs."""
        return -(-inputs // (self.inputs * self.splits))

    def held(self, inputs: int, outputs: int, rows: int, cluster: int) -> int:
        """Tiles that a program holds at once."""
        tile_bytes = (outputs + rows) * self.inputs * 2
        held = min(
            self.stages,
            self.tiles(inputs),
            (SHARED_MEMORY - project_exchange(outputs, rows, cluster)) // tile_bytes,
        )
        assert held >= 1, (self, outputs, rows)
        return held


@aggregate
class _Share:
    """What one program multiplies: a tile of outputs by a tile of rows, along its part of the
    inputs. `first_*` say where these begin in the whole matrices.
    """

    weight: tma.tensor_descriptor  # [OUTPUTS, inputs]; of the gated product [2, HIDDEN, inputs]
    x: tma.tensor_descriptor  # [rows, inputs]
    first_output: gl.tensor
    first_input: gl.tensor
    first_row: gl.tensor
    OUTPUT_TILE: gl.constexpr  # of the gated product both halves together
    ROW_TILE: gl.constexpr
    INPUT_TILE: gl.constexpr
    TILES: gl.constexpr  # along the inputs
    STAGES: gl.constexpr  # tiles that shared memory holds at once

    @gluon.constexpr_function
    def __init__(
        self,
        weight: Any,
        x: Any,
        first_output: Any,
        first_input: Any,
        first_row: Any,
        OUTPUT_TILE: int,
        ROW_TILE: int,
        INPUT_TILE: int,
        TILES: int,
        STAGES: int,
    ) -> None:
        self.weight, self.x = weight, x
        self.first_output, self.first_input, self.first_row = first_output, first_input, first_row
        self.OUTPUT_TILE, self.ROW_TILE = gl.constexpr(OUTPUT_TILE), gl.constexpr(ROW_TILE)
        self.INPUT_TILE = gl.constexpr(INPUT_TILE)
        self.TILES, self.STAGES = gl.constexpr(TILES), gl.constexpr(STAGES)

    @gluon.jit
    def start(self, CLUSTER: gl.constexpr):
        """Asks for the first tiles: for weights at once, for inputs after the wait. Before the wait
        the programs of a cluster meet. Returns what `product` takes.
        """
        GATED: gl.constexpr = len(self.weight.block_shape) == 3
        box: gl.constexpr = (
            [self.STAGES, 2, self.OUTPUT_TILE // 2, self.INPUT_TILE]
            if GATED
            else [self.STAGES, self.OUTPUT_TILE, self.INPUT_TILE]
        )
        weights = gl.allocate_shared_memory(self.weight.dtype, box, self.weight.layout)
        values = gl.allocate_shared_memory(
            self.x.dtype, [self.STAGES, self.ROW_TILE, self.INPUT_TILE], self.x.layout
        )
        arrived = gl.allocate_shared_memory(gl.int64, [self.STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(self.STAGES):
            mbarrier.init(arrived.index(stage), count=1)
        fence_async_shared()
        gdc_launch_dependents()
        for stage in gl.static_range(self.STAGES):
            self.expect(arrived.index(stage))
            self.copy_weights(
                self.first_input + stage * self.INPUT_TILE,
                arrived.index(stage),
                weights.index(stage),
            )
        if CLUSTER > 1:
            meet()
        gdc_wait()  # README, rules 1, 3 and 6: weights come before it, x after it
        for stage in gl.static_range(self.STAGES):
            self.copy_values(
                self.first_input + stage * self.INPUT_TILE,
                arrived.index(stage),
                values.index(stage),
            )
        return weights, values, arrived

    @gluon.jit
    def expect(self, arrived):
        """Lets the barrier open when a tile of weights and one of inputs have come."""
        mbarrier.expect(arrived, (self.OUTPUT_TILE + self.ROW_TILE) * self.INPUT_TILE * 2)

    @gluon.jit
    def copy_weights(self, first_input, arrived, target):
        """Begins to copy a tile of weights."""
        if len(self.weight.block_shape) == 3:
            tma.async_copy_global_to_shared(
                self.weight, [0, self.first_output, first_input], arrived, target
            )
        else:
            tma.async_copy_global_to_shared(
                self.weight, [self.first_output, first_input], arrived, target
            )

    @gluon.jit
    def copy_values(self, first_input, arrived, target):
        """Begins to copy a tile of inputs."""
        tma.async_copy_global_to_shared(self.x, [self.first_row, first_input], arrived, target)

    @gluon.jit
    def product(self, started):
        """Multiplies what `start` asked for, and asks for the other tiles as room becomes free.
        Returns [OUTPUT_TILE, ROW_TILE].
        """
        weights, values, arrived = started
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            [3, 0], [gl.num_warps(), 1], [16, self.ROW_TILE, 16]
        )
        total = gl.zeros([self.OUTPUT_TILE, self.ROW_TILE], gl.float32, layout)
        for tile in gl.static_range(self.TILES):
            stage = tile % self.STAGES
            mbarrier.wait(arrived.index(stage), (tile // self.STAGES) & 1)
            total = warpgroup_mma(
                weights.index(stage).reshape([self.OUTPUT_TILE, self.INPUT_TILE]),
                values.index(stage).permute((1, 0)),
                total,
                is_async=True,
            )
            if tile + self.STAGES < self.TILES:
                total = warpgroup_mma_wait(0, deps=(total,))
                gl.thread_barrier()  # every warp has read the tile
                first_input = self.first_input + (tile + self.STAGES) * self.INPUT_TILE
                self.expect(arrived.index(stage))
                self.copy_weights(first_input, arrived.index(stage), weights.index(stage))
                self.copy_values(first_input, arrived.index(stage), values.index(stage))
        return warpgroup_mma_wait(0, deps=(total,))


@gluon.jit
def row_scales(
    squares,  # [BLOCKS, rows] float32
    first_row,
    rows,
    ROW_TILE: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCKS_TILE: gl.constexpr,
    EPS: gl.constexpr,
):
    """What a product of rows that are not yet normed is multiplied by: float32 [ROW_TILE].

    The order of the sum depends on BLOCKS alone. The second half of the tile is added to the first,
    then half of that to the other, and so on. Here each block is a thread's.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(1, layout))[:, None]
    block = gl.arange(0, BLOCKS_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    parts = gl.load(squares + block * rows + row, mask=(block < BLOCKS) & (row < rows), other=0.0)
    return gl.rsqrt(gl.sum(parts, 1) / WIDTH + EPS) / _HEADROOM


@gluon.jit
def _normed_product(
    share,
    squares,
    rows,
    WIDTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCKS_TILE: gl.constexpr,
    EPS: gl.constexpr,
):
    """The product [OUTPUT_TILE, ROW_TILE] of a share whose input is not yet normed."""
    started = share.start(CLUSTER=1)
    scales = row_scales(
        squares, share.first_row, rows, share.ROW_TILE, WIDTH, BLOCKS, BLOCKS_TILE, EPS
    )
    total = share.product(started)
    return total * gl.convert_layout(scales, gl.SliceLayout(0, total.type.layout))[None, :]


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
    BLOCKS_TILE: gl.constexpr,
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
    share = _Share(
        weight,
        x,
        first_output=first_output,
        first_input=split * (TILES * INPUT_TILE),
        first_row=first_row,
        OUTPUT_TILE=OUTPUT_TILE,
        ROW_TILE=ROW_TILE,
        INPUT_TILE=INPUT_TILE,
        TILES=TILES,
        STAGES=STAGES,
    )
    total = _normed_product(share, squares, rows, WIDTH, BLOCKS, BLOCKS_TILE, EPS)
    layout: gl.constexpr = total.type.layout
    output = first_output + gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))[:, None]
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    at = (split * rows + row).to(gl.int64) * OUTPUTS + output
    gl.store(out + at, total, mask=(row < rows) & (output < OUTPUTS))


@gluon.jit
def write_residual(
    grown,  # [OUTPUT_TILE, rows], of the residual stream
    scale,  # [OUTPUT_TILE], of the norm that follows
    residual,  # [rows, OUTPUTS] float32
    normed,  # [rows, OUTPUTS]
    squares,  # [blocks, rows] float32
    first_output,
    first_row,
    rows,
    OUTPUTS: gl.constexpr,
):
    """Writes a part of the residual stream, and what the next product takes of it."""
    OUTPUT_TILE: gl.constexpr = grown.shape[0]
    layout: gl.constexpr = grown.type.layout
    output = first_output + gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))
    row = first_row + gl.arange(0, grown.shape[1], layout=gl.SliceLayout(0, layout))
    mask = (output < OUTPUTS)[:, None] & (row < rows)[None, :]
    at = row.to(gl.int64)[None, :] * OUTPUTS + output[:, None]
    gl.store(residual + at, grown, mask=mask)
    gl.store(
        normed + at, (grown * scale[:, None] * _HEADROOM).to(normed.dtype.element_ty), mask=mask
    )
    sums = gl.sum((grown * grown).reshape([OUTPUT_TILE // _BLOCK, _BLOCK, grown.shape[1]]), 1)
    its_block = gl.arange(0, OUTPUT_TILE // _BLOCK, layout=gl.SliceLayout(1, sums.type.layout))
    its_block = (first_output // _BLOCK + its_block)[:, None]
    row = first_row + gl.arange(0, grown.shape[1], layout=gl.SliceLayout(0, sums.type.layout))
    gl.store(
        squares + its_block * rows + row[None, :],
        sums,
        mask=(row < rows)[None, :] & (its_block * _BLOCK < OUTPUTS),
    )


@gluon.jit(do_not_specialize=["rows"])
def _fused_project_kernel(
    weight,  # [OUTPUTS, inputs], as a descriptor
    x,  # [rows, inputs], as a descriptor
    residual,  # [rows, OUTPUTS] float32
    norm_weight,  # [OUTPUTS]
    normed,  # [rows, OUTPUTS]
    squares,  # [blocks, rows] float32
    inboxes,  # addresses of RANKS inboxes; None if there is one rank
    rows,
    OUTPUTS: gl.constexpr,
    ROW_TILE: gl.constexpr,
    OUTPUT_TILE: gl.constexpr,
    INPUT_TILE: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    CLUSTER: gl.constexpr,
    OWN: gl.constexpr,
    RANKS: gl.constexpr,
):
    rank, block = gl.program_id(0) % CLUSTER, gl.program_id(0) // CLUSTER
    first_output, first_row, first_input = (
        block * OUTPUT_TILE,
        gl.program_id(1) * ROW_TILE,
        rank * (TILES * INPUT_TILE),
    )
    if CLUSTER > 1:
        room = open_exchange(cluster_sum_room(OUTPUT_TILE, ROW_TILE), 4 * OUTPUT_TILE * ROW_TILE)
    OWNED_ROWS: gl.constexpr = ROW_TILE // CLUSTER
    layout: gl.constexpr = gl.BlockedLayout([_BLOCK // 32, 1], [32, 1], [1, gl.num_warps()], [0, 1])
    output = first_output + gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))
    row = first_row + rank * OWNED_ROWS
    row = row + gl.arange(0, OWNED_ROWS, layout=gl.SliceLayout(0, layout))
    scale = gl.load(norm_weight + output, mask=output < OUTPUTS, other=0.0).to(gl.float32)
    share = _Share(
        weight,
        x,
        first_output=first_output,
        first_input=first_input,
        first_row=first_row,
        OUTPUT_TILE=OUTPUT_TILE,
        ROW_TILE=ROW_TILE,
        INPUT_TILE=INPUT_TILE,
        TILES=TILES,
        STAGES=STAGES,
    )
    started = share.start(CLUSTER)
    mask = (output < OUTPUTS)[:, None] & (row < rows)[None, :]
    at = row.to(gl.int64)[None, :] * OUTPUTS + output[:, None]
    grown = gl.load(residual + at, mask=mask, other=0.0)
    total = share.product(started)
    if CLUSTER > 1:
        term = cluster_sum(room, rank, total, layout, CLUSTER)
    else:
        term = gl.convert_layout(total, layout)
    if RANKS > 1:
        size = rows.to(gl.int64) * OUTPUTS
        term = sum_over_ranks(term, inboxes, at, mask, size, OWN, RANKS)
    grown += term
    write_residual(
        grown,
        scale,
        residual,
        normed,
        squares,
        first_output,
        first_row + rank * OWNED_ROWS,
        rows,
        OUTPUTS,
    )


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
    BLOCKS_TILE: gl.constexpr,
    EPS: gl.constexpr,
    ROW_TILE: gl.constexpr,
    HIDDEN_TILE: gl.constexpr,
    INPUT_TILE: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    first_output, first_row = gl.program_id(0) * HIDDEN_TILE, gl.program_id(1) * ROW_TILE
    share = _Share(
        weight,
        x,
        first_output=first_output,
        first_input=gl.to_tensor(0),
        first_row=first_row,
        OUTPUT_TILE=2 * HIDDEN_TILE,
        ROW_TILE=ROW_TILE,
        INPUT_TILE=INPUT_TILE,
        TILES=TILES,
        STAGES=STAGES,
    )
    total = _normed_product(share, squares, rows, WIDTH, BLOCKS, BLOCKS_TILE, EPS)
    pairs = total.reshape([2, HIDDEN_TILE, ROW_TILE]).permute((1, 2, 0))  # the halves innermost
    WARPS: gl.constexpr = gl.num_warps()
    pair_layout: gl.constexpr = gl.BlockedLayout(
        [1, ROW_TILE // WARPS, 2], [32, 1, 1], [1, WARPS, 1], [2, 1, 0]
    )
    gate, up = gl.convert_layout(pairs, pair_layout).split()
    hidden = gate / (1 + gl.exp(-gate)) * up
    layout: gl.constexpr = hidden.type.layout
    output = first_output + gl.arange(0, HIDDEN_TILE, layout=gl.SliceLayout(1, layout))[:, None]
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    mask = (row < rows) & (output < HIDDEN)
    gl.store(out + row.to(gl.int64) * HIDDEN + output, hidden.to(out.dtype.element_ty), mask=mask)


def fused_linear(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, tiles: FusedTiles, *, eps: float
) -> None:
    """Writes partial sums of norm(x) W^T.

    Args:
        x: [rows, width], 16-bit: residual * norm_weight * HEADROOM; width a multiple of 8.
        squares: float32 [blocks, rows]; their sum over the first dimension is that of the
            residual's squares.
        weight: [outputs, width], contiguous.
        out: float32 [tiles.splits, rows, outputs]; their sum over the first dimension is the
            product. Without splits it may be [rows, outputs].
    """
    rows, width = x.shape
    outputs = weight.shape[0]
    sums = out.view(-1, *out.shape[-2:])
    assert sums.shape == (tiles.splits, rows, outputs), (out.shape, tiles)
    row_block = row_tile(rows)
    grid = (triton.cdiv(outputs, tiles.outputs), tiles.splits, triton.cdiv(rows, row_block))
    _fused_linear_kernel[grid](
        descriptor(weight, tiles.outputs, tiles.inputs),
        descriptor(x, row_block, tiles.inputs),
        squares,
        out,
        rows,
        WIDTH=width,
        OUTPUTS=outputs,
        BLOCKS=squares.shape[0],
        BLOCKS_TILE=squares_tile(squares),
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
    norm_weight: Tensor,
    normed: Tensor,
    squares: Tensor,
    inboxes: Inboxes | None = None,
    *,
    tiles: FusedTiles,
) -> None:
    """Adds x W^T to the residual stream, and prepares the next product's input.

    Args:
        x: [rows, inputs], 16-bit; inputs a multiple of 8.
        weight: [width, inputs], contiguous.
        residual: float32 [rows, width], updated.
        norm_weight: [width], of the norm that follows.
        normed: [rows, width], written: residual * norm_weight * HEADROOM.
        squares: float32 [blocks of SQUARES_BLOCK outputs, rows], written: sums of the residual's
            squares.
        inboxes: by which ranks that share the model add up their products first, each of its part
            of the inputs.
    """
    rows, inputs = x.shape
    width = weight.shape[0]
    blocks, row_block = triton.cdiv(width, tiles.outputs), row_tile(rows)
    assert squares.shape == (triton.cdiv(width, SQUARES_BLOCK), rows), squares.shape
    assert tiles.outputs % SQUARES_BLOCK == 0, tiles
    # else two warps would hold, and send, the same sums
    assert tiles.outputs >= 16 * tiles.warps, tiles
    launch_clustered(
        _fused_project_kernel,
        (blocks, triton.cdiv(rows, row_block)),
        tiles.splits,
        project_exchange(tiles.outputs, row_block, tiles.splits),
        descriptor(weight, tiles.outputs, tiles.inputs),
        descriptor(x, row_block, tiles.inputs),
        residual,
        norm_weight,
        normed,
        squares,
        None if inboxes is None else inboxes.addresses,
        rows,
        OUTPUTS=width,
        ROW_TILE=row_block,
        OUTPUT_TILE=tiles.outputs,
        INPUT_TILE=tiles.inputs,
        TILES=tiles.tiles(inputs),
        STAGES=tiles.held(inputs, tiles.outputs, row_block, cluster=tiles.splits),
        CLUSTER=tiles.splits,
        OWN=0 if inboxes is None else inboxes.own,
        RANKS=1 if inboxes is None else inboxes.ranks,
        num_warps=tiles.warps,
        launch_pdl=True,
    )


def fused_swiglu(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, tiles: FusedTiles, *, eps: float
) -> None:
    """Writes silu(W1 norm(x)) * (W3 norm(x)).

    Args:
        x, squares: as of `fused_linear`.
        weight: [2 * hidden, width], contiguous, W1 above W3.
        out: [rows, hidden], written.
    """
    rows, width = x.shape
    hidden, row_block = weight.shape[0] // 2, row_tile(rows)
    assert tiles.splits == 1, tiles
    _fused_swiglu_kernel[(triton.cdiv(hidden, tiles.outputs), triton.cdiv(rows, row_block))](
        descriptor(weight.view(2, hidden, width), 2, tiles.outputs, tiles.inputs),
        descriptor(x, row_block, tiles.inputs),
        squares,
        out,
        rows,
        WIDTH=width,
        HIDDEN=hidden,
        BLOCKS=squares.shape[0],
        BLOCKS_TILE=squares_tile(squares),
        EPS=eps,
        ROW_TILE=row_block,
        HIDDEN_TILE=tiles.outputs,
        INPUT_TILE=tiles.inputs,
        TILES=tiles.tiles(width),
        STAGES=tiles.held(width, 2 * tiles.outputs, row_block, cluster=1),
        num_warps=tiles.warps,
        launch_pdl=True,
    )


def project_exchange(outputs: int, rows: int, cluster: int) -> int:
    """Shared memory that the cluster of `fused_project` takes to add up its tiles."""
    return 0 if cluster == 1 else exchange_bytes(cluster_sum_room(outputs, rows))


def descriptor(tensor: Tensor, *box: int) -> TensorDescriptor:
    """Describes a tensor for bulk copies of boxes of it. Elements outside the tensor are copied as
    zeros.
    """
    return TensorDescriptor.from_tensor(
        tensor, list(box), gl.NVMMASharedLayout.get_default_for(list(box), _DTYPES[tensor.dtype])
    )


def squares_tile(squares: Tensor) -> int:
    """The tile in which `row_scales` loads the sums of squares."""
    return max(32, triton.next_power_of_2(squares.shape[0]))
