"""Every Triton kernel compiled for each architecture, as the engine launches it for the published models, without a GPU."""

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from compiled import Build, launches_of, resources
from torch import Tensor
from triton.runtime.jit import JITFunction

import kernels
from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.model_runner import ModelRunner, RunnerConfig
from autoregressive.serve.engine.vq_forward import VQForward
from kernels.hopper_cluster import exchange_bytes
from tokenizer.tokenizer_image.vq_model import VQ_CONFIGS, VQConfig, VQModel

TOKENIZERS = {"VQ-16": VQ_CONFIGS["VQ-16"], "VQ-16 cut short": VQConfig(ch_mult=(1, 1), num_res_blocks=1)}
FEW_ROWS, MOST_OWN_ROWS, MANY_ROWS = 2, 64, 128  # the smallest tile of rows, the largest, and products by a library


SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have


@dataclass(frozen=True)
class Case:
    """A model's step, or the decoding of its pixels, on an architecture."""

    model: str
    capability: int
    dtype: torch.dtype = torch.bfloat16
    rows: tuple[int, ...] = (FEW_ROWS,)

    def __str__(self) -> str:
        return f"{self.model}-sm_{self.capability}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    *(Case(model, 90, rows=(FEW_ROWS, MOST_OWN_ROWS)) for model in ("GPT-L", "GPT-XL", "GPT-XXL")),
    *(Case(model, 90, rows=(FEW_ROWS, MOST_OWN_ROWS, MANY_ROWS)) for model in ("GPT-B", "GPT-3B")),
    *(Case(model, capability, rows=(FEW_ROWS, MANY_ROWS)) for model in ("GPT-B", "GPT-3B") for capability in (80, 100)),
    Case("GPT-B", 86, rows=(FEW_ROWS, MOST_OWN_ROWS)),  # as 8.9 and 12.0: little shared memory
    Case("GPT-B", 90, torch.float16),
    Case("GPT-B", 90, torch.float32),
    Case("VQ-16", 90),
    *(Case("VQ-16 cut short", capability) for capability in (80, 100)),
]


@cache
def builds_of(case: Case) -> list[Build]:
    """What the case launches."""
    shape = BatchShape.of(max(case.rows), 576, 16)
    real = vars(Batch(shape, torch.device("cpu")))
    with launches_of(case.capability) as builds:
        if case.model in TOKENIZERS:
            VQForward(VQModel(TOKENIZERS[case.model]).eval(), grid=24)(torch.zeros(8, 576, dtype=torch.int32))
            return builds
        model = GPT_SHAPES[case.model]
        torch.set_default_dtype(case.dtype)  # tensors that are not there cannot be converted
        try:
            gpt = Transformer(GPTConfig(dim=model.dim, n_layer=1, n_head=model.n_head, block_size=shape.tokens)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        runner = ModelRunner(gpt, shape, shape.max_rows * shape.pages_per_row, RunnerConfig())
        batch = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in real.items() if isinstance(value, Tensor)}
        for rows in case.rows:
            runner._step(cast(Batch, SimpleNamespace(**batch)), rows)
    return builds


def all_kernels() -> set[str]:
    """The names of the kernels in `kernels`."""
    modules = [importlib.import_module(f"kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
    found = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_has_a_case(capability: int) -> None:
    """Fails if a kernel was added that no case launches: nobody would know whether it compiles for that architecture."""
    launched = {build.name for case in CASES if case.capability == capability for build in builds_of(case)}
    # Hopper has its own beside those that it runs in float32.
    expected = {name for name in all_kernels() if capability == 90 or not name.startswith(("_stream_", "_hopper_"))}
    assert launched == expected
    assert len(launched) >= 10


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_launched_compiles(case: Case) -> None:
    """Fails if an architecture refuses a kernel, dependent launch reaches one that has none, or a tile is too large for a GPU."""
    builds = builds_of(case)
    assert builds
    for build in builds:
        compiled = build.compiled(case.capability)
        assert f"sm_{case.capability}" in compiled.asm["ptx"]
        size = dict(build.constants)
        exchange = exchange_bytes(size["OUTPUT_TILE"], size["ROW_TILE"], size["CLUSTER"]) if "CLUSTER" in size else 0
        assert exchange <= 48 * 1024, build  # more a program cannot have beside what Triton asks for
        assert compiled.metadata.shared + exchange <= SHARED_MEMORY[case.capability], build
        waits = "griddepcontrol" in compiled.asm["ptx"]
        assert waits == (case.capability >= 90 and case.model in GPT_SHAPES), build
        assert waits or not dict(build.options).get("launch_pdl"), build
        if case.capability == 90 and case.dtype == torch.bfloat16:
            # The draw's rounds and the attention of head size 100 keep a few scalars in memory, next to no time; no tile is there.
            allowed_bytes = {"_draw_kernel": 8, "_attention_kernel": 16}.get(build.name, 0)
            assert resources(compiled).local_bytes <= allowed_bytes, build
