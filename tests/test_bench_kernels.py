"""The kernels' benchmark, as far as a machine without a GPU can tell: its cases, its floors, what it calls wrong."""

import math

import bench_kernels
import pytest
import torch
from bench_kernel_cases import Case, Setting, cases, relative_error

from autoregressive.common.errors import UserError
from autoregressive.models.config import GPTConfig
from autoregressive.serve.floor import Ceilings, Floor
from kernels.dispatch import torch_operations

CONFIG = GPTConfig(dim=200, n_layer=3, n_head=2, vocab_size=300, block_size=64, num_classes=5)  # heads of 100


def setting() -> Setting:
    return Setting(CONFIG, 4, 33, torch.device("cpu"), torch.float32, torch_operations(), cold_bytes=10**6)


def test_every_operation_is_compared_and_runs_on_every_copy() -> None:
    """Fails if a case's tensors do not fit its operation, or a result is compared with something else."""
    names = []
    for case in cases(setting()):
        names.append(case.operation)
        assert case.error() < 1e-5, case.operation
        for run in (case.run, case.library):
            if run is not None:
                run(case.copies - 1)
    products = ["qkv product", "output product", "swiglu", "down product", "head"]
    assert sorted(names) == sorted([*products, "embed", "attention", "add_norm", "draw"])


def test_the_cases_floors_are_those_of_a_step() -> None:
    """Fails if a shape is not the model's, or bytes are counted otherwise than in every other report."""
    ceilings = Ceilings(1e12, 1e12)  # few operations a byte: products are bound by them
    seconds = {case.operation: bench_kernels.floor_seconds(case, ceilings) for case in cases(setting())}
    layers = ("qkv product", "output product", "swiglu", "down product", "attention")
    step = CONFIG.n_layer * sum(seconds[name] for name in layers) + seconds["head"]
    assert step == pytest.approx(Floor(CONFIG, 4, ceilings).step_seconds(4, 4 * 33))


def test_copies_are_too_many_for_a_cache() -> None:
    """Fails if weights that are still in the cache flatter a kernel."""
    for case in cases(setting()):
        assert case.copies == 1 or case.copies * case.bytes >= min(10**6, 2 * case.bytes)
        if case.operation in ("qkv product", "output product", "swiglu", "down product", "head"):
            assert case.copies * case.bytes >= 10**6


def test_a_wrong_result_is_called_wrong() -> None:
    """Fails if NaN, zeros or another token pass for the reference's result."""
    right = torch.ones(3)
    assert relative_error(right, right) == 0
    assert relative_error(torch.zeros(3), right) == 1
    case = Case("head", "", 0, 0, 1, print, None, lambda: 0.0)
    draw = Case("draw", "", 0, 0, 1, print, None, lambda: 0.0)
    assert not bench_kernels.is_wrong(case, 1e-5, torch.float32)
    assert bench_kernels.is_wrong(case, math.nan, torch.bfloat16)
    assert bench_kernels.is_wrong(case, 0.1, torch.bfloat16)
    assert bench_kernels.is_wrong(draw, 0.5, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    """Fails if the script ends in a traceback."""
    with pytest.raises(UserError, match="a GPU of compute capability"):
        bench_kernels.main([])
