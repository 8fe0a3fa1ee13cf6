"""Matrix products by weights of a byte on Hopper, with the norm, the gate and the residual in them.

They do what `kernels.hopper.products` does. Weights come into shared memory as they lie in memory,
and become numbers of x's dtype in registers, from where the matrix unit takes them. Bytes are
paired (`QuantizedMatrix.paired`): 16 bits hold element j of one half of a block of inputs and
element j of the other half. So a register that a thread loads as two 16-bit numbers is two pairs of
weights, in the places that the matrix unit expects of each half, and unpacking moves nothing
between threads. Values are exact in 16 bits, and sums are multiplied by the scale of their output.

A row's sums have one order whatever the tile is: the inputs are cut into as many parts as
`FusedTiles.splits` says, which are programs of their own. Many rows have kernels of their own,
`kernels.hopper.many_rows_quantized_products`, which keep that order.
"""

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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.hopper.cluster import (
    cluster_sum,
    cluster_sum_room,
    launch_clustered,
    meet,
    open_exchange,
)
from kernels.hopper.many_rows_products import stages_of
from kernels.hopper.products import (
    SHARED_MEMORY,
    SQUARES_BLOCK,
    FusedTiles,
    descriptor,
    project_exchange,
    row_scales,
    squares_tile,
    write_residual,
)
from kernels.linear import row_tile
from kernels.quantization import PAIRED_INPUTS, QuantizedMatrix

