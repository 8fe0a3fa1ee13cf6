"""The kernels' benchmark, as far as a machine without a GPU can tell: its cases, its floors, what
it calls wrong.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import bench_kernels
import pytest
import torch
from compiled import Build, launches_of, without_memory
from profile_step import PRODUCTS
from torch import Tensor

from autoregressive.benchmarks import kernel_cases
from autoregressive.benchmarks.kernel_cases import (
    Case,
    Setting,
    cases,
    reference_products,
    relative_error,
)
from autoregressive.benchmarks.script import Table
from autoregressive.devices import PRECISIONS
from autoregressive.errors import UserError
from autoregressive.models.config import GPTConfig
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.layers import FusedLayers, QuantizedLayers
from autoregressive.serve.floor import Ceilings, Floor
from kernels.attention import AttentionTiles, combine
from kernels.attention_reference import combine_reference
from kernels.operations import MANY_ROWS, FusedProducts, torch_operations
from kernels.quantization import FP8

# heads of 100
CONFIG = GPTConfig(dim=200, n_layer=3, n_head=2, vocab_size=300, block_size=64, num_classes=5)
TILES = AttentionTiles(chunk=10, warps=1)  # four chunks of seven are live


@pytest.fixture(autouse=True)
def combined_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the kernel, which a CPU does not run."""

    def combined(
        mixed: Tensor,
        stats: Tensor,
        positions: Tensor,
        limits: Tensor,
        out: Tensor,
        tiles: AttentionTiles,
        *,
        launch_pdl: bool,
    ) -> None:
        combine_reference(mixed, stats, positions, limits, out, tiles.chunk)

    monkeypatch.setattr(kernel_cases, "combine", combined)


def plain(rows: int = 4) -> Setting:
    return Setting(
        CONFIG, rows, 33, torch.device("cpu"), torch.float32, torch_operations(), 10**6, TILES
    )


def fused(rows: int = 4, products: FusedProducts | None = None) -> Setting:
    """As on compute capability 9.0, cut up otherwise than the references."""
    whole = products or reference_products()
    cut = replace(
        whole,
        linear_splits=lambda outputs, inputs, rows: 3,
        project_blocks=lambda outputs: outputs // 50,
    )
    return replace(plain(rows), operations=replace(torch_operations(), fused=cut, quantized=cut))


def quantized() -> Setting:
    return replace(plain(), quantization="int8", page_dtype=torch.int8)


def paired() -> Setting:
    """As on compute capability 9.0, with weights of a byte."""
    config = replace(CONFIG, dim=256)
    return replace(fused(), config=config, quantization="fp8", page_dtype=FP8)


def asked(rows: list[int], context: int, dtype: torch.dtype) -> argparse.Namespace:
    """What the command line says, on a GPU."""
    precision = next(name for name, known in PRECISIONS.items() if known == dtype)
    return argparse.Namespace(
        rows=rows,
        context=context,
        precision=precision,
        device=torch.device("cuda"),
        quantization=None,
        kv_cache_dtype="auto",
    )


def measured_settings(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    row_counts: list[int],
) -> list[Setting]:
    """What a model's cases are made of on a GPU of that capability, which need not be there."""
    settings: list[Setting] = []

    def no_cases(setting: Setting) -> list[Case]:
        settings.append(setting)
        return []

    with monkeypatch.context() as patch:
        patch.setattr(bench_kernels, "cases", no_cases)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        patch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1)
        )
        patch.setattr(bench_kernels, "measure_ceilings", lambda device, dtype: Ceilings(1e12, 1e12))
        bench_kernels.measure_model("GPT-B", asked(row_counts, 8, dtype), Table({}))
    return settings


@pytest.fixture(params=[plain, fused, quantized, paired], ids=lambda make: make.__name__)
def setting(request: pytest.FixtureRequest) -> Setting:
    return request.param()


def test_every_operation_is_compared_and_runs_on_every_copy(setting: Setting) -> None:
    """Fails if a case's tensors do not fit its operation, or a result is compared with something
    else.
    """
    names = []
    for case in cases(setting):
        names.append(case.operation)
        assert case.error() < 1e-5, case.operation
        for run in (case.run, case.library):
            if run is not None:
                run(case.copies - 1)
    norm = [] if isinstance(setting.layers, FusedLayers) else ["add_norm"]
    assert sorted(names) == sorted([*PRODUCTS, *norm, "embed", "attention", "combine", "draw"])


def test_bytes_are_those_of_quantised_weights_and_pages() -> None:
    """Fails if the floor is that of 16 bits, or leaves out scales."""
    assert isinstance(paired().layers, QuantizedLayers)
    for setting in (quantized(), paired()):
        config = setting.config
        found = {case.operation: case.bytes for case in cases(setting)}
        assert found["qkv product"] == 3 * config.dim * (config.dim + 4)
        head_bytes = 2 * (config.head_size + 4)
        assert found["attention"] == setting.rows * setting.context * config.n_head * head_bytes


