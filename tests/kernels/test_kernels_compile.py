"""Every Triton kernel compiled for each architecture as the engine launches it, without a GPU: for
the published models, and the attention for every head size that it is said to have.
"""

import importlib
import pkgutil
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from compiled import Build, launches_of, overwritten_operands, resources
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import kernels
from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.exchange import Exchange
from autoregressive.serve.engine.model_runner import ModelRunner, quantize_as_configured
from autoregressive.serve.engine.vq_forward import VQForward
from kernels.attention import HEAD_SIZES
from kernels.hopper.many_rows_products import many_rows_exchange
from kernels.hopper.peers import Inboxes
from kernels.hopper.products import project_exchange
from tokenizer.tokenizer_image.vq_model import VQ_CONFIGS, VQConfig, VQModel

TOKENIZERS = {
    "VQ-16": VQ_CONFIGS["VQ-16"],
    "VQ-16 cut short": VQConfig(ch_mult=(1, 1), num_res_blocks=1),
}
# Sequences and windows of passes: the smallest and the largest tile of few rows, and of many rows;
# and windows of several tokens.
FEW_ROWS, MOST_OWN_ROWS, MANY_ROWS, MOST_ROWS = (2, 1), (64, 1), (128, 1), (512, 1)
WINDOW, LONG_WINDOW = (2, 4), (2, 16)


# bytes that a program may have
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}


@dataclass(frozen=True)
class Case:
    """A model's step, or the decoding of its pixels, on an architecture."""

    model: str
    capability: int
    dtype: torch.dtype = torch.bfloat16
    passes: tuple[tuple[int, int], ...] = (FEW_ROWS,)

    def __str__(self) -> str:
        return f"{self.model}-sm_{self.capability}-{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class AttentionCase:
    """The attention of a head size on an architecture."""

    head_size: int
    capability: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.head_size}-sm_{self.capability}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    *(Case(model, 90, passes=(FEW_ROWS, MOST_OWN_ROWS)) for model in ("GPT-L", "GPT-XXL")),
    Case("GPT-XL", 90, passes=(FEW_ROWS, MOST_OWN_ROWS, MOST_ROWS)),
    *(
        Case(model, 90, passes=(FEW_ROWS, MOST_OWN_ROWS, MANY_ROWS, WINDOW))
        for model in ("GPT-B", "GPT-3B")
    ),
    *(
        Case(model, capability, passes=(FEW_ROWS, MANY_ROWS, LONG_WINDOW))
        for model in ("GPT-B", "GPT-3B")
        for capability in (80, 100)
    ),
    Case("GPT-B", 86, passes=(FEW_ROWS, MOST_OWN_ROWS)),  # as 8.9 and 12.0: little shared memory
    Case("GPT-B", 90, torch.float16),
    Case("GPT-B", 90, torch.float32, passes=(FEW_ROWS, MANY_ROWS)),
    Case("VQ-16", 90),
    *(Case("VQ-16 cut short", capability) for capability in (80, 100)),
]

# An architecture, the weights and the pages.
QUANTIZED_CASES = [
    (80, "int8", "int8"),
    (80, "int4", "auto"),
    (86, "int8", "int8"),
    (90, "fp8", "fp8"),
    (90, "int8", "int8"),
    (90, "int4", "int8"),
    (100, "fp8", "fp8"),
]
ONLY_ON_HOPPER = (
    "_fused_",
    "_gather_",
    "_hopper_",
    "_many_rows_",
    "_quantized_",
    "_scaled_",
)

ATTENTION_KERNELS = {"_attention_kernel", "_hopper_attention_kernel", "_combine_kernel"}
ATTENTION_CASES = [
    AttentionCase(head_size, capability, dtype)
    for head_size in HEAD_SIZES
    for capability in (80, 90, 100)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    # The published models, above, have 64 and 100 in bf16. The two 16-bit types differ in nothing
    # but the instructions for a product, so that one of them stands for both elsewhere.
    if dtype != (torch.bfloat16 if head_size in (64, 100) else torch.float16)
]


@cache
def builds_of(case: Case) -> list[Build]:
    """What the case launches."""
    if case.model in GPT_SHAPES:
        shape = GPT_SHAPES[case.model]
        return step_builds(shape.dim, shape.n_head, case.capability, case.dtype, case.passes)
    with launches_of(case.capability) as builds:
        VQForward(VQModel(TOKENIZERS[case.model]).eval(), grid=24)(
            torch.zeros(8, 576, dtype=torch.int32)
        )
    return builds