_BLOCK = gl.constexpr(SQUARES_BLOCK)
_INPUT_TILE = gl.constexpr(PAIRED_INPUTS)
_HALF = gl.constexpr(PAIRED_INPUTS // 2)
GATED_UNITS = 8  # hidden units whose gates lie above their ups in a tile
_GATED_UNITS = gl.constexpr(GATED_UNITS)


@aggregate
class _Stream:
    """What one program multiplies, tile after tile along its inputs: where it comes from, and the
    ring in shared memory through which it goes.
    """

    weight: tma.tensor_descriptor  # pairs [outputs, inputs / 2]; of the gated product in groups
    x: tma.tensor_descriptor  # [rows, inputs]
    first_output: gl.tensor  # in boxes' units: outputs, or groups of hidden units
    first_row: gl.tensor
    first_tile: gl.tensor  # along the inputs
    tiles: gl.tensor  # along the inputs
    weights: gl.shared_memory_descriptor  # [STAGES, the box of a tile], pairs
    values: gl.shared_memory_descriptor  # [2 * STAGES, ROW_TILE, HALF]
    arrived: gl.shared_memory_descriptor  # [STAGES, 1], a barrier each
    OUTPUT_TILE: gl.constexpr  # of the gated product, gates and ups together
    FP8: gl.constexpr  # else int8

    @gluon.constexpr_function
    def __init__(
        self,
        weight: Any,
        x: Any,
        first_output: Any,
        first_row: Any,
        first_tile: Any,
        tiles: Any,
        weights: Any,
        values: Any,
        arrived: Any,
        OUTPUT_TILE: int,
        FP8: bool,
    ) -> None:
        self.weight, self.x = weight, x
        self.first_output, self.first_row, self.first_tile = first_output, first_row, first_tile
        self.tiles = tiles
        self.weights, self.values, self.arrived = weights, values, arrived
        self.OUTPUT_TILE, self.FP8 = gl.constexpr(OUTPUT_TILE), gl.constexpr(FP8)

    @gluon.jit
    def start(self, CLUSTER: gl.constexpr):
        """Asks for the first tiles: for weights at once, for inputs after the wait. Before the wait
        the programs of a cluster meet.
        """
        STAGES: gl.constexpr = self.arrived.shape[0]
        for stage in gl.static_range(STAGES):
            mbarrier.init(self.arrived.index(stage), count=1)
        fence_async_shared()
        gdc_launch_dependents()
        for stage in gl.static_range(STAGES):
            self.copy_weights(stage, stage)
        if CLUSTER > 1:
            meet()
        gdc_wait()  # README, rules 1, 3 and 6: weights come before it, x after it
        for stage in gl.static_range(STAGES):
            self.copy_values(stage, stage)

    @gluon.jit
    def copy_weights(self, tile, stage):
        """Begins to copy a tile of weights. The barrier opens when one of inputs has come, too."""
        arrived, target = self.arrived.index(stage), self.weights.index(stage)
        ROW_TILE: gl.constexpr = self.values.shape[1]
        wanted = tile < self.tiles
        mbarrier.expect(arrived, (self.OUTPUT_TILE + 2 * ROW_TILE) * _INPUT_TILE, wanted)
        first_pair = (self.first_tile + tile) * _HALF
        if len(self.weight.block_shape) == 4:
            at = [self.first_output, 0, 0, first_pair]
            tma.async_copy_global_to_shared(self.weight, at, arrived, target, wanted)
        else:
            at = [self.first_output, first_pair]
            tma.async_copy_global_to_shared(self.weight, at, arrived, target, wanted)

    @gluon.jit
    def copy_values(self, tile, stage):
        """Begins to copy a tile of inputs, in halves."""
        first_input = (self.first_tile + tile) * _INPUT_TILE
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                self.x,
                [self.first_row, first_input + half * _HALF],
                self.arrived.index(stage),
                self.values.index(2 * stage + half),
                tile < self.tiles,
            )

    @gluon.jit
    def product(self):
        """Multiplies all tiles, and asks for later ones as room becomes free. Returns float32
        [OUTPUT_TILE, ROW_TILE].
        """
        STAGES: gl.constexpr = self.arrived.shape[0]
        ROW_TILE: gl.constexpr = self.values.shape[1]
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            [3, 0], [gl.num_warps(), 1], [16, ROW_TILE, 16]
        )
        total = warpgroup_mma_init(gl.zeros([self.OUTPUT_TILE, ROW_TILE], gl.float32, layout))
        for tile in range(0, self.tiles):
            stage = tile % STAGES
            mbarrier.wait(self.arrived.index(stage), (tile // STAGES) & 1)
            # The tile before has been used. Until then the matrix unit reads its weights from
            # registers, which nothing may write. (Half tiles with a product in flight beside them
            # would allow it, but the assembler then serialises all products.)
            total = warpgroup_mma_wait(0, deps=(total,))
            pairs = self.weights.index(stage).reshape([self.OUTPUT_TILE, _HALF])
            pairs = pairs.load(gl.DotOperandLayout(0, layout, 2))
            halves = unpacked(pairs, self.values.dtype, self.FP8)
            later = tile - 1 + STAGES
            if (tile > 0) & (later < self.tiles):
                gl.thread_barrier()  # by every warp
                self.copy_weights(later, later % STAGES)
                self.copy_values(later, later % STAGES)
            for half in gl.static_range(2):
                total = warpgroup_mma(
                    halves[half],
                    self.values.index(2 * stage + half).permute((1, 0)),
                    total,
                    is_async=True,
                )
        return warpgroup_mma_wait(0, deps=(total,))


@gluon.jit
def _stream(
    weight,
    x,
    first_output,
    first_row,
    first_tile,  # along the inputs
    TILES: gl.constexpr,  # along the inputs, of all programs
    MOST: gl.constexpr,  # of one program
    STAGES: gl.constexpr,
    OUTPUT_TILE: gl.constexpr,
    FP8: gl.constexpr,
):
    """The stream of a program, with its room in shared memory."""
    weights = gl.allocate_shared_memory(
        weight.dtype, stages_of(STAGES, weight.block_shape), weight.layout
    )
    values = gl.allocate_shared_memory(x.dtype, stages_of(2 * STAGES, x.block_shape), x.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    first_tile = gl.to_tensor(first_tile)
    return _Stream(
        weight,
        x,
        first_output,
        first_row,
        first_tile,
        gl.minimum(TILES - first_tile, MOST),
        weights,
        values,
        arrived,
        OUTPUT_TILE,
        FP8,
    )


@gluon.jit
def unpacked(pairs, dtype: gl.constexpr, FP8: gl.constexpr):
    """The low bytes and the high bytes of 16-bit integers, as numbers of a 16-bit dtype. A byte is
    e4m3 or int8.
    """
    return gl.inline_asm_elementwise(
        _unpacking(dtype, FP8), "=&r,=&r,r", [pairs], dtype=_both(dtype), is_pure=True, pack=2
    )


@gluon.constexpr_function
def _both(dtype: Any) -> tuple[Any, Any]:
    return dtype, dtype


@gluon.constexpr_function
def _unpacking(dtype: Any, fp8: bool) -> str:
    """The instructions of `unpacked`, for two integers at a time.

    To fp16, the hardware converts e4m3. To bf16 it would go by way of float32; but the bits of an
    e4m3 number are those of a bf16 number with a smaller exponent, once they have moved to its
    places: subnormal ones, too. A product by 2^120 does the rest. NaN becomes 480 there. The bits
    of an int8 number are the fraction of one between 1024 and 2048 in fp16, and between 128 and 256
    in bf16.
    """
    to_fp16 = dtype.name == "fp16"
    if fp8 and to_fp16:
        return """
        {
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
        }
        """
    if fp8:
        # a | b & c is 0xf8: in its table 0xf0 is a, 0xcc b, 0xaa c
        return """
        {
            .reg .b32 high, moved, sign, factor;
            mov.b32 factor, 0x7b807b80;
            shl.b32 high, $2, 8;
            shl.b32 moved, $2, 4;
            and.b32 sign, high, 0x80008000;
            lop3.b32 moved, sign, moved, 0x07f007f0, 0xf8;
            mul.bf16x2 $0, moved, factor;
            shr.b32 moved, $2, 4;
            and.b32 sign, $2, 0x80008000;
            lop3.b32 moved, sign, moved, 0x07f007f0, 0xf8;
            mul.bf16x2 $1, moved, factor;
        }
        """
    if to_fp16:  # 1024 + 128 + its value, less 1152
        return """
        {
            .reg .b32 shifted, sum, ones, offset;
            mov.b32 ones, 0x64646464;
            mov.b32 offset, 0x64806480;
            xor.b32 shifted, $2, 0x80808080;
            prmt.b32 sum, shifted, ones, 0x4240;
            sub.f16x2 $0, sum, offset;
            prmt.b32 sum, shifted, ones, 0x4341;
            sub.f16x2 $1, sum, offset;
        }
        """
    # 128 + its lower seven bits, less 128, or less 256 where it is negative
    return """
    {
        .reg .b32 high, sum, base, sign;
        mov.b32 base, 0x43004300;
        shr.b32 high, $2, 8;
        lop3.b32 sum, $2, 0x007f007f, base, 0xea;
        lop3.b32 sign, $2, 0x00800080, base, 0xea;
        sub.bf16x2 $0, sum, sign;
        lop3.b32 sum, high, 0x007f007f, base, 0xea;
        lop3.b32 sign, high, 0x00800080, base, 0xea;
        sub.bf16x2 $1, sum, sign;
    }
    """


@gluon.jit
def times(product, row_scale, output_scale):
    """A product [outputs, rows] times the scales of its rows and outputs. No compiler fuses it with
    an addition.
    """
    product, row_scale = gl.broadcast(product, row_scale[None, :])
    product, output_scale = gl.broadcast(product, output_scale[:, None])
    return gl.inline_asm_elementwise(
        "{ .reg .f32 scaled; mul.rn.f32 scaled, $1, $2; mul.rn.f32 $0, scaled, $3; }",
        "=f,f,f,f",
        [product, row_scale, output_scale],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit(do_not_specialize=["rows"])
def _quantized_linear_kernel(
    weight,  # pairs [OUTPUTS, WIDTH / 2], as a descriptor
    scales,  # [OUTPUTS] float32
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
    TILES: gl.constexpr,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
):
    first_row, first_output, split = (
        gl.program_id(0) * ROW_TILE,
        gl.program_id(1) * OUTPUT_TILE,
        gl.program_id(2),
    )
    stream = _stream(
        weight,
        x,
        first_output,
        first_row,
        split * PART,
        TILES,
        PART,
        STAGES,
        OUTPUT_TILE,
        FP8,
    )
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], [16, ROW_TILE, 16]
    )
    output = first_output + gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))
    output_scale = gl.load(scales + output, mask=output < OUTPUTS, other=0.0)
    stream.start(CLUSTER=1)
    row_scale = row_scales(squares, first_row, rows, ROW_TILE, WIDTH, BLOCKS, BLOCKS_TILE, EPS)
    row_scale = gl.convert_layout(row_scale, gl.SliceLayout(0, layout))
    total = times(stream.product(), row_scale, output_scale)
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(0, layout))
    at = (split * rows + row).to(gl.int64)[None, :] * OUTPUTS + output[:, None]
    gl.store(out + at, total, mask=(row < rows)[None, :] & (output < OUTPUTS)[:, None])