def test_the_gate_is_measured_where_a_step_runs_it() -> None:
    """Fails if the kernel that only steps with many rows run is left out, compared with something
    else, or timed for few rows or beside fused products.
    """
    for other in (plain(MANY_ROWS), fused(MANY_ROWS + 2)):
        assert "gate" not in [case.operation for case in cases(other)]
    [gate] = [case for case in cases(plain(MANY_ROWS + 2)) if case.operation == "gate"]
    assert gate.error() < 1e-5
    # two halves read, their product written
    assert gate.bytes == (MANY_ROWS + 2) * 3 * CONFIG.ffn_dim * 4
    assert gate.multiplications == 0


@pytest.mark.parametrize(
    ("dim", "combines"), [(144, False), (200, True)], ids=["head size 72", "head size 100"]
)
def test_where_attention_is_torchs_nothing_is_combined(
    monkeypatch: pytest.MonkeyPatch, dim: int, combines: bool
) -> None:
    """Fails if a kernel is timed that no step of such a model runs."""
    monkeypatch.setattr(bench_kernels, "config_of", lambda model: replace(CONFIG, dim=dim))
    [setting] = measured_settings(monkeypatch, (8, 0), torch.bfloat16, [2])
    assert (setting.attention_tiles is not None) == combines
    on_cpu = replace(plain(), attention_tiles=setting.attention_tiles)
    assert ("combine" in [case.operation for case in cases(on_cpu)]) == combines


def test_only_a_contexts_chunks_are_combined() -> None:
    """Fails if the floor counts chunks that are not read, or the comparison passes a kernel that
    reads them.
    """
    [case] = [case for case in cases(plain()) if case.operation == "combine"]
    heads, size, rows = CONFIG.n_head, CONFIG.head_size, 4
    # float32: parts, scores and sums read, the result written
    assert case.bytes == 4 * rows * heads * (4 * (size + 2) + size)


def reads_all_chunks(
    mixed: Tensor,
    stats: Tensor,
    positions: Tensor,
    limits: Tensor,
    out: Tensor,
    tiles: AttentionTiles,
    **_: bool,
) -> None:
    last = torch.full_like(positions, mixed.shape[2] * tiles.chunk)
    combine_reference(mixed, stats, last, last + 1, out, tiles.chunk)


def weighs_alike(
    mixed: Tensor,
    stats: Tensor,
    positions: Tensor,
    limits: Tensor,
    out: Tensor,
    tiles: AttentionTiles,
    **_: bool,
) -> None:
    combine_reference(mixed, torch.ones_like(stats), positions, limits, out, tiles.chunk)


@pytest.mark.parametrize("wrong", [reads_all_chunks, weighs_alike])
def test_a_wrong_combination_is_found(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., None]
) -> None:
    """Fails if chunks beyond the context, or the chunks' weights, make no difference to the
    comparison.
    """
    monkeypatch.setattr(kernel_cases, "combine", wrong)
    found = [
        case.operation
        for case in cases(plain())
        if bench_kernels.is_wrong(case, case.error(), torch.bfloat16)
    ]
    assert found == ["combine"]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32)],
    ids=str,
)
def test_combine_alone_is_the_kernel_that_ends_a_steps_attention(
    monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype
) -> None:
    """Fails if `combine` is timed for other chunks, or launched otherwise, than within
    `attention`.
    """
    launched: dict[tuple[str, int], list[Build]] = {}
    shapes = [
        BatchShape.of(rows, bench_kernels.config_of("GPT-B").block_size, 16)
        for rows in (2, MANY_ROWS + 2)
    ]
    batches = {shape: Batch(shape, torch.device("cpu")) for shape in shapes}
    with launches_of(capability) as builds:

        def written_down(case: Case, setting: Setting, *_: object) -> dict[str, Any]:
            builds.clear()
            if case.operation in ("attention", "combine", "gate"):
                case.run(0)
            launched[case.operation, setting.rows] = list(builds)
            return {}

        monkeypatch.setattr(kernel_cases, "combine", combine)
        monkeypatch.setattr(
            kernel_cases, "Batch", lambda shape, device: without_memory(batches[shape])
        )
        monkeypatch.setattr(bench_kernels, "measure", written_down)
        monkeypatch.setattr(
            bench_kernels, "measure_ceilings", lambda device, dtype: Ceilings(1e12, 1e12)
        )
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1)
        )
        typed = asked([2, MANY_ROWS + 2], 40, dtype)
        bench_kernels.measure_model("GPT-B", typed, Table({}))
    hopper = capability == 90 and dtype.itemsize == 2
    for rows in [2] if hopper else [2, MANY_ROWS + 2]:
        assert [build.name for build in launched["combine", rows]] == ["_combine_kernel"]
        assert launched["combine", rows] == launched["attention", rows][1:]
    names = {key: [build.name for build in builds] for key, builds in launched.items()}
    assert ("gate", 2) not in names
    if hopper:
        assert names["attention", MANY_ROWS + 2] == ["_many_rows_attention_kernel"]
        assert not {("combine", MANY_ROWS + 2), ("gate", MANY_ROWS + 2)} & set(names)
    else:
        assert names["gate", MANY_ROWS + 2] == ["_gate_kernel"]