@cache
def quantized_builds(capability: int, weights: str, pages: str, model: str) -> list[Build]:
    """What a model's steps launch with quantised weights and pages."""
    shape, config = GPT_SHAPES[model], EngineConfig(quantization=weights, kv_cache_dtype=pages)
    passes = [FEW_ROWS, MOST_OWN_ROWS, MANY_ROWS, WINDOW]
    if capability == 90:
        passes.append(MOST_ROWS)  # in the largest tiles
    return step_builds(shape.dim, shape.n_head, capability, torch.bfloat16, tuple(passes), config)


RANK_PASSES = (FEW_ROWS, MOST_OWN_ROWS, MANY_ROWS, WINDOW)


class PeersElsewhere(Exchange):
    """One of two ranks whose GPUs reach each other's memory."""

    reaches_memory = True

    def gather(self, own: Tensor, parts: Tensor) -> None:
        raise NotImplementedError

    inboxes = dict.fromkeys(("attention", "ffn", "logits"), Inboxes((2**40, 2**41), own=1))


@cache
def rank_builds(model: str) -> list[Build]:
    """What one of two ranks on Hopper launches."""
    shape, rank = GPT_SHAPES[model], PeersElsewhere()
    return step_builds(shape.dim, shape.n_head, 90, torch.bfloat16, RANK_PASSES, exchange=rank)


def step_builds(
    width: int,
    heads: int,
    capability: int,
    dtype: torch.dtype,
    passes: tuple[tuple[int, int], ...],
    quantized: EngineConfig | None = None,
    exchange: Exchange | None = None,
) -> list[Build]:
    """What steps of one layer launch.

    Args:
        quantized: how weights and pages are.
        exchange: of one of two ranks that share the model.
    """
    shape = BatchShape.of(max(rows for rows, _ in passes), 576, 16)
    real = vars(Batch(shape, torch.device("cpu")))
    with launches_of(capability) as builds:
        torch.set_default_dtype(dtype)  # tensors that are not there cannot be converted
        try:
            gpt = Transformer(
                GPTConfig(
                    dim=width,
                    n_layer=1,
                    n_head=heads,
                    block_size=shape.tokens,
                    ranks=1 if exchange is None else 2,
                )
            ).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        tensors = {
            name: torch.zeros(value.shape, dtype=value.dtype)
            for name, value in real.items()
            if isinstance(value, Tensor)
        }
        batch = cast(Batch, SimpleNamespace(**tensors))
        if quantized is not None:
            quantize_as_configured(gpt, quantized)
        for rows, window in passes:
            config = replace(quantized or EngineConfig(), lookahead=window if window > 1 else "off")
            pages = shape.max_rows * shape.pages_per_row
            ModelRunner(gpt, shape, pages, config, exchange)._pass(batch, rows, window)
    return builds


def all_kernels() -> set[str]:
    """The names of the kernels in `kernels`."""
    names = [module.name for module in pkgutil.walk_packages(kernels.__path__, "kernels.")]
    modules = [importlib.import_module(name) for name in names]
    found = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    }
    return {name for name in found if name.endswith("_kernel")}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_has_a_case(capability: int) -> None:
    """Fails if a kernel was added that no case launches: nobody would know whether it compiles for
    that architecture.
    """
    builds = [
        *(build for case in CASES if case.capability == capability for build in builds_of(case)),
        *(
            build
            for case in QUANTIZED_CASES
            if case[0] == capability
            for build in quantized_builds(*case, "GPT-B")
        ),
        *(rank_builds("GPT-B") if capability == 90 else ()),
    ]
    launched = {build.name for build in builds}
    # Hopper has its own beside those that it runs in float32.
    expected = {
        name for name in all_kernels() if capability == 90 or not name.startswith(ONLY_ON_HOPPER)
    }
    assert launched == expected
    assert len(launched) >= 10


def check_compiles(build: Build, capability: int, *, waits: bool) -> CompiledKernel:
    """Guards against what an architecture refuses, tiles too large for a GPU, and dependent launch
    where there is none.

    Args:
        waits: whether kernels launched like this one wait for the one before them.
    """
    compiled = build.compiled(capability)
    assert f"sm_{capability}" in compiled.asm["ptx"]
    assert compiled.metadata.shared + exchanged_by(build) <= SHARED_MEMORY[capability], build
    assert ("griddepcontrol" in compiled.asm["ptx"]) == waits, build
    assert waits or not dict(build.options).get("launch_pdl"), build
    return compiled


