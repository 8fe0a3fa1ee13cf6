"""Matrix products of few rows with many weights: y = x W^T, cut along the inputs into partial sums,
and the gated half of the feed-forward layer, silu(W1 x) * (W3 x).

A decode step multiplies a handful of rows with every weight once, so the time is that of streaming
the weights. Three things make the stream dense: the weights are the wide operand (y^T = W x^T), a
program's weights are on their way before it waits for the kernel that computes x (programmatic
dependent launch), and the inputs are cut into splits so that there are enough programs. The splits'
partial sums are stored apart, and the kernel that reads them adds them in order: a sum's order
depends on shapes only.

The gated product has W1 and W3 in one matrix. A program takes the same outputs of both halves over
all inputs, so that nothing needs a second pass. For many rows the product is a library's, and
`gate` does the rest.

Quantised weights become numbers of x's dtype in registers. The values of fp8 and int8 are exact in
16 bits, and a program multiplies its sums by the scale of the output. int4 has a scale for each
group of inputs, which is in the number.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.quantization import Weights, in_dtype

_LEAST_ROWS = 4


@dataclass(frozen=True)
class LinearTiles:
    """How a product is cut up; from the measured table, or `kernels.tiles.linear_rule`."""

    outputs: int  # outputs of a program
    inputs: int  # inputs of one tile
    tiles: int  # tiles of a program, one after the other along the inputs
    # tiles whose weights are loaded before the wait; the rest is streamed through a pipeline
    early: int
    stages: int  # depth of that pipeline
    warps: int

    def splits(self, inputs: int) -> int:
        """Partial sums of a product with that many inputs."""
        return -(-inputs // (self.inputs * self.tiles))


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,  # [rows, INPUTS]
    weight,  # [OUTPUTS, INPUTS]; of int4 bytes [OUTPUTS, INPUTS / 2]
    scales,  # None, [OUTPUTS] float32, or of int4 [OUTPUTS, INPUTS / GROUP]
    out,  # [splits, rows, OUTPUTS] float32
    rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_TILE: tl.constexpr,
    OUTPUT_TILE: tl.constexpr,
    INPUT_TILE: tl.constexpr,
    TILES: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    output_block, split, row_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = row_block * ROW_TILE + tl.arange(0, ROW_TILE)
    output = output_block * OUTPUT_TILE + tl.arange(0, OUTPUT_TILE)
    offset = tl.arange(0, INPUT_TILE)
    first_input = split * (TILES * INPUT_TILE)
    row_mask = row < rows
    output_mask = output < OUTPUTS
    total = product(
        weight + output[:, None].to(tl.int64) * _row_bytes(INPUTS, GROUP),
        scales,
        output,
        x + row[None, :] * INPUTS,
        first_input,
        offset,
        None if OUTPUTS % OUTPUT_TILE == 0 else output_mask,
        row_mask,
        INPUTS=INPUTS,
        GROUP=GROUP,
        OUTPUT_TILE=OUTPUT_TILE,
        ROW_TILE=ROW_TILE,
        INPUT_TILE=INPUT_TILE,
        TILES=TILES,
        EARLY=EARLY,
        STAGES=STAGES,
        LAUNCH_PDL=LAUNCH_PDL,
    )
    at = (split * rows + row[None, :]).to(tl.int64) * OUTPUTS + output[:, None]
    tl.store(out + at, total, mask=row_mask[None, :] & output_mask[:, None])


@triton.constexpr_function
def _row_bytes(inputs: int, group: int) -> int:
    """Elements of a row of weights in memory. Two digits of int4 share one."""
    return inputs // 2 if group else inputs


@triton.jit
def product(
    weight_rows,  # [OUTPUT_TILE, 1] pointers
    scales,  # as of the kernel
    output,  # [OUTPUT_TILE]
    x_rows,  # [1, ROW_TILE] pointers
    first_input,
    offset,  # [INPUT_TILE]
    existing,  # [OUTPUT_TILE], which outputs do; None: all of them
    row_mask,  # [ROW_TILE]
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs that share a scale, of int4; else 0
    OUTPUT_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    INPUT_TILE: tl.constexpr,
    TILES: tl.constexpr,
    EARLY: tl.constexpr,
    STAGES: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    """A program's product [OUTPUT_TILE, ROW_TILE], float32. The weights of EARLY tiles are loaded
    before the wait; the other tiles come through a pipeline, and are added first.
    """
    if LAUNCH_PDL:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    early_weights: tl.tuple = ()
    for tile in tl.static_range(EARLY):
        first = first_input + tile * INPUT_TILE
        weights = _load_weights(
            weight_rows, scales, output, first, offset, existing, DTYPE, INPUTS, GROUP
        )
        early_weights = early_weights + (weights,)
    if LAUNCH_PDL:
        gdc_wait()  # README, rules 1 and 3: weights come before it, x after it
    total = tl.zeros([OUTPUT_TILE, ROW_TILE], tl.float32)
    for tile in tl.range(EARLY, TILES, num_stages=STAGES):
        first = first_input + tile * INPUT_TILE
        weights = _load_weights(
            weight_rows, scales, output, first, offset, existing, DTYPE, INPUTS, GROUP
        )
        values = _load_values(x_rows, first + offset, row_mask, INPUTS)
        total = tl.dot(weights, values, total, input_precision="ieee")
    early_values: tl.tuple = ()
    for tile in tl.static_range(EARLY):
        column = first_input + tile * INPUT_TILE + offset
        early_values = early_values + (_load_values(x_rows, column, row_mask, INPUTS),)
    for tile in tl.static_range(EARLY):
        total = tl.dot(early_weights[tile], early_values[tile], total, input_precision="ieee")
    if scales is not None and GROUP == 0:
        scale = tl.load(scales + output, mask=existing)
        total = total * scale[:, None]
    return total


@triton.jit
def _load_weights(
    weight_rows,
    scales,
    output,
    first,
    offset,
    existing,
    DTYPE: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of weights [outputs, inputs], in x's dtype.

    Args:
        first: input of the tile.
        offset: [INPUT_TILE]
        existing: [OUTPUT_TILE], which outputs exist; None: all of them.
    """
    if GROUP == 0:
        column = first + offset
        mask = _mask(column < INPUTS, existing)
        weights = tl.load(weight_rows + column[None, :], mask=mask, other=0.0)
    else:
        digits = _load_digits(weight_rows, first, offset, existing, INPUTS)
        scale = _load_scales(scales, output, first, offset, existing, INPUTS, GROUP)
        weights = (digits.to(tl.float32) - 8) * scale
    return weights.to(DTYPE)


