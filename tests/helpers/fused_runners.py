"""Runners whose layers are Hopper's, on torch's references of the products."""

from dataclasses import replace

from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.model_runner import ModelRunner
from kernels.hopper.products import HEADROOM
from kernels.hopper.products_reference import (
    fused_linear_reference,
    fused_project_reference,
    fused_swiglu_reference,
)
from kernels.operations import FusedProducts, Operations


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
    )


class FusedRunner(ModelRunner):
    """The real runner on `fused_references`."""

    def make_operations(self, gpt: Transformer) -> Operations:
        return replace(super().make_operations(gpt), fused=fused_references())


class PairedRunner(ModelRunner):
    """The real runner on `fused_references` by paired weights."""

    def make_operations(self, gpt: Transformer) -> Operations:
        return replace(super().make_operations(gpt), quantized=fused_references())
