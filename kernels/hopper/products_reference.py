"""The products of `kernels.hopper.products` in torch, for any dtype and device, and for quantised
weights.
"""

import torch
from torch import Tensor

from kernels.hopper.products import HEADROOM
from kernels.linear import gate_reference
from kernels.quantization import Weights, in_dtype


def fused_linear_reference(
    x: Tensor, squares: Tensor, weight: Weights, out: Tensor, *, eps: float
) -> None:
    """Does the same as `fused_linear` in torch. The first partial sum is the product, the others
    are zeros.
    """
    sums = out.view(-1, *out.shape[-2:])
    sums[0] = _product(x, weight) * _row_scales_reference(x, squares, eps)
    sums[1:] = 0


def fused_project_reference(
    x: Tensor,
    weight: Weights,
    residual: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    squares: Tensor,
) -> None:
    """Does the same as `fused_project` in torch. The first block has all squares."""
    residual += _product(x, weight)
    normed.copy_(residual * norm_weight * HEADROOM)
    squares.zero_()
    squares[0] = residual.square().sum(dim=1)


def fused_swiglu_reference(
    x: Tensor, squares: Tensor, weight: Weights, out: Tensor, *, eps: float
) -> None:
    """Does the same as `fused_swiglu` in torch."""
    both = _product(x, weight) * _row_scales_reference(x, squares, eps)
    gate_reference(both, out)


def _product(x: Tensor, weight: Weights) -> Tensor:
    return torch.nn.functional.linear(x, in_dtype(weight, x.dtype))


def _row_scales_reference(x: Tensor, squares: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(squares.sum(dim=0) / x.shape[1] + eps)[:, None] / HEADROOM