def exchanged_by(build: Build) -> int:
    """Shared memory that a cluster takes beside what Triton lays out."""
    size = dict(build.constants)
    if build.name in ("_fused_project_kernel", "_quantized_project_kernel"):
        return project_exchange(size["OUTPUT_TILE"], size["ROW_TILE"], size["CLUSTER"])
    if build.name == "_many_rows_project_kernel":
        return many_rows_exchange(size["ROW_TILE"], size["CLUSTER"])
    return 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_launched_compiles(case: Case) -> None:
    """Fails if an architecture refuses a kernel, dependent launch reaches one that has none, or a
    tile is too large for a GPU.
    """
    builds = builds_of(case)
    assert builds
    for build in builds:
        compiled = check_compiles(
            build, case.capability, waits=case.capability >= 90 and case.model in GPT_SHAPES
        )
        if case.capability == 90 and case.dtype == torch.bfloat16:
            # The draw's rounds keep a few scalars in memory, next to no time; no tile is there.
            assert resources(compiled).local_bytes <= (32 if build.name == "_draw_kernel" else 0), (
                build
            )


@pytest.mark.parametrize("model", ["GPT-B", "GPT-3B"])
@pytest.mark.parametrize(("capability", "weights", "pages"), QUANTIZED_CASES)
def test_kernels_of_quantised_weights_and_pages_compile(
    capability: int, weights: str, pages: str, model: str
) -> None:
    """Fails if an architecture refuses to convert weights or pages, or a tile is too large for a
    GPU, or Hopper runs the kernels that run everywhere.
    """
    builds = quantized_builds(capability, weights, pages, model)
    of_weights = {"_linear_kernel", "_swiglu_kernel"}
    of_pages = {"_attention_kernel"} if pages != "auto" else set()
    if capability == 90:
        of_pages = {"_scaled_attention_kernel", "_many_rows_scaled_attention_kernel"}
        if weights != "int4":
            names = "linear", "project", "swiglu"
            of_weights = {f"_quantized_{name}_kernel" for name in names}
            of_weights |= {f"_many_rows_quantized_{name}_kernel" for name in names}
    of_quantized = of_weights | of_pages
    launched = {build.name for build in builds}
    assert of_quantized <= launched
    if capability == 90:
        assert "_attention_kernel" not in launched
    for build in builds:
        if build.name in of_quantized:
            compiled = check_compiles(build, capability, waits=capability >= 90)
            if build.name.startswith(ONLY_ON_HOPPER):
                assert overwritten_operands(compiled) == [], build
                # int4's products leave many partial sums; those of a window do not fit together.
                # Warps that find the scales of GPT-3B's rows keep two numbers in memory.
                most = 8 if build.name.startswith("_many_rows_quantized_") else 0
                assert weights == "int4" or resources(compiled).local_bytes <= most, build


@pytest.mark.parametrize("model", ["GPT-B", "GPT-3B"])
def test_kernels_of_ranks_compile(model: str) -> None:
    """Fails if the exchange between GPUs, or a part's size, is refused or spills registers, or if
    ranks launch other kernels than one GPU does.
    """
    builds = rank_builds(model)
    alone = {build.name for build in builds_of(Case(model, 90, passes=RANK_PASSES))}
    launched = {build.name for build in builds}
    assert launched - alone == {"_gather_parts_kernel"}
    assert alone - launched == {"_many_rows_project_kernel"}
    for build in builds:
        if "RANKS" in dict(build.constants) or build.name.startswith("_fused_"):
            compiled = check_compiles(build, 90, waits=True)
            # the parts' kernel keeps a few scalars in memory
            most = 16 if build.name == "_gather_parts_kernel" else 0
            assert resources(compiled).local_bytes <= most, build


def test_no_head_size_is_dropped() -> None:
    """Fails if a head size loses its kernels, and with them its cases below: torch's attention
    would take their place.
    """
    assert HEAD_SIZES == (64, 80, 96, 100, 112, 128, 256)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_the_attention_of_every_head_size_compiles(case: AttentionCase) -> None:
    """Fails if a head size is promised that an architecture refuses, or whose keys and values do
    not fit a program's registers.
    """
    heads = 4
    builds = step_builds(heads * case.head_size, heads, case.capability, case.dtype, (FEW_ROWS,))
    builds = [build for build in builds if build.name in ATTENTION_KERNELS]
    hopper = case.capability == 90 and case.dtype.itemsize == 2
    assert {build.name for build in builds} == {
        "_hopper_attention_kernel" if hopper else "_attention_kernel",
        "_combine_kernel",
    }
    assert len(builds) == 2
    for build in builds:
        assert dict(build.constants)["HEAD_SIZE"] == case.head_size
        compiled = check_compiles(build, case.capability, waits=case.capability >= 90)
        # A thread's share of a chunk's keys is 256 bytes: below, it is scalars that lie in memory.
        # (Not so in float32 from head size 80 on, nor, for the chunks' results that are combined,
        # at 256.)
        if case.dtype.itemsize == 2 and build.name != "_combine_kernel":
            assert resources(compiled).local_bytes <= 64, build
