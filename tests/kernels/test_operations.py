"""Which operations a step gets where Triton's kernels do not run or have no such head size, and
what the user is told.
"""

from dataclasses import replace

import pytest
import torch
from compiled import launches_of, without_memory

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.batch import Batch, BatchShape
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.model_runner import ModelRunner, StepBytes, check_device
from autoregressive.serve.engine.vq_forward import group_norm_kernels_run
from kernels.attention import HEAD_SIZES
from kernels.attention_reference import attention_reference
from kernels.operations import select_operations, torch_operations

CUDA = torch.device("cuda")
WIDTH = 288  # four heads of 72, or three of 96
ATTENTION = {"_attention_kernel", "_hopper_attention_kernel", "_combine_kernel"}


def step_kernels(capability: int, dtype: torch.dtype, heads: int) -> set[str]:
    """The Triton kernels that a step launches on a GPU of that capability, backend auto, once the
    engine has counted its bytes.
    """
    shape = BatchShape.of(2, 64, 16)
    real = Batch(shape, torch.device("cpu"))
    with launches_of(capability) as builds:
        torch.set_default_dtype(dtype)  # tensors that are not there cannot be converted
        try:
            gpt = Transformer(
                GPTConfig(
                    dim=WIDTH, n_layer=2, n_head=heads, vocab_size=512, block_size=shape.tokens
                )
            ).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        StepBytes.of(gpt, shape, EngineConfig())
        runner = ModelRunner(gpt, shape, shape.max_rows * shape.pages_per_row, EngineConfig())
        # made on the host, whatever the default
        rotary = torch.empty_like(runner.weights.rotary, device=CUDA)
        runner.weights = replace(runner.weights, rotary=rotary)
        runner._pass(without_memory(real), 2, window=1)
    return {build.name for build in builds}


def test_a_gpu_below_8_0_runs_torchs_operations_and_is_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if an older GPU is given a Triton kernel, or its user is told nothing, or again by
    every layer and every count.
    """
    assert step_kernels(75, torch.float16, heads=3) == set()
    told = capsys.readouterr().err
    assert told.count("compute capability is below 8.0") == 1, told
    assert len(told.splitlines()) == 1, told


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, torch.float32), (80, torch.bfloat16), (90, torch.float16)],
    ids=str,
)
def test_a_head_size_without_a_kernel_has_torchs_attention_and_nothing_else(
    capsys: pytest.CaptureFixture[str], capability: int, dtype: torch.dtype
) -> None:
    """Fails if head size 72 is given a kernel that does not fit it, loses its other kernels too, or
    falls back in silence.
    """
    kernels = step_kernels(capability, dtype, heads=3)
    assert capsys.readouterr().err == ""
    assert len(kernels & ATTENTION) == 2
    assert step_kernels(capability, dtype, heads=4) == kernels - ATTENTION
    told = capsys.readouterr().err
    assert told.count("head size 72 has no Triton attention") == 1, told
    assert len(told.splitlines()) == 1, told
    assert all(str(size) in told for size in HEAD_SIZES)


def test_torchs_attention_is_not_given_the_kernels_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if memory is taken for chunks that nothing writes, or the engine overlooks what torch's
    attention gathers.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    told: list[str] = []
    operations = select_operations(CUDA, torch.bfloat16, 4, 72, "auto", tell=told.append)
    assert operations.attention is attention_reference
    assert operations.attention_chunks(576) == torch_operations().attention_chunks(576) == 1
    kept = select_operations(CUDA, torch.bfloat16, 4, 96, "auto", tell=told.append)
    assert kept.attention is not attention_reference
    assert kept.attention_chunks(576) > 1
    assert len(told) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_backend_that_was_asked_for_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Fails if `triton` becomes torch in silence where it does not run, or `torch`, which was asked
    for, is explained.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    told: list[str] = []
    with pytest.raises(
        ValueError,
        match=rf"{device} is no GPU of compute capability 8\.0 or above; use auto or torch",
    ):
        check_device(EngineConfig(attention_backend="triton"), torch.device(device))
    operations = select_operations(
        torch.device(device), torch.float16, 4, 64, "torch", tell=told.append
    )
    assert operations.attention is attention_reference
    assert told == []


def test_the_pixel_decoders_group_norms_are_triton_where_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if --attention-backend does not hold for them, or a width without a kernel is passed
    over in silence.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    told: list[str] = []

    def by_triton(device: torch.device, widths: list[int], backend: str) -> bool:
        return group_norm_kernels_run(device, widths, 32, backend, tell=told.append)

    assert by_triton(CUDA, [128, 512], "auto")
    assert by_triton(CUDA, [128, 512], "triton")
    assert not by_triton(CUDA, [128, 512], "torch")
    assert not by_triton(torch.device("cpu"), [128, 512], "auto")
    assert told == []
    assert not by_triton(CUDA, [96, 192], "triton")
    assert told == [
        "a tokenizer of 96, 192 channels has no Triton group norm: torch's takes its place"
    ]