@gluon.jit(do_not_specialize=["rows"])
def _quantized_project_kernel(
    weight,  # pairs [OUTPUTS, inputs / 2], as a descriptor
    scales,  # [OUTPUTS] float32
    x,  # [rows, inputs], as a descriptor
    residual,  # [rows, OUTPUTS] float32
    norm_weight,  # [OUTPUTS]
    normed,  # [rows, OUTPUTS]
    squares,  # [blocks, rows] float32
    rows,
    OUTPUTS: gl.constexpr,
    ROW_TILE: gl.constexpr,
    OUTPUT_TILE: gl.constexpr,
    TILES: gl.constexpr,
    PART: gl.constexpr,
    STAGES: gl.constexpr,
    CLUSTER: gl.constexpr,
    FP8: gl.constexpr,
):
    rank, first_row = gl.program_id(0) % CLUSTER, gl.program_id(0) // CLUSTER * ROW_TILE
    first_output = gl.program_id(1) * OUTPUT_TILE
    if CLUSTER > 1:
        room = open_exchange(cluster_sum_room(OUTPUT_TILE, ROW_TILE), 4 * OUTPUT_TILE * ROW_TILE)
    OWNED_ROWS: gl.constexpr = ROW_TILE // CLUSTER
    layout: gl.constexpr = gl.BlockedLayout([_BLOCK // 32, 1], [32, 1], [1, gl.num_warps()], [0, 1])
    output = first_output + gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))
    row = first_row + rank * OWNED_ROWS
    row = row + gl.arange(0, OWNED_ROWS, layout=gl.SliceLayout(0, layout))
    norm_scale = gl.load(norm_weight + output, mask=output < OUTPUTS, other=0.0).to(gl.float32)
    scale = gl.load(scales + output, mask=output < OUTPUTS, other=0.0)
    stream = _stream(
        weight,
        x,
        first_output,
        first_row,
        rank * PART,
        TILES,
        PART,
        STAGES,
        OUTPUT_TILE,
        FP8,
    )
    stream.start(CLUSTER)
    mask = (output < OUTPUTS)[:, None] & (row < rows)[None, :]
    at = row.to(gl.int64)[None, :] * OUTPUTS + output[:, None]
    grown = gl.load(residual + at, mask=mask, other=0.0)
    total = stream.product()
    if CLUSTER > 1:
        total = cluster_sum(room, rank, total, layout, CLUSTER)
    else:
        total = gl.convert_layout(total, layout)
    write_residual(
        gl.fma(total, scale[:, None] + gl.zeros_like(total), grown),
        norm_scale,
        residual,
        normed,
        squares,
        first_output,
        first_row + rank * OWNED_ROWS,
        rows,
        OUTPUTS,
    )


