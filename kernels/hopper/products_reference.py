"""The products of `kernels.hopper.products` in torch, for any dtype and device."""

import torch
from torch import Tensor

from kernels.hopper.products import HEADROOM
from kernels.linear import gate_reference


def fused_linear_reference(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float
) -> None:
    """Does the same as `fused_linear` in torch. The first partial sum is the product, the others
    are zeros.
    """
    sums = out.view(-1, *out.shape[-2:])
    sums[0] = torch.nn.functional.linear(x, weight) * _row_scales_reference(x, squares, eps)
    sums[1:] = 0


def fused_project_reference(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    squares: Tensor,
) -> None:
    """Does the same as `fused_project` in torch. The first block has all squares."""
    residual += torch.nn.functional.linear(x, weight)
    normed.copy_(residual * norm_weight * HEADROOM)
    squares.zero_()
    squares[0] = residual.square().sum(dim=1)


def fused_swiglu_reference(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float
) -> None:
    """Does the same as `fused_swiglu` in torch."""
    both = torch.nn.functional.linear(x, weight) * _row_scales_reference(x, squares, eps)
    gate_reference(both, out)


def _row_scales_reference(x: Tensor, squares: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(squares.sum(dim=0) / x.shape[1] + eps)[:, None] / HEADROOM