def test_fused_products_are_measured_where_a_step_runs_them() -> None:
    """Fails if a kernel is timed that no step runs, or one that it runs is not called."""
    called: list[str] = []

    def counted(name: str) -> Callable[..., None]:
        def run(*tensors: Tensor, **options: float) -> None:
            called.append(name)
            getattr(reference_products(), name)(*tensors, **options)

        return run

    counting: dict[str, Any] = {
        name: counted(name) for name in ("linear", "project", "swiglu", "head")
    }
    products = replace(reference_products(), **counting)
    for rows in (MANY_ROWS, MANY_ROWS + 2):
        called.clear()
        for case in cases(fused(rows, products)):
            case.run(0)
        assert called == ["linear", "project", "swiglu", "project", "head"]


@pytest.mark.parametrize(
    ("capability", "dtype", "fuses"),
    [
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
        ((8, 0), torch.bfloat16, False),
    ],
    ids=str,
)
def test_kernels_are_those_that_the_engine_selects(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, fuses: bool
) -> None:
    """Fails if the benchmark makes its own choice of kernels, and times others than a step on that
    GPU runs.
    """
    settings = measured_settings(monkeypatch, capability, dtype, [MANY_ROWS, MANY_ROWS + 2])
    assert [setting.factory.kind(setting.rows) is FusedLayers for setting in settings] == [
        fuses,
        fuses,
    ]


def norms_by_one_block(
    x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float
) -> None:
    """A product that takes the first block of squares for all."""
    reference_products().linear(x, squares[:1], weight, out, eps=eps)


def leaves_undone(index: int) -> Callable[..., None]:
    """A product that does not add to the residual stream, or leaves NaN in another of residual,
    gain, normed and squares.
    """

    def project(x: Tensor, weight: Tensor, *changed: Tensor) -> None:
        kept = changed[index].clone()
        reference_products().project(x, weight, *changed)
        changed[index].copy_(kept if index == 0 else torch.full_like(kept, math.nan))

    return project


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        ("qkv product", {"linear": norms_by_one_block}),
        ("output product", {"project": leaves_undone(0)}),  # the residual stream
        ("output product", {"project": leaves_undone(2)}),  # the next product's input
        ("down product", {"project": leaves_undone(3)}),  # the squares
        ("swiglu", {"swiglu": lambda x, squares, weight, out, *, eps: out.zero_()}),
        ("head", {"head": lambda x, squares, weight, out, *, eps: out.fill_(math.nan)}),
    ],
)
def test_a_wrong_fused_product_is_found(operation: str, wrong: dict[str, Any]) -> None:
    """Fails if a case looks at only some of what a product writes, or NaN in one result passes
    beside another that is right.
    """
    found = [
        case.operation
        for case in cases(fused(products=replace(reference_products(), **wrong)))
        if bench_kernels.is_wrong(case, case.error(), torch.bfloat16)
    ]
    assert operation in found
    assert set(found) <= {operation, "output product", "down product"}


def test_the_cases_floors_are_those_of_a_step(setting: Setting) -> None:
    """Fails if a shape is not the model's, or bytes are counted otherwise than in every other
    report.
    """
    ceilings = Ceilings(1e12, 1e12)  # few operations a byte: products are bound by them
    seconds = {
        case.operation: bench_kernels.floor_seconds(case, ceilings) for case in cases(setting)
    }
    layers = ("qkv product", "output product", "swiglu", "down product", "attention")
    step = CONFIG.n_layer * sum(seconds[name] for name in layers) + seconds["head"]
    pages = {None: "auto", torch.int8: "int8", FP8: "fp8"}[setting.page_dtype]
    floor = Floor(setting.config, 4, ceilings, setting.quantization, pages)
    near = 1e-6 if setting.quantization is None else 0.03  # a floor has no scales of outputs
    assert step == pytest.approx(floor.step_seconds(4, 4 * 33), rel=near)


def test_copies_are_too_many_for_a_cache(setting: Setting) -> None:
    """Fails if weights that are still in the cache flatter a kernel."""
    for case in cases(setting):
        assert case.copies == 1 or case.copies * case.bytes >= min(10**6, 2 * case.bytes)
        if case.operation in PRODUCTS:
            assert case.copies * case.bytes >= 10**6


def test_a_wrong_result_is_called_wrong() -> None:
    """Fails if NaN, zeros or another token pass for the reference's result."""
    right = torch.ones(3)
    assert relative_error(right, right) == 0
    assert relative_error(torch.zeros(3), right) == 1
    case = Case("head", "", 0, print, lambda: 0.0)
    draw = Case("draw", "", 0, print, lambda: 0.0)
    assert not bench_kernels.is_wrong(case, 1e-5, torch.float32)
    assert bench_kernels.is_wrong(case, math.nan, torch.bfloat16)
    assert bench_kernels.is_wrong(case, 0.1, torch.bfloat16)
    assert bench_kernels.is_wrong(draw, 0.5, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    """Fails if the script ends in a traceback."""
    with pytest.raises(UserError, match="a GPU of compute capability"):
        bench_kernels.main([])
