"""Runners whose layers are Hopper's, on torch's references of the products."""

from dataclasses import replace

import torch
from threaded_ranks import ThreadInboxes
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.model_runner import ModelRunner
from kernels.hopper.peers import Inboxes
from kernels.hopper.products import HEADROOM
from kernels.hopper.products_reference import (
    fused_linear_reference,
    fused_project_reference,
    fused_swiglu_reference,
)
from kernels.operations import FusedProducts, Operations, ProductsOfRanks
from kernels.quantization import Weights


def fused_references() -> FusedProducts:
    """Hopper's products in torch, with partial sums and blocks of squares as there."""
    return FusedProducts(
        linear=fused_linear_reference,
        linear_splits=lambda outputs, inputs, rows: 3,
        project=fused_project_reference,
        project_blocks=lambda outputs: 5,
        swiglu=fused_swiglu_reference,
        head=lambda x, squares, weight, out, *, eps: fused_linear_reference(
            x, squares, weight, out[None], eps=eps
        ),
        headroom=HEADROOM,
        of_ranks=ProductsOfRanks(_project_of_ranks, _gather),
    )


def _project_of_ranks(
    x: Tensor,
    weight: Weights,
    residual: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    squares: Tensor,
    inboxes: Inboxes,
) -> None:
    assert isinstance(inboxes, ThreadInboxes)
    assert isinstance(weight, Tensor)
    residual += inboxes.gather(torch.nn.functional.linear(x, weight)).sum(dim=0)
    nothing = torch.zeros_like(x)
    fused_project_reference(nothing, weight, residual, norm_weight, normed, squares)


def _gather(part: Tensor, inboxes: Inboxes, out: Tensor) -> None:
    assert isinstance(inboxes, ThreadInboxes)
    out.copy_(inboxes.gather(part).transpose(0, 1).flatten(1))


class FusedRunner(ModelRunner):
    """The real runner on `fused_references`."""

    def make_operations(self, gpt: Transformer) -> Operations:
        return replace(super().make_operations(gpt), fused=fused_references())


class PairedRunner(ModelRunner):
    """The real runner on `fused_references` by paired weights."""

    def make_operations(self, gpt: Transformer) -> Operations:
        return replace(super().make_operations(gpt), quantized=fused_references())
