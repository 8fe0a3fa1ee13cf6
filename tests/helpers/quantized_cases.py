"""Random cases for Hopper's products by weights of a byte, and how they are compared with their
torch references. Few rows and many must come out the same, bit for bit.
"""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from kernel_cases import POISON, Place, relative_error
from torch import Tensor

from kernels.hopper.many_rows_quantized_products import (
    many_rows_quantized_linear,
    many_rows_quantized_project,
    many_rows_quantized_swiglu,
)
from kernels.hopper.products import SQUARES_BLOCK, FusedTiles
from kernels.hopper.products_reference import (
    fused_linear_reference,
    fused_project_reference,
    fused_swiglu_reference,
)
from kernels.hopper.quantized_products import (
    quantized_linear,
    quantized_project,
    quantized_swiglu,
)
from kernels.operations import MANY_ROWS
from kernels.quantization import QuantizedMatrix, quantize

_FEW = 24  # rows of the same inputs that are multiplied apart


def paired_weights(place: Place, outputs: int, inputs: int, scheme: str) -> QuantizedMatrix:
    """Weights whose outputs differ in size by a hundred times and more."""
    sizes = place.random(outputs, 1, seed=8, dtype=torch.float32).exp()
    weights = place.random(outputs, inputs, seed=2, dtype=torch.float32) * sizes
    return quantize(weights, scheme).pair()


def check_quantized_linear(
    place: Place, rows: int, outputs: int, inputs: int, tiles: FusedTiles, scheme: str
) -> None:
    """Guards splits, tails along every axis, which scale belongs to which output, and the division
    left to the product.
    """
    x, weight = place.random(rows, inputs, seed=1), paired_weights(place, outputs, inputs, scheme)
    squares = place.random(5, rows, seed=3, dtype=torch.float32).abs() * inputs
    out = place.poisoned(tiles.splits, rows, outputs, dtype=torch.float32)
    quantized_linear(x, squares, weight, out, tiles, eps=1e-5)
    wanted = torch.empty_like(out)
    fused_linear_reference(x.float(), squares, weight, wanted, eps=1e-5)
    assert relative_error(out.sum(0), wanted.sum(0)) < place.tolerance
    few = place.poisoned(tiles.splits, len(x[:_FEW]), outputs, dtype=torch.float32)
    quantized_linear(x[:_FEW], squares[:, :_FEW].contiguous(), weight, few, tiles, eps=1e-5)
    assert torch.equal(few, out[:, :_FEW])
    if rows > MANY_ROWS:
        of_many = place.poisoned(1, rows, outputs, dtype=torch.float32)
        many_rows_quantized_linear(x, squares, weight, of_many, tiles, eps=1e-5)
        assert torch.equal(of_many[0], reduce(add, out))


def check_quantized_project(
    place: Place, rows: int, width: int, inputs: int, tiles: FusedTiles, scheme: str
) -> None:
    """Guards the cluster's sum, what each of its programs writes, and the blocks of squares."""
    x = place.random(rows, inputs, seed=1) * inputs**-0.5
    weight = paired_weights(place, width, inputs, scheme)
    residual = place.random(rows, width, seed=3, dtype=torch.float32)
    norm_weight = place.random(width, seed=4)

    def run(count: int, project: Callable[..., None]) -> tuple[Tensor, Tensor, Tensor]:
        """Residual, normed and squares of the first rows."""
        grown, normed = residual[:count].clone(), place.poisoned(count, width)
        blocks = -(-width // SQUARES_BLOCK)
        squares = place.poisoned(blocks, count, dtype=torch.float32)
        project(x[:count], weight, grown, norm_weight, normed, squares, tiles)
        return grown, normed, squares

    grown, normed, squares = run(rows, quantized_project)
    wanted_residual, wanted = residual.clone(), torch.empty(rows, width, device=place.device)
    wanted_squares = torch.full_like(squares, POISON)
    fused_project_reference(
        x.float(), weight, wanted_residual, norm_weight.float(), wanted, wanted_squares
    )
    assert relative_error(grown, wanted_residual) < place.tolerance
    assert relative_error(normed, wanted) < place.tolerance
    assert relative_error(squares.sum(0), wanted_squares.sum(0)) < place.tolerance
    few = run(min(rows, _FEW), quantized_project)
    assert torch.equal(few[0], grown[:_FEW])
    assert torch.equal(few[1], normed[:_FEW])
    assert torch.equal(few[2], squares[:, :_FEW])
    if rows > MANY_ROWS:
        for of_many, of_few in zip(
            run(rows, many_rows_quantized_project), (grown, normed, squares), strict=True
        ):
            assert torch.equal(of_many, of_few)


def check_quantized_swiglu(
    place: Place, rows: int, hidden: int, inputs: int, tiles: FusedTiles, scheme: str
) -> None:
    """Guards which rows of the weights, and which scales, belong together, and the division that is
    left to the product.
    """
    x = place.random(rows, inputs, seed=1)
    weight = paired_weights(place, 2 * hidden, inputs, scheme)
    squares = place.random(5, rows, seed=3, dtype=torch.float32).abs() * 4096 * inputs**2
    out, wanted = place.poisoned(rows, hidden), torch.empty(rows, hidden, device=place.device)
    quantized_swiglu(x, squares, weight, out, tiles, eps=1e-5)
    fused_swiglu_reference(x.float(), squares, weight, wanted, eps=1e-5)
    assert relative_error(out, wanted) < place.tolerance
    few = place.poisoned(len(x[:_FEW]), hidden)
    quantized_swiglu(x[:_FEW], squares[:, :_FEW].contiguous(), weight, few, tiles, eps=1e-5)
    assert torch.equal(few, out[:_FEW])
    if rows > MANY_ROWS:
        of_many = place.poisoned(rows, hidden)
        many_rows_quantized_swiglu(x, squares, weight, of_many, tiles, eps=1e-5)
        assert torch.equal(of_many, out)
