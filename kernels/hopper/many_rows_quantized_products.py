"""Matrix products of many rows by weights of a byte on Hopper.

They do what `kernels.hopper.quantized_products` does, and every sum has the same order, so a row's
result does not depend on which of them computed it. A program's tile is large, as those of
`kernels.hopper.many_rows_products` are, and its warps are three groups. One asks for tiles. Two
multiply half of the outputs each: while one unpacks its weights, the matrix unit works for the
other.
"""

from typing import Any

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
from triton.language.core import _aggregate as aggregate
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.hopper.many_rows_products import row_scales_of_many, stages_of
from kernels.hopper.products import (
    MULTIPROCESSORS,
    SHARED_MEMORY,
    SQUARES_BLOCK,
    FusedTiles,
    descriptor,
    squares_tile,
    write_residual,
)
from kernels.hopper.quantized_products import (
    GATED_UNITS,
    pairs_descriptor,
    times,
    unpacked,
    write_gated,
)
from kernels.quantization import PAIRED_INPUTS, QuantizedMatrix

_BLOCK = gl.constexpr(SQUARES_BLOCK)
_INPUT_TILE = gl.constexpr(PAIRED_INPUTS)
_HALF = gl.constexpr(PAIRED_INPUTS // 2)
_GATED_UNITS = gl.constexpr(GATED_UNITS)
_MOST_STAGES = 4
_OTHER_MEMORY = (
    34 * 1024
)  # bytes of shared memory, a reserve beside the ring; 17 KB are taken at most
# Of a thread. The launch gives each one 168, and the group that copies passes on what it does not
# need.
_MULTIPLYING_REGISTERS, _COPYING_REGISTERS = gl.constexpr(224), gl.constexpr(56)


@aggregate
class _Stream:
    """What one program multiplies, tile after tile along its inputs: where it comes from, and the
    ring in shared memory through which it goes.
    """

    weight: tma.tensor_descriptor  # pairs [outputs, inputs / 2]; of the gated product in groups
    x: tma.tensor_descriptor  # [rows, inputs]
    first_output: gl.tensor  # in boxes' units: outputs, or groups of hidden units
    first_row: gl.tensor
    weights: gl.shared_memory_descriptor  # [2 * STAGES, the box of a group], pairs
    values: gl.shared_memory_descriptor  # [2 * STAGES, ROW_TILE, HALF]
    arrived: gl.shared_memory_descriptor  # [STAGES, 1], a barrier each
    used: gl.shared_memory_descriptor  # [STAGES, 1], a barrier each, by both groups
    TILES: gl.constexpr  # along the inputs
    OUTPUTS: gl.constexpr  # of a group; of the gated product, gates and ups together
    FP8: gl.constexpr  # else int8

    @gluon.constexpr_function
    def __init__(
        self,
        weight: Any,
        x: Any,
        first_output: Any,
        first_row: Any,
        weights: Any,
        values: Any,
        arrived: Any,
        used: Any,
        TILES: int,
        OUTPUTS: int,
        FP8: bool,
    ) -> None:
        self.weight, self.x = weight, x
        self.first_output, self.first_row = first_output, first_row
        self.weights, self.values = weights, values
        self.arrived, self.used = arrived, used
        self.TILES = gl.constexpr(TILES)
        self.OUTPUTS, self.FP8 = gl.constexpr(OUTPUTS), gl.constexpr(FP8)

    @gluon.jit
    def start(self):
        """Asks for the first tiles of weights. `start_values` asks for those of inputs."""
        STAGES: gl.constexpr = self.arrived.shape[0]
        for stage in gl.static_range(STAGES):
            mbarrier.init(self.arrived.index(stage), count=1)
            mbarrier.init(self.used.index(stage), count=2)
        fence_async_shared()
        for stage in gl.static_range(STAGES):
            self.copy_weights(stage, stage)

    @gluon.jit
    def start_values(self):
        """Asks for the first tiles of inputs."""
        STAGES: gl.constexpr = self.arrived.shape[0]
        for stage in gl.static_range(STAGES):
            self.copy_values(stage, stage)

    @gluon.jit
    def copy_weights(self, tile, stage):
        """Begins to copy a tile of weights. The barrier opens when one of inputs has come, too."""
        arrived = self.arrived.index(stage)
        ROW_TILE: gl.constexpr = self.values.shape[1]
        mbarrier.expect(arrived, 2 * (self.OUTPUTS + ROW_TILE) * _INPUT_TILE)
        first_pair = tile * _HALF
        for group in gl.static_range(2):
            target = self.weights.index(2 * stage + group)
            first = self.first_output + group * self.weight.block_shape[0]
            if len(self.weight.block_shape) == 4:
                at = [first, 0, 0, first_pair]
                tma.async_copy_global_to_shared(self.weight, at, arrived, target)
            else:
                at = [first, first_pair]
                tma.async_copy_global_to_shared(self.weight, at, arrived, target)

    @gluon.jit
    def copy_values(self, tile, stage):
        """Begins to copy a tile of inputs, in halves."""
        first_input = tile * _INPUT_TILE
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                self.x,
                [self.first_row, first_input + half * _HALF],
                self.arrived.index(stage),
                self.values.index(2 * stage + half),
            )

    @gluon.jit
    def refill(self, tile):
        """Asks for a tile as soon as both groups have used the one in its place."""
        STAGES: gl.constexpr = self.arrived.shape[0]
        stage = tile % STAGES
        mbarrier.wait(self.used.index(stage), (tile // STAGES - 1) & 1)
        self.copy_weights(tile, stage)
        self.copy_values(tile, stage)

    @gluon.jit
    def part(self, group: gl.constexpr, first, end):
        """Multiplies the tiles from `first` to before `end`, from zero. Returns float32 [OUTPUTS,
        ROW_TILE].

        Args:
            group: of warps, 0 or 1, which calls it.
        """
        STAGES: gl.constexpr = self.arrived.shape[0]
        ROW_TILE: gl.constexpr = self.values.shape[1]
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            [3, 0], [gl.num_warps(), 1], [16, ROW_TILE, 16]
        )
        total = gl.zeros([self.OUTPUTS, ROW_TILE], gl.float32, layout)
        for tile in range(first, gl.minimum(end, self.TILES)):
            stage = tile % STAGES
            mbarrier.wait(self.arrived.index(stage), (tile // STAGES) & 1)
            pairs = self.weights.index(2 * stage + group).reshape([self.OUTPUTS, _HALF])
            pairs = pairs.load(gl.DotOperandLayout(0, layout, 2))
            halves = unpacked(pairs, self.values.dtype, self.FP8)
            for half in gl.static_range(2):
                total = warpgroup_mma(
                    halves[half],
                    self.values.index(2 * stage + half).permute((1, 0)),
                    total,
                    is_async=True,
                )
            total = warpgroup_mma_wait(0, deps=(total,))
            gl.thread_barrier()  # every warp of the group has used the tile
            mbarrier.arrive(self.used.index(stage))
        return total


@aggregate
class _Norm:
    """What a product of rows that are not yet normed is multiplied by, which warps that do not
    multiply find.
    """

    squares: gl.tensor  # [BLOCKS, rows] float32
    rows: gl.tensor
    scales: gl.shared_memory_descriptor  # [ROW_TILE] float32
    found: gl.shared_memory_descriptor  # [1], a barrier
    WIDTH: gl.constexpr
    BLOCKS: gl.constexpr
    BLOCKS_TILE: gl.constexpr
    EPS: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        squares: Any,
        rows: Any,
        scales: Any,
        found: Any,
        WIDTH: int,
        BLOCKS: int,
        BLOCKS_TILE: int,
        EPS: float,
    ) -> None:
        self.squares, self.rows, self.scales, self.found = squares, rows, scales, found
        self.WIDTH, self.BLOCKS = gl.constexpr(WIDTH), gl.constexpr(BLOCKS)
        self.BLOCKS_TILE, self.EPS = gl.constexpr(BLOCKS_TILE), gl.constexpr(EPS)

    @gluon.jit
    def find(self, first_row):
        """Writes the scales."""
        ROW_TILE: gl.constexpr = self.scales.shape[0]
        scales = row_scales_of_many(
            self.squares,
            first_row,
            self.rows,
            ROW_TILE,
            self.WIDTH,
            self.BLOCKS,
            self.BLOCKS_TILE,
            self.EPS,
        )
        self.scales.store(scales)
        gl.thread_barrier()  # by every warp
        mbarrier.arrive(self.found)

    @gluon.jit
    def wait(self, layout: gl.constexpr):
        """Returns the scales, once they are found."""
        mbarrier.wait(self.found, 0)
        return self.scales.load(layout)


@gluon.jit
def _norm(
    squares,
    rows,
    ROW_TILE: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCKS_TILE: gl.constexpr,
    EPS: gl.constexpr,
):
    """A norm, with its room in shared memory."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = gl.allocate_shared_memory(gl.float32, [ROW_TILE], flat)
    found = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(found, count=1)
    return _Norm(squares, rows, scales, found, WIDTH, BLOCKS, BLOCKS_TILE, EPS)


@gluon.jit
def _stream(
    weight,
    x,
    first_output,
    first_row,
    TILES: gl.constexpr,  # along the inputs
    STAGES: gl.constexpr,
    OUTPUTS: gl.constexpr,
    FP8: gl.constexpr,
):
    """The stream of a program, with its room in shared memory."""
    weights = gl.allocate_shared_memory(
        weight.dtype, stages_of(2 * STAGES, weight.block_shape), weight.layout
    )
    values = gl.allocate_shared_memory(x.dtype, stages_of(2 * STAGES, x.block_shape), x.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    return _Stream(
        weight,
        x,
        first_output,
        first_row,
        weights,
        values,
        arrived,
        used,
        TILES,
        OUTPUTS,
        FP8,
    )


@gluon.jit
def _copy_tiles(stream):
    """Asks for the tiles after the first ones."""
    STAGES: gl.constexpr = stream.arrived.shape[0]
    for tile in range(STAGES, stream.TILES):
        stream.refill(tile)


@gluon.jit
def _norm_and_copy_tiles(stream, norm):
    """Finds the scales of the rows, then asks for the tiles after the first ones."""
    norm.find(stream.first_row)
    _copy_tiles(stream)


@gluon.jit(do_not_specialize=["rows"])
def _many_rows_quantized_linear_kernel(
    weight,  # pairs [OUTPUTS, WIDTH / 2], as a descriptor
    scales,  # [OUTPUTS] float32
    x,  # [rows, WIDTH], as a descriptor
    squares,  # [BLOCKS, rows] float32
    out,  # [rows, OUTPUTS] float32
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
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
):
    first_row, first_output = gl.program_id(0) * ROW_TILE, gl.program_id(1) * OUTPUT_TILE
    stream = _stream(weight, x, first_output, first_row, TILES, STAGES, OUTPUT_TILE // 2, FP8)
    norm = _norm(squares, rows, ROW_TILE, WIDTH, BLOCKS, BLOCKS_TILE, EPS)
    gdc_launch_dependents()
    stream.start()
    # README, rules 1, 3 and 4: weights come before it, x after it, and the other warps start
    # behind it
    gdc_wait()
    stream.start_values()
    cut: gl.constexpr = (OUTPUTS, PART, PARTS)
    gl.warp_specialize(
        [
            (_linear_group, (stream, norm, scales, out, gl.constexpr(0), cut)),
            (_linear_group, (stream, norm, scales, out, gl.constexpr(1), cut)),
            (_norm_and_copy_tiles, (stream, norm)),
        ],
        [4, 4],
        [_MULTIPLYING_REGISTERS, _COPYING_REGISTERS],
    )


@gluon.jit
def _linear_group(stream, norm, scales, out, group: gl.constexpr, cut: gl.constexpr):
    """One group's half of `_many_rows_quantized_linear_kernel`."""
    OUTPUTS: gl.constexpr = cut[0]
    PART: gl.constexpr = cut[1]
    PARTS: gl.constexpr = cut[2]
    ROW_TILE: gl.constexpr = stream.values.shape[1]
    rows = norm.rows
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], [16, ROW_TILE, 16]
    )
    output = stream.first_output + group * stream.OUTPUTS
    output = output + gl.arange(0, stream.OUTPUTS, layout=gl.SliceLayout(1, layout))
    output_scale = gl.load(scales + output, mask=output < OUTPUTS, other=0.0)
    total = stream.part(group, 0, PART)
    total = times(total, norm.wait(gl.SliceLayout(0, layout)), output_scale)
    # Unrolled, the qkv product of GPT-XL's 512 rows took 18.5 us, where this loop takes 14.
    for part in range(1, PARTS):
        its_total = stream.part(group, part * PART, (part + 1) * PART)
        total += times(its_total, norm.wait(gl.SliceLayout(0, layout)), output_scale)
    row = stream.first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(0, layout))
    at = row.to(gl.int64)[None, :] * OUTPUTS + output[:, None]
    gl.store(out + at, total, mask=(row < rows)[None, :] & (output < OUTPUTS)[:, None])


