"""Matrix products of many rows on Hopper, with the norm, the gate and the residual stream in them.

They do what `kernels.hopper.products` does, and every sum has the same order, so a row's result
does not depend on which of them computed it. There, programs are many and their tiles narrow, so
that a few rows fill the GPU. Here a tile is large, because each one of weights and of inputs comes
from the second-level cache once for each tile of results; and rows are the first dimension of the
product, so that a thread holds neighbouring outputs of few rows.

Where few rows have several programs along the inputs, whose sums are added up, one program here
multiplies one such part after the other, and adds up as they do.
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

from kernels.hopper.cluster import (
    exchange,
    exchange_bytes,
    launch_clustered,
    meet,
    open_exchange,
)
from kernels.hopper.products import (
    HEADROOM,
    MULTIPROCESSORS,
    SHARED_MEMORY,
    SQUARES_BLOCK,
    FusedTiles,
    descriptor,
    squares_tile,
)

_HEADROOM = gl.constexpr(HEADROOM)
_BLOCK = gl.constexpr(SQUARES_BLOCK)
_OUTPUT_TILE = gl.constexpr(128)  # of the gated product, gates and ups together
_INPUT_TILE = gl.constexpr(64)
_GROUP = gl.constexpr(8)  # hidden units whose gates lie beside their ups in a tile
_MOST_STAGES = 6


@aggregate
class _Stream:
    """What one program multiplies, tile after tile along its inputs: where it comes from, and the
    ring in shared memory through which it goes.
    """

    weight: tma.tensor_descriptor  # [outputs, inputs]; of the gated product in groups
    x: tma.tensor_descriptor  # [rows, inputs]
    first_output: gl.tensor  # in boxes' units: outputs, or groups of hidden units
    first_row: gl.tensor
    first_input: gl.tensor
    tiles: gl.tensor  # along the inputs
    weights: gl.shared_memory_descriptor  # [STAGES, the box of a tile]
    values: gl.shared_memory_descriptor  # [STAGES, ROW_TILE, INPUT_TILE]
    arrived: gl.shared_memory_descriptor  # [STAGES, 1], a barrier each
    PART: gl.constexpr  # tiles of a part of the sum; the last part may have fewer

    @gluon.constexpr_function
    def __init__(
        self,
        weight: Any,
        x: Any,
        first_output: Any,
        first_row: Any,
        first_input: Any,
        tiles: Any,
        weights: Any,
        values: Any,
        arrived: Any,
        PART: int,
    ) -> None:
        self.weight, self.x = weight, x
        self.first_output, self.first_row, self.first_input = first_output, first_row, first_input
        self.tiles = tiles
        self.weights, self.values, self.arrived = weights, values, arrived
        self.PART = gl.constexpr(PART)

    @gluon.jit
    def start(self, CLUSTER: gl.constexpr):
        """Asks for the first tiles: for weights at once, for inputs after the wait. Before the wait
        the programs of a cluster meet.
        """
        STAGES: gl.constexpr = self.values.shape[0]
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
        first_input = self.first_input + tile * _INPUT_TILE
        ROW_TILE: gl.constexpr = self.values.shape[1]
        wanted = tile < self.tiles
        mbarrier.expect(arrived, (_OUTPUT_TILE + ROW_TILE) * _INPUT_TILE * 2, wanted)
        if len(self.weight.block_shape) == 4:
            at = [self.first_output, 0, 0, first_input]
            tma.async_copy_global_to_shared(self.weight, at, arrived, target, wanted)
        else:
            at = [self.first_output, first_input]
            tma.async_copy_global_to_shared(self.weight, at, arrived, target, wanted)

    @gluon.jit
    def copy_values(self, tile, stage):
        """Begins to copy a tile of inputs."""
        tma.async_copy_global_to_shared(
            self.x,
            [self.first_row, self.first_input + tile * _INPUT_TILE],
            self.arrived.index(stage),
            self.values.index(stage),
            tile < self.tiles,
        )

    @gluon.jit
    def part(self, number: gl.constexpr):
        """Multiplies one part of the tiles, from zero, and asks for later tiles as room becomes
        free. Returns float32 [ROW_TILE, OUTPUT_TILE].
        """
        STAGES: gl.constexpr = self.values.shape[0]
        ROW_TILE: gl.constexpr = self.values.shape[1]
        layout: gl.constexpr = gl.NVMMADistributedLayout(
            [3, 0], [gl.num_warps(), 1], [16, _OUTPUT_TILE, 16]
        )
        total = gl.zeros([ROW_TILE, _OUTPUT_TILE], gl.float32, layout)
        for tile in range(number * self.PART, gl.minimum((number + 1) * self.PART, self.tiles)):
            stage = tile % STAGES
            mbarrier.wait(self.arrived.index(stage), (tile // STAGES) & 1)
            total = warpgroup_mma(
                self.values.index(stage),
                self.weights.index(stage).reshape([_OUTPUT_TILE, _INPUT_TILE]).permute((1, 0)),
                total,
                is_async=True,
            )
            total = warpgroup_mma_wait(1, deps=(total,))  # the tile before has been used
            later = tile - 1 + STAGES
            if (tile > 0) & (later < self.tiles):
                gl.thread_barrier()  # by every warp
                self.copy_weights(later, later % STAGES)
                self.copy_values(later, later % STAGES)
        return warpgroup_mma_wait(0, deps=(total,))


@gluon.jit
def _stream(
    weight,
    x,
    first_output,
    first_row,
    first_tile,  # along the inputs
    TILES: gl.constexpr,  # along the inputs, of all programs
    PART: gl.constexpr,
    PARTS: gl.constexpr,  # of a program
    STAGES: gl.constexpr,
):
    """The stream of a program, with its room in shared memory."""
    weights = gl.allocate_shared_memory(
        weight.dtype, stages_of(STAGES, weight.block_shape), weight.layout
    )
    values = gl.allocate_shared_memory(x.dtype, stages_of(STAGES, x.block_shape), x.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    first_tile = gl.to_tensor(first_tile)
    return _Stream(
        weight,
        x,
        first_output,
        first_row,
        first_tile * _INPUT_TILE,
        gl.minimum(TILES - first_tile, PART * PARTS),
        weights,
        values,
        arrived,
        PART,
    )


@gluon.constexpr_function
def stages_of(stages: int, box: Any) -> list[int]:
    """The shape of a ring of tiles."""
    return [stages, *box]


@gluon.jit
def _rounded_product(left, right):
    """Their product, which no compiler fuses with an addition."""
    left, right = gl.broadcast(left, right)
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [left, right], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def row_scales_of_many(
    squares,  # [BLOCKS, rows] float32
    first_row,
    rows,
    ROW_TILE: gl.constexpr,
    WIDTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCKS_TILE: gl.constexpr,
    EPS: gl.constexpr,
):
    """As `row_scales` of few rows, in its order. Here a thread adds up all blocks of a row."""
    layout: gl.constexpr = gl.BlockedLayout([1, BLOCKS_TILE], [32, 1], [gl.num_warps(), 1], [0, 1])
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(1, layout))[:, None]
    block = gl.arange(0, BLOCKS_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    parts = gl.load(squares + block * rows + row, mask=(block < BLOCKS) & (row < rows), other=0.0)
    sums = parts.reshape([ROW_TILE, 1, BLOCKS_TILE])
    for _ in gl.static_range(_halvings(BLOCKS_TILE)):
        sums = _folded(sums)
    return gl.rsqrt(sums.reshape([ROW_TILE]) / WIDTH + EPS) / _HEADROOM


@gluon.constexpr_function
def _halvings(size: int) -> int:
    return size.bit_length() - 1


@gluon.jit
def _folded(sums):
    """Adds the second half of [rows, blocks, n] to the first."""
    HALF: gl.constexpr = sums.shape[2] // 2
    halves = sums.reshape([sums.shape[0], sums.shape[1], 2, HALF]).permute((0, 1, 3, 2))
    first, second = gl.split(halves)
    return first + second


@gluon.jit(do_not_specialize=["rows"])
def _many_rows_linear_kernel(
    weight,  # [OUTPUTS, WIDTH], as a descriptor
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
    TILES: gl.constexpr,
    PART: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    first_row, first_output = gl.program_id(0) * ROW_TILE, gl.program_id(1) * _OUTPUT_TILE
    stream = _stream(weight, x, first_output, first_row, 0, TILES, PART, PARTS, STAGES)
    stream.start(CLUSTER=1)
    scales = row_scales_of_many(squares, first_row, rows, ROW_TILE, WIDTH, BLOCKS, BLOCKS_TILE, EPS)
    total = stream.part(0)
    layout: gl.constexpr = total.type.layout
    scales = gl.convert_layout(scales, gl.SliceLayout(1, layout))[:, None]
    total = _rounded_product(total, scales)
    for part in gl.static_range(1, PARTS):
        total += _rounded_product(stream.part(part), scales)
    output = first_output + gl.arange(0, _OUTPUT_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(1, layout))[:, None]
    gl.store(
        out + row.to(gl.int64) * OUTPUTS + output, total, mask=(row < rows) & (output < OUTPUTS)
    )


@gluon.jit(do_not_specialize=["rows"])
def _many_rows_project_kernel(
    weight,  # [OUTPUTS, inputs], as a descriptor
    x,  # [rows, inputs], as a descriptor
    residual,  # [rows, OUTPUTS] float32
    norm_weight,  # [OUTPUTS]
    normed,  # [rows, OUTPUTS]
    squares,  # [blocks, rows] float32
    rows,
    OUTPUTS: gl.constexpr,
    ROW_TILE: gl.constexpr,
    TILES: gl.constexpr,
    PART: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    CLUSTER: gl.constexpr,
):
    rank = gl.program_id(0) % CLUSTER
    first_row = gl.program_id(0) // CLUSTER * ROW_TILE
    first_output = gl.program_id(1) * _OUTPUT_TILE
    OWNED: gl.constexpr = _OUTPUT_TILE // CLUSTER  # outputs that this program finishes
    if CLUSTER > 1:
        room = open_exchange(4 * ROW_TILE * OWNED, 4 * ROW_TILE * OWNED)
    first_tile = rank * (PART * PARTS)
    stream = _stream(weight, x, first_output, first_row, first_tile, TILES, PART, PARTS, STAGES)
    stream.start(CLUSTER)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, OWNED, 16])
    output = first_output + rank * OWNED + gl.arange(0, OWNED, layout=gl.SliceLayout(0, layout))
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(1, layout))
    mask = (row < rows)[:, None] & (output < OUTPUTS)[None, :]
    at = row.to(gl.int64)[:, None] * OUTPUTS + output[None, :]
    grown = gl.load(residual + at, mask=mask, other=0.0)
    scale = gl.load(norm_weight + output, mask=output < OUTPUTS, other=0.0).to(gl.float32)
    total = stream.part(0)
    if PARTS > 1:
        total += stream.part(1)
    if CLUSTER > 1:
        left, right = _halves(total)
        left = gl.convert_layout(left, layout, assert_trivial=True)
        right = gl.convert_layout(right, layout, assert_trivial=True)
        kept = gl.where(rank == 0, left, right)
        total = kept + exchange(room, rank, gl.where(rank == 0, right, left))
    grown += total
    gl.store(residual + at, grown, mask=mask)
    gl.store(
        normed + at, (grown * scale[None, :] * _HEADROOM).to(normed.dtype.element_ty), mask=mask
    )
    sums = _block_sums(grown * grown)
    block = gl.arange(0, OWNED // _BLOCK, layout=gl.SliceLayout(0, sums.type.layout))[None, :]
    block += (first_output + rank * OWNED) // _BLOCK
    row = first_row + gl.arange(0, ROW_TILE, layout=gl.SliceLayout(1, sums.type.layout))[:, None]
    gl.store(squares + block * rows + row, sums, mask=(row < rows) & (block * _BLOCK < OUTPUTS))


@gluon.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    HALF: gl.constexpr = tile.shape[1] // 2
    return gl.split(tile.reshape([tile.shape[0], 2, HALF]).permute((0, 2, 1)))


@gluon.jit
def _block_sums(tile):
    """Sums over blocks of columns [rows, blocks], in the order that `fused_project` has: neighbours
    first, then what is half a block apart, then half of that, and so on.
    """
    BLOCKS: gl.constexpr = tile.shape[1] // _BLOCK
    even, odd = gl.split(tile.reshape([tile.shape[0], BLOCKS, _BLOCK // 2, 2]))
    return gl.sum(_folded(_folded(_folded(even + odd))), 2)  # four are left, a thread each


@gluon.jit(do_not_specialize=["rows"])
def _many_rows_swiglu_kernel(
    weight,  # [HIDDEN / GROUP, 2, GROUP, WIDTH], as a descriptor
    x,  # [rows, WIDTH], as a descriptor
    squares,  # [BLOCKS, rows] float32
    out,  # [rows, HIDDEN], as a descriptor
    rows,
    WIDTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCKS_TILE: gl.constexpr,
    EPS: gl.constexpr,
    ROW_TILE: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    HIDDEN_TILE: gl.constexpr = _OUTPUT_TILE // 2
    first_row, block = gl.program_id(0) * ROW_TILE, gl.program_id(1)
    first_group = block * (HIDDEN_TILE // _GROUP)
    stream = _stream(weight, x, first_group, first_row, 0, TILES, TILES, 1, STAGES)
    stream.start(CLUSTER=1)
    scales = row_scales_of_many(squares, first_row, rows, ROW_TILE, WIDTH, BLOCKS, BLOCKS_TILE, EPS)
    total = stream.part(0)
    total = total * gl.convert_layout(scales, gl.SliceLayout(1, total.type.layout))[:, None]
    pairs = total.reshape([ROW_TILE, HIDDEN_TILE // _GROUP, 2, _GROUP]).permute((0, 1, 3, 2))
    gate, up = gl.split(pairs)
    hidden = gate / (1 + gl.exp(-gate)) * up
    # It leaves through the room of the first inputs, once every warp has used them.
    room = stream.values.index(0)._reinterpret(out.dtype, [ROW_TILE, HIDDEN_TILE], out.layout)
    gl.thread_barrier()
    room.store(hidden.to(out.dtype).reshape([ROW_TILE, HIDDEN_TILE]))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out, [first_row, block * HIDDEN_TILE], room)
    tma.store_wait(0)


def many_rows_linear(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, tiles: FusedTiles, *, eps: float
) -> None:
    """Writes norm(x) W^T: the sum of what `fused_linear` writes in parts.

    Args:
        x, squares, weight: as of `fused_linear`.
        out: float32 [..., rows, outputs], written; dimensions before rows have size 1.
        tiles: of `fused_linear`, whose order of sums is kept.
    """
    rows, width = x.shape
    outputs = weight.shape[0]
    count = triton.cdiv(width, _INPUT_TILE.value)
    row_tile = _row_tile(rows, outputs)
    grid = triton.cdiv(rows, row_tile), triton.cdiv(outputs, _OUTPUT_TILE.value)
    _many_rows_linear_kernel[grid](
        descriptor(weight, _OUTPUT_TILE.value, _INPUT_TILE.value),
        descriptor(x, row_tile, _INPUT_TILE.value),
        squares,
        out,
        rows,
        WIDTH=width,
        OUTPUTS=outputs,
        BLOCKS=squares.shape[0],
        BLOCKS_TILE=squares_tile(squares),
        EPS=eps,
        ROW_TILE=row_tile,
        TILES=count,
        PART=_part(width, tiles),
        PARTS=tiles.splits,
        STAGES=_stage_count(count, row_tile, grid, shared=tiles.splits == 1),
        num_warps=row_tile // 16,
        launch_pdl=True,
    )


def many_rows_project(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    squares: Tensor,
    tiles: FusedTiles,
) -> None:
    """Does the same as `fused_project`, whose `tiles` it takes to keep the order of its sums."""
    rows, inputs = x.shape
    width = weight.shape[0]
    assert squares.shape == (triton.cdiv(width, SQUARES_BLOCK), rows), squares.shape
    cluster = min(2, tiles.splits)
    parts = tiles.splits // cluster
    assert parts <= 2, tiles
    part = _part(inputs, tiles)
    row_tile = _row_tile(rows, width * cluster)
    grid = triton.cdiv(rows, row_tile), triton.cdiv(width, _OUTPUT_TILE.value)
    exchanged = many_rows_exchange(row_tile, cluster)
    launch_clustered(
        _many_rows_project_kernel,
        grid,
        cluster,
        exchanged,
        descriptor(weight, _OUTPUT_TILE.value, _INPUT_TILE.value),
        descriptor(x, row_tile, _INPUT_TILE.value),
        residual,
        norm_weight,
        normed,
        squares,
        rows,
        OUTPUTS=width,
        ROW_TILE=row_tile,
        TILES=triton.cdiv(inputs, _INPUT_TILE.value),
        PART=part,
        PARTS=parts,
        STAGES=_stage_count(part * parts, row_tile, grid, exchanged),
        CLUSTER=cluster,
        num_warps=row_tile // 16,
        launch_pdl=True,
    )


def many_rows_swiglu(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, tiles: FusedTiles, *, eps: float
) -> None:
    """Does the same as `fused_swiglu`, whose `tiles` have one program along the inputs."""
    rows, width = x.shape
    hidden = weight.shape[0] // 2
    assert tiles.splits == 1 and hidden % _GROUP.value == 0, (hidden, tiles)
    count = triton.cdiv(width, _INPUT_TILE.value)
    row_tile = _row_tile(rows, 2 * hidden)
    grid = triton.cdiv(rows, row_tile), triton.cdiv(2 * hidden, _OUTPUT_TILE.value)
    groups = weight.view(2, hidden // _GROUP.value, _GROUP.value, width).transpose(0, 1)
    hidden_tile = _OUTPUT_TILE.value // 2
    _many_rows_swiglu_kernel[grid](
        descriptor(groups, hidden_tile // _GROUP.value, 2, _GROUP.value, _INPUT_TILE.value),
        descriptor(x, row_tile, _INPUT_TILE.value),
        squares,
        descriptor(out, row_tile, hidden_tile),
        rows,
        WIDTH=width,
        BLOCKS=squares.shape[0],
        BLOCKS_TILE=squares_tile(squares),
        EPS=eps,
        ROW_TILE=row_tile,
        TILES=count,
        STAGES=_stage_count(count, row_tile, grid, shared=True),
        num_warps=row_tile // 16,
        launch_pdl=True,
    )


def many_rows_exchange(row_tile: int, cluster: int) -> int:
    """Shared memory that the cluster of `many_rows_project` takes to add up its tiles."""
    return 0 if cluster == 1 else exchange_bytes(4 * row_tile * _OUTPUT_TILE.value // cluster)


def _part(inputs: int, tiles: FusedTiles) -> int:
    """Tiles of a part of the sum: what one program of few rows takes of the inputs."""
    return triton.cdiv(tiles.tiles(inputs) * tiles.inputs, _INPUT_TILE.value)


def _row_tile(rows: int, outputs: int) -> int:
    """Rows of a program: 128, unless their programs would leave much of the GPU idle.

    Args:
        outputs: those of all programs along the inputs together.
    """
    programs = triton.cdiv(rows, 128) * triton.cdiv(outputs, _OUTPUT_TILE.value)
    return 128 if programs >= 0.6 * MULTIPROCESSORS else 64


def _stage_count(
    tiles: int, row_tile: int, grid: tuple[int, int], exchanged: int = 0, *, shared: bool = False
) -> int:
    """Tiles that shared memory holds at once.

    Args:
        exchanged: bytes of it that the cluster takes.
        shared: where there are more programs than multiprocessors, two may lie beside each other:
            one multiplies while the other begins or ends.
    """
    memory = SHARED_MEMORY - exchanged
    if shared and grid[0] * grid[1] > MULTIPROCESSORS:
        memory //= 2
    tile_bytes = (_OUTPUT_TILE.value + row_tile) * _INPUT_TILE.value * 2
    return min(_MOST_STAGES, tiles, memory // tile_bytes)