@gluon.jit(do_not_specialize=["rows"])
def _quantized_swiglu_kernel(
    weight,  # pairs [HIDDEN / GATED_UNITS, 2, GATED_UNITS, WIDTH / 2], as a descriptor
    scales,  # [2, HIDDEN] float32
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
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
):
    OUTPUT_TILE: gl.constexpr = 2 * HIDDEN_TILE
    GROUPS: gl.constexpr = HIDDEN_TILE // _GATED_UNITS
    first_row, block = gl.program_id(0) * ROW_TILE, gl.program_id(1)
    stream = _stream(
        weight, x, block * GROUPS, first_row, 0, TILES, TILES, STAGES, OUTPUT_TILE, FP8
    )
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], [16, ROW_TILE, 16]
    )
    # A tile's outputs are eight gates, the ups of the same hidden units, the next eight gates ...
    place = gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))
    unit = block * HIDDEN_TILE + place // (2 * _GATED_UNITS) * _GATED_UNITS + place % _GATED_UNITS
    scale_at = place // _GATED_UNITS % 2 * HIDDEN + unit
    output_scale = gl.load(scales + scale_at, mask=unit < HIDDEN, other=0.0)
    stream.start(CLUSTER=1)
    row_scale = row_scales(squares, first_row, rows, ROW_TILE, WIDTH, BLOCKS, BLOCKS_TILE, EPS)
    row_scale = gl.convert_layout(row_scale, gl.SliceLayout(0, layout))
    total = times(stream.product(), row_scale, output_scale)
    write_gated(total, out, block * HIDDEN_TILE, first_row, rows, HIDDEN)