@gluon.jit(do_not_specialize=["rows"])
def _many_rows_quantized_project_kernel(
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
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
):
    first_row, first_output = gl.program_id(0) * ROW_TILE, gl.program_id(1) * OUTPUT_TILE
    stream = _stream(weight, x, first_output, first_row, TILES, STAGES, OUTPUT_TILE // 2, FP8)
    gdc_launch_dependents()
    stream.start()
    # README, rules 1, 3 and 4: weights come before it, x after it, and the other warps start
    # behind it
    gdc_wait()
    stream.start_values()
    written = (residual, norm_weight, normed, squares, scales, rows)
    cut: gl.constexpr = (OUTPUTS, PART, PARTS)
    gl.warp_specialize(
        [
            (_project_group, (stream, written, gl.constexpr(0), cut)),
            (_project_group, (stream, written, gl.constexpr(1), cut)),
            (_copy_tiles, (stream,)),
        ],
        [4, 4],
        [_MULTIPLYING_REGISTERS, _COPYING_REGISTERS],
    )


@gluon.jit
def _project_group(stream, written, group: gl.constexpr, cut: gl.constexpr):
    """A group's outputs of `_many_rows_quantized_project_kernel`."""
    residual, norm_weight, normed, squares, scales, rows = written
    OUTPUTS: gl.constexpr = cut[0]
    PART: gl.constexpr = cut[1]
    PARTS: gl.constexpr = cut[2]
    ROW_TILE: gl.constexpr = stream.values.shape[1]
    total = stream.part(group, 0, PART)
    if PARTS > 1:
        total += stream.part(group, PART, 2 * PART)
    if PARTS == 4:  # as a cluster adds up what its programs have
        third = stream.part(group, 2 * PART, 3 * PART)
        total += third + stream.part(group, 3 * PART, 4 * PART)
    layout: gl.constexpr = gl.BlockedLayout([_BLOCK // 32, 1], [32, 1], [1, gl.num_warps()], [0, 1])
    first_output = stream.first_output + group * stream.OUTPUTS
    output = first_output + gl.arange(0, stream.OUTPUTS, layout=gl.SliceLayout(1, layout))
    row = stream.first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(0, layout))
    mask = (output < OUTPUTS)[:, None] & (row < rows)[None, :]
    at = row.to(gl.int64)[None, :] * OUTPUTS + output[:, None]
    grown = gl.load(residual + at, mask=mask, other=0.0)
    norm_scale = gl.load(norm_weight + output, mask=output < OUTPUTS, other=0.0).to(gl.float32)
    scale = gl.load(scales + output, mask=output < OUTPUTS, other=0.0)
    total = gl.convert_layout(total, layout)
    write_residual(
        gl.fma(total, scale[:, None] + gl.zeros_like(total), grown),
        norm_scale,
        residual,
        normed,
        squares,
        first_output,
        stream.first_row,
        rows,
        OUTPUTS,
    )


@gluon.jit(do_not_specialize=["rows"])
def _many_rows_quantized_swiglu_kernel(
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
    OUTPUT_TILE: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
):
    first_row, block = gl.program_id(0) * ROW_TILE, gl.program_id(1)
    first_group = block * (OUTPUT_TILE // (2 * _GATED_UNITS))
    stream = _stream(weight, x, first_group, first_row, TILES, STAGES, OUTPUT_TILE // 2, FP8)
    norm = _norm(squares, rows, ROW_TILE, WIDTH, BLOCKS, BLOCKS_TILE, EPS)
    gdc_launch_dependents()
    stream.start()
    # README, rules 1, 3 and 4: weights come before it, x after it, and the other warps start
    # behind it
    gdc_wait()
    stream.start_values()
    gl.warp_specialize(
        [
            (_swiglu_group, (stream, norm, scales, out, gl.constexpr(0), gl.constexpr(HIDDEN))),
            (_swiglu_group, (stream, norm, scales, out, gl.constexpr(1), gl.constexpr(HIDDEN))),
            (_norm_and_copy_tiles, (stream, norm)),
        ],
        [4, 4],
        [_MULTIPLYING_REGISTERS, _COPYING_REGISTERS],
    )


@gluon.jit
def _swiglu_group(stream, norm, scales, out, group: gl.constexpr, HIDDEN: gl.constexpr):
    """One group's half of `_many_rows_quantized_swiglu_kernel`."""
    ROW_TILE: gl.constexpr = stream.values.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [gl.num_warps(), 1], [16, ROW_TILE, 16]
    )
    # A tile's outputs are eight gates, the ups of the same hidden units, the next eight gates ...
    first_unit = stream.first_output * _GATED_UNITS + group * (stream.OUTPUTS // 2)
    place = gl.arange(0, stream.OUTPUTS, layout=gl.SliceLayout(1, layout))
    unit = first_unit + place // (2 * _GATED_UNITS) * _GATED_UNITS + place % _GATED_UNITS
    scale_at = place // _GATED_UNITS % 2 * HIDDEN + unit
    output_scale = gl.load(scales + scale_at, mask=unit < HIDDEN, other=0.0)
    total = stream.part(group, 0, stream.TILES)
    total = times(total, norm.wait(gl.SliceLayout(0, layout)), output_scale)
    write_gated(total, out, first_unit, stream.first_row, norm.rows, HIDDEN)


def many_rows_quantized_linear(
    x: Tensor,
    squares: Tensor,
    weight: QuantizedMatrix,
    out: Tensor,
    tiles: FusedTiles,
    *,
    eps: float,
) -> None:
    """Writes norm(x) W^T: the sum of what `quantized_linear` writes in parts.

    Args:
        x, squares, weight: as of `quantized_linear`.
        out: float32 [..., rows, outputs], written; dimensions before rows have size 1.
        tiles: of `quantized_linear`, whose order of sums is kept.
    """
    rows, width = x.shape
    outputs = weight.shape[0]
    assert tiles.inputs == PAIRED_INPUTS and out.numel() == rows * outputs, (tiles, out.shape)
    row_tile, output_tile = _tile(rows, outputs, most=128)  # registers hold two parts of them
    count = triton.cdiv(width, PAIRED_INPUTS)
    _many_rows_quantized_linear_kernel[
        (triton.cdiv(rows, row_tile), triton.cdiv(outputs, output_tile))
    ](
        pairs_descriptor(weight.values, output_tile // 2),
        weight.scales,
        descriptor(x, row_tile, PAIRED_INPUTS // 2),
        squares,
        out,
        rows,
        WIDTH=width,
        OUTPUTS=outputs,
        BLOCKS=squares.shape[0],
        BLOCKS_TILE=squares_tile(squares),
        EPS=eps,
        ROW_TILE=row_tile,
        OUTPUT_TILE=output_tile,
        TILES=count,
        PART=tiles.tiles(width),
        PARTS=tiles.splits,
        STAGES=_stage_count(count, row_tile, output_tile),
        FP8=weight.scheme == "fp8",
        num_warps=4,
        launch_pdl=True,
    )


def many_rows_quantized_project(
    x: Tensor,
    weight: QuantizedMatrix,
    residual: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    squares: Tensor,
    tiles: FusedTiles,
) -> None:
    """Does the same as `quantized_project`, whose `tiles` it takes to keep the order of sums."""
    rows, inputs = x.shape
    width = weight.shape[0]
    assert squares.shape == (triton.cdiv(width, SQUARES_BLOCK), rows), squares.shape
    assert tiles.inputs == PAIRED_INPUTS and tiles.splits in (1, 2, 4), tiles
    row_tile, output_tile = 64, 128  # a group's registers do not hold the parts of more
    count = triton.cdiv(inputs, PAIRED_INPUTS)
    _many_rows_quantized_project_kernel[
        (triton.cdiv(rows, row_tile), triton.cdiv(width, output_tile))
    ](
        pairs_descriptor(weight.values, output_tile // 2),
        weight.scales,
        descriptor(x, row_tile, PAIRED_INPUTS // 2),
        residual,
        norm_weight,
        normed,
        squares,
        rows,
        OUTPUTS=width,
        ROW_TILE=row_tile,
        OUTPUT_TILE=output_tile,
        TILES=count,
        PART=tiles.tiles(inputs),
        PARTS=tiles.splits,
        STAGES=_stage_count(count, row_tile, output_tile),
        FP8=weight.scheme == "fp8",
        num_warps=4,
        launch_pdl=True,
    )


def many_rows_quantized_swiglu(
    x: Tensor,
    squares: Tensor,
    weight: QuantizedMatrix,
    out: Tensor,
    tiles: FusedTiles,
    *,
    eps: float,
) -> None:
    """Does the same as `quantized_swiglu`, whose `tiles` have one program along the inputs."""
    rows, width = x.shape
    hidden = weight.shape[0] // 2
    assert tiles.splits == 1 and hidden % GATED_UNITS == 0, (hidden, tiles)
    row_tile, output_tile = _tile(rows, 2 * hidden, most=256)
    count = triton.cdiv(width, PAIRED_INPUTS)
    groups = weight.values.view(2, hidden // GATED_UNITS, GATED_UNITS, width).transpose(0, 1)
    _many_rows_quantized_swiglu_kernel[
        (triton.cdiv(rows, row_tile), triton.cdiv(2 * hidden, output_tile))
    ](
        pairs_descriptor(groups, output_tile // (4 * GATED_UNITS), 2, GATED_UNITS),
        weight.scales,
        descriptor(x, row_tile, PAIRED_INPUTS // 2),
        squares,
        out,
        rows,
        WIDTH=width,
        HIDDEN=hidden,
        BLOCKS=squares.shape[0],
        BLOCKS_TILE=squares_tile(squares),
        EPS=eps,
        ROW_TILE=row_tile,
        OUTPUT_TILE=output_tile,
        TILES=count,
        STAGES=_stage_count(count, row_tile, output_tile),
        FP8=weight.scheme == "fp8",
        num_warps=4,
        launch_pdl=True,
    )


def _tile(rows: int, outputs: int, most: int) -> tuple[int, int]:
    """Rows and outputs of a program: as many as leave little of the GPU idle.

    Args:
        most: outputs that a program may have.
    """
    for row_tile, output_tile in ((128, 256), (128, 128)):
        programs = triton.cdiv(rows, row_tile) * triton.cdiv(outputs, output_tile)
        if output_tile <= most and programs >= 0.6 * MULTIPROCESSORS:
            return row_tile, output_tile
    return 64, 128


def _stage_count(tiles: int, row_tile: int, output_tile: int) -> int:
    """Tiles that shared memory holds at once, of those along the inputs."""
    tile_bytes = (output_tile + 2 * row_tile) * PAIRED_INPUTS
    stages = min(_MOST_STAGES, tiles, (SHARED_MEMORY - _OTHER_MEMORY) // tile_bytes)
    assert stages >= 1, (row_tile, output_tile)
    return stages
