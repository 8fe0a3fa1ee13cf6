"""The engine's steps against LlamaGen's stored outputs, on a CPU with the torch operations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fused_runners import FusedRunner
from teacher import TINY, engine_codes
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.model_runner import ModelRunner, row_buckets
from kernels.hopper.products import HEADROOM
from kernels.hopper.products_reference import fused_linear_reference
from kernels.operations import Operations
from kernels.quantization import Weights


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_are_llamagens(name: str) -> None:
    """Guards positions, page tables, pairing, the interval's end, head size 100 and no guidance.

    GPT-B's logits are compared in tests/kernels/interpreted/test_gpt_b.py.
    """
    codes, expected = engine_codes(name, torch.device("cpu"), "torch")
    assert np.array_equal(codes, expected)


@pytest.mark.parametrize("name", TINY)
def test_a_fused_layer_draws_llamagens_tokens(name: str) -> None:
    """Guards what else only a GPU of compute capability 9.0 runs: who adds to the residual stream,
    whose norm, whose squares.
    """
    codes, expected = engine_codes(name, torch.device("cpu"), "torch", FusedRunner)
    assert np.array_equal(codes, expected)


@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_headroom_keeps_fp16_products_whole(size: float) -> None:
    """Fails if a large residual stream overflows before it is normed, or a small one is lost among
    fp16's subnormal numbers.
    """
    drawn = torch.Generator().manual_seed(0)
    residual, weight = (
        torch.randn(4, 512, generator=drawn) * size,
        torch.randn(64, 512, generator=drawn),
    )
    norm_weight = torch.rand(512, generator=drawn) * 0.5 + 0.5
    squares = residual.square().sum(dim=1)[None]
    got, wanted = (torch.empty(1, 4, 64) for _ in range(2))
    x = residual * norm_weight * HEADROOM
    fused_linear_reference(x, squares, weight, wanted, eps=1e-5)
    fused_linear_reference(x.half().float(), squares, weight, got, eps=1e-5)
    assert (got - wanted).norm() < 1e-3 * wanted.norm()


def test_float32_products_are_ieee_whatever_the_process_allows() -> None:
    """Fails if --precision none computes in TF32 because someone allowed it, or if what was allowed
    is not again afterwards.
    """
    seen = set()

    class Watched(ModelRunner):
        def make_operations(self, gpt: Transformer) -> Operations:
            operations = super().make_operations(gpt)

            def linear(x: Tensor, weight: Weights, out: Tensor) -> None:
                on_cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
                seen.add((torch.backends.cuda.matmul.fp32_precision, on_cpu.fp32_precision))
                operations.linear(x, weight, out)

            return replace(operations, linear=linear)

    torch.set_float32_matmul_precision("medium")
    try:
        engine_codes("gpt_tiny_nocfg", torch.device("cpu"), "torch", Watched)
        assert seen == {("ieee", "ieee")}
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("max_rows", [1, 2, 3, 16, 100, 512, 700])
def test_buckets_cover_every_number_of_rows(max_rows: int) -> None:
    """A batch size between two graphs, or above the last, would have nothing to run it."""
    buckets = row_buckets(max_rows)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == max_rows