@gluon.jit
def write_gated(total, out, first_unit, first_row, rows, HIDDEN: gl.constexpr):
    """Writes silu(gate) * up of hidden units, whose gates and ups lie in groups above each other.

    Args:
        total: [2 * units, ROW_TILE]
        out: [rows, HIDDEN]
    """
    HIDDEN_TILE: gl.constexpr = total.shape[0] // 2
    ROW_TILE: gl.constexpr = total.shape[1]
    GROUPS: gl.constexpr = HIDDEN_TILE // _GATED_UNITS
    pairs = total.reshape([GROUPS, 2, _GATED_UNITS, ROW_TILE]).permute((0, 2, 3, 1))
    gate, up = gl.split(pairs)
    hidden = (gate / (1 + gl.exp(-gate)) * up).to(out.dtype.element_ty)
    layout: gl.constexpr = gl.BlockedLayout(
        [2, 1], [HIDDEN_TILE // 2, 64 // HIDDEN_TILE], [1, gl.num_warps()], [0, 1]
    )
    hidden = gl.convert_layout(hidden.reshape([HIDDEN_TILE, ROW_TILE]), layout)
    unit = first_unit + gl.arange(0, HIDDEN_TILE, layout=gl.SliceLayout(1, layout))
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(0, layout))
    at = row.to(gl.int64)[None, :] * HIDDEN + unit[:, None]
    gl.store(out + at, hidden, mask=(row < rows)[None, :] & (unit < HIDDEN)[:, None])