@triton.jit
def _mask(there, existing):
    """What exists of a tile [outputs, columns], given which columns and outputs do."""
    mask = there[None, :]
    if existing is not None:
        mask = mask & existing[:, None]
    return mask


@triton.jit
def _load_digits(weight_rows, first, offset, existing, INPUTS: tl.constexpr):
    """A tile of int4's digits [outputs, inputs], 0 to 15. A byte, which has two, is loaded once."""
    byte = first // 2 + tl.arange(0, offset.shape[0] // 2)
    mask = _mask(byte < INPUTS // 2, existing)
    digits = tl.load(weight_rows + byte[None, :], mask=mask, other=0)
    return tl.interleave(digits & 15, digits >> 4)


@triton.jit
def _load_scales(
    scales, output, first, offset, existing, INPUTS: tl.constexpr, GROUP: tl.constexpr
):
    """The scales of a tile of int4 weights [outputs, inputs]. Each is loaded once if a tile has
    whole groups.
    """
    of_outputs = scales + output[:, None] * (INPUTS // GROUP)
    COLUMNS: tl.constexpr = offset.shape[0]
    if COLUMNS % GROUP == 0:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        group = first // GROUP + tl.arange(0, GROUPS)
        mask = _mask(group < INPUTS // GROUP, existing)
        each = tl.load(of_outputs + group[None, :], mask=mask, other=0.0)
        each = tl.broadcast_to(each[:, :, None], [output.shape[0], GROUPS, GROUP])
        scale = tl.reshape(each, [output.shape[0], COLUMNS])
    else:
        column = first + offset
        mask = _mask(column < INPUTS, existing)
        scale = tl.load(of_outputs + column[None, :] // GROUP, mask=mask, other=0.0)
    return scale


@triton.jit
def _load_values(x_rows, column, row_mask, INPUTS: tl.constexpr):
    """A tile of x [inputs, rows]."""
    mask = row_mask[None, :] & (column < INPUTS)[:, None]
    return tl.load(x_rows + column[:, None], mask=mask, other=0.0)


def row_tile(rows: int) -> int:
    """Rows of a program's tile: at least what the matrix unit takes, at most 64."""
    return max(16, min(64, triton.next_power_of_2(rows)))


def linear(
    x: Tensor, weight: Weights, out: Tensor, tiles: LinearTiles, *, launch_pdl: bool
) -> None:
    """Writes partial sums of x W^T.

    Args:
        x: [rows, inputs], the weights' dtype where they are not quantised; a multiple of 8 inputs.
        weight: [outputs, inputs], contiguous.
        out: float32 [tiles.splits(inputs), rows, outputs]; their sum over the first dimension is
            the product. Without splits it may be [rows, outputs].
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    sums = out.view(-1, *out.shape[-2:])
    assert sums.shape == (tiles.splits(inputs), rows, outputs), (out.shape, tiles)
    row_block = row_tile(rows)
    grid = (triton.cdiv(outputs, tiles.outputs), tiles.splits(inputs), triton.cdiv(rows, row_block))
    _linear_kernel[grid](
        x,
        *_in_memory(weight),
        out,
        rows,
        INPUTS=inputs,
        OUTPUTS=outputs,
        GROUP=_int4_group(weight),
        ROW_TILE=row_block,
        OUTPUT_TILE=tiles.outputs,
        INPUT_TILE=tiles.inputs,
        TILES=tiles.tiles,
        EARLY=tiles.early,
        STAGES=_stages(weight, tiles.stages),
        LAUNCH_PDL=launch_pdl,
        num_warps=tiles.warps,
        **pdl_option(launch_pdl),
    )


def _in_memory(weight: Weights) -> tuple[Tensor, Tensor | None]:
    """Values, and scales where the weights are quantised."""
    assert isinstance(weight, Tensor) or not weight.paired
    return (weight, None) if isinstance(weight, Tensor) else (weight.values, weight.scales)


def _int4_group(weight: Weights) -> int:
    """Inputs that share a scale; 0 where all of an output's do, or the weights are not
    quantised.
    """
    if isinstance(weight, Tensor) or weight.scales.dim() == 1:
        return 0
    return weight.shape[1] // weight.scales.shape[1]


def _stages(weight: Weights, stages: int) -> int:
    """Depth of a product's pipeline. The scales of int4 are as large as a tile of float32 weights,
    so that several stages do not fit into a program's shared memory.
    """
    return 1 if _int4_group(weight) else stages


def pdl_option(launch_pdl: bool) -> dict[str, bool]:
    """The launch option of programmatic dependent launch. It is left out where it is off, because
    older GPUs do not know it.
    """
    return {"launch_pdl": True} if launch_pdl else {}


def linear_reference(x: Tensor, weight: Weights, out: Tensor) -> None:
    """Does the same as `linear` in torch. The first partial sum is the product, the others are
    zeros.
    """
    sums = out.view(-1, *out.shape[-2:])
    sums[0] = _product(x, weight)
    sums[1:] = 0


def _product(x: Tensor, weight: Weights) -> Tensor:
    """x W^T. On a CPU, the products of fewer rows differ in their last bits from those of more."""
    weight = in_dtype(weight, x.dtype)
    missing = _LEAST_ROWS - len(x) if x.device.type == "cpu" else 0
    if missing > 0:
        x = torch.cat([x, x.new_zeros(missing, x.shape[1])])
        return torch.nn.functional.linear(x, weight)[:-missing]
    return torch.nn.functional.linear(x, weight)


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
    weight,  # [2 * HIDDEN, INPUTS]: W1 above W3; of int4 bytes [2 * HIDDEN, INPUTS / 2]
    scales,  # None, [2 * HIDDEN] float32, or of int4 [2 * HIDDEN, INPUTS / GROUP]
    out,  # [rows, HIDDEN]
    rows,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    GROUP: tl.constexpr,
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
        weight + output[:, None].to(tl.int64) * _row_bytes(INPUTS, GROUP),
        scales,
        output,
        x + row[None, :] * INPUTS,
        0,
        offset,
        None,
        row_mask,
        INPUTS=INPUTS,
        GROUP=GROUP,
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


def swiglu(
    x: Tensor, weight: Weights, out: Tensor, tiles: SwigluTiles, *, launch_pdl: bool
) -> None:
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
        *_in_memory(weight),
        out,
        rows,
        INPUTS=inputs,
        HIDDEN=hidden,
        GROUP=_int4_group(weight),
        ROW_TILE=row_block,
        HIDDEN_TILE=tiles.outputs,
        INPUT_TILE=tiles.inputs,
        EARLY=tiles.early,
        STAGES=_stages(weight, tiles.stages),
        LAUNCH_PDL=launch_pdl,
        num_warps=tiles.warps,
        **pdl_option(launch_pdl),
    )


def swiglu_reference(x: Tensor, weight: Weights, out: Tensor) -> None:
    """Does the same as `swiglu` in torch."""
    gate_reference(_product(x, weight), out)


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