def quantized_linear(
    x: Tensor,
    squares: Tensor,
    weight: QuantizedMatrix,
    out: Tensor,
    tiles: FusedTiles,
    *,
    eps: float,
) -> None:
    """Writes partial sums of norm(x) W^T; see `kernels.hopper.products.fused_linear`.

    Args:
        weight: fp8 or int8, paired.
        out: float32 [tiles.splits, rows, outputs].
    """
    rows, width = x.shape
    outputs = weight.shape[0]
    sums = out.view(-1, *out.shape[-2:])
    assert sums.shape == (tiles.splits, rows, outputs), (out.shape, tiles)
    row_block, part = row_tile(rows), tiles.tiles(width)
    grid = (triton.cdiv(rows, row_block), triton.cdiv(outputs, tiles.outputs), tiles.splits)
    _quantized_linear_kernel[grid](
        pairs_descriptor(weight.values, tiles.outputs),
        weight.scales,
        descriptor(x, row_block, PAIRED_INPUTS // 2),
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
        TILES=triton.cdiv(width, PAIRED_INPUTS),
        PART=part,
        STAGES=stage_count(tiles, part, row_block),
        FP8=weight.scheme == "fp8",
        num_warps=tiles.warps,
        launch_pdl=True,
    )


def quantized_project(
    x: Tensor,
    weight: QuantizedMatrix,
    residual: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    squares: Tensor,
    tiles: FusedTiles,
) -> None:
    """Adds x W^T to the residual stream, and prepares the next product's input; see
    `kernels.hopper.products.fused_project`.

    Args:
        weight: fp8 or int8, paired.
    """
    rows, inputs = x.shape
    width = weight.shape[0]
    assert squares.shape == (triton.cdiv(width, SQUARES_BLOCK), rows), squares.shape
    assert tiles.outputs % SQUARES_BLOCK == 0, tiles
    # else two warps would hold, and send, the same sums
    assert tiles.outputs >= 16 * tiles.warps, tiles
    row_block, part = row_tile(rows), tiles.tiles(inputs)
    exchanged = project_exchange(tiles.outputs, row_block, tiles.splits)
    launch_clustered(
        _quantized_project_kernel,
        (triton.cdiv(rows, row_block), triton.cdiv(width, tiles.outputs)),
        tiles.splits,
        exchanged,
        pairs_descriptor(weight.values, tiles.outputs),
        weight.scales,
        descriptor(x, row_block, PAIRED_INPUTS // 2),
        residual,
        norm_weight,
        normed,
        squares,
        rows,
        OUTPUTS=width,
        ROW_TILE=row_block,
        OUTPUT_TILE=tiles.outputs,
        TILES=triton.cdiv(inputs, PAIRED_INPUTS),
        PART=part,
        STAGES=stage_count(tiles, part, row_block, exchanged),
        CLUSTER=tiles.splits,
        FP8=weight.scheme == "fp8",
        num_warps=tiles.warps,
        launch_pdl=True,
    )


def quantized_swiglu(
    x: Tensor,
    squares: Tensor,
    weight: QuantizedMatrix,
    out: Tensor,
    tiles: FusedTiles,
    *,
    eps: float,
) -> None:
    """Writes silu(W1 norm(x)) * (W3 norm(x)); see `kernels.hopper.products.fused_swiglu`.

    Args:
        weight: fp8 or int8, paired.
    """
    rows, width = x.shape
    hidden = weight.shape[0] // 2
    assert tiles.splits == 1 and hidden % GATED_UNITS == 0, (hidden, tiles)
    row_block, count = row_tile(rows), triton.cdiv(width, PAIRED_INPUTS)
    grid = (triton.cdiv(rows, row_block), triton.cdiv(hidden, tiles.outputs))
    groups = weight.values.view(2, hidden // GATED_UNITS, GATED_UNITS, width).transpose(0, 1)
    _quantized_swiglu_kernel[grid](
        pairs_descriptor(groups, tiles.outputs // GATED_UNITS, 2, GATED_UNITS),
        weight.scales,
        descriptor(x, row_block, PAIRED_INPUTS // 2),
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
        TILES=count,
        STAGES=stage_count(tiles, count, row_block, halves=2),
        FP8=weight.scheme == "fp8",
        num_warps=tiles.warps,
        launch_pdl=True,
    )


def pairs_descriptor(values: Tensor, *box: int) -> TensorDescriptor:
    """Describes bytes for bulk copies of boxes of them, as pairs.

    Args:
        box: of all dimensions but the last, which is half of `PAIRED_INPUTS`.
    """
    whole = [*box, PAIRED_INPUTS // 2]
    layout = gl.NVMMASharedLayout.get_default_for(whole, gl.int16)
    return TensorDescriptor.from_tensor(values.view(torch.int16), whole, layout)


def stage_count(
    tiles: FusedTiles, most: int, row_block: int, exchanged: int = 0, halves: int = 1
) -> int:
    """Tiles that shared memory holds at once.

    Args:
        most: tiles of a program.
        exchanged: bytes of shared memory that the cluster takes.
        halves: 2 for the gated product, a program of which has gates and ups.
    """
    assert tiles.inputs == PAIRED_INPUTS, tiles
    tile_bytes = (halves * tiles.outputs + 2 * row_block) * PAIRED_INPUTS
    stages = min(tiles.stages, most, (SHARED_MEMORY - exchanged) // tile_bytes)
    # a tile is asked for when the one behind it is used
    assert stages >= min(2, most), (tiles, row_block)
    return stages
