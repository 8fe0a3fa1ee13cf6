"""What steps take of a GPU beside weights and pages is known before the pages are made; on a GPU
that is not there.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiled import launches_of

from autoregressive.errors import UserError
from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine import memory as engine_memory
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.kv_pages import page_bytes, page_dtype
from autoregressive.serve.engine.memory import pool_pages
from autoregressive.serve.engine.model_runner import (
    ModelRunner,
    StepBytes,
    pass_sizes,
    row_buckets,
)
from kernels.operations import MANY_ROWS

GIB = 2**30


@contextmanager
def gpt_on_a_gpu(
    dtype: torch.dtype, capability: int = 90, heads: int | None = None
) -> Iterator[Transformer]:
    """Two layers of GPT-XL, or as wide ones with other heads, in tensors that have no memory;
    nothing is launched within.
    """
    shape = GPT_SHAPES["GPT-XL"]
    with launches_of(capability):
        torch.set_default_dtype(dtype)
        try:
            gpt = Transformer(
                GPTConfig(dim=shape.dim, n_layer=2, n_head=heads or shape.n_head, block_size=576)
            ).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        yield gpt


def held_bytes(runner: ModelRunner, row_counts: Iterable[int]) -> int:
    """Scratch memory of the layers for these numbers of rows together; what they share
    counts once.
    """
    held = [value for rows in row_counts for value in vars(runner.layers_for(rows)).values()]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    return sum(
        {
            storage._cdata: storage.nbytes()
            for storage in (tensor.untyped_storage() for tensor in tensors)
        }.values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [2, 70])  # up to 64 and above, kernels of our own and a library's
@pytest.mark.parametrize(
    "config", [EngineConfig(), EngineConfig(deterministic=True), EngineConfig(enforce_eager=True)]
)
def test_what_steps_take_is_known_before(
    dtype: torch.dtype, rows: int, config: EngineConfig
) -> None:
    """Fails if a tensor of a step is allocated that the forecast leaves out or counts otherwise, or
    is allocated twice.
    """
    shape = BatchShape.of(rows, tokens=576, page_size=16)
    with gpt_on_a_gpu(dtype) as gpt:
        forecast = StepBytes.of(gpt, shape, config)
        counts = range(1, rows + 1) if config.enforce_eager else row_buckets(rows)
        assert held_bytes(ModelRunner(gpt, shape, 1, config), counts) == forecast.scratch
        assert forecast.gathered == 0  # the kernel runs


@pytest.mark.parametrize("window", range(1, 65))
def test_padding_does_not_change_the_order_of_sums(window: int) -> None:
    """Fails if a pass of few positions is padded to so many that a library computes its products:
    its tokens would not be those of one token a pass.
    """
    config = EngineConfig(lookahead=window)
    shape = BatchShape.of(config.max_num_seqs, tokens=576, page_size=16)
    with gpt_on_a_gpu(torch.bfloat16) as gpt:
        sizes = pass_sizes(gpt, shape, config)
    for rows in range(1, MANY_ROWS // window + 1):
        assert min(count for count, _ in sizes if count >= rows) * window <= MANY_ROWS


def test_pages_leave_room_for_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if pages take the memory that steps of many rows need: several GiB in float32,
    deterministic.
    """
    monkeypatch.setattr(engine_memory, "memory_of", lambda device: (40 * GIB, 40 * GIB))
    config = EngineConfig(max_num_seqs=4096, deterministic=True)
    shape = BatchShape.of(config.max_num_seqs, tokens=576, page_size=16)
    with gpt_on_a_gpu(torch.float32) as gpt:
        bytes_of_page = page_bytes(gpt, 16, page_dtype(gpt, config))
        steps_bytes = StepBytes.of(gpt, shape, config).scratch
        pages_bytes = pool_pages(gpt, shape, config) * bytes_of_page
        assert steps_bytes > 3 * GIB
        # of 36, two are for graphs and libraries
        assert 34 * GIB - bytes_of_page < pages_bytes + steps_bytes <= 34 * GIB
        with pytest.raises(ValueError, match="lower num_pages to"):
            pool_pages(gpt, shape, replace(config, num_pages=40 * GIB // bytes_of_page))


def test_a_gpu_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an engine starts with an empty pool, or the line does not say how much is missing
    and what to do.
    """
    config = EngineConfig(max_num_seqs=64, gpu_memory_utilization=0.5)
    shape = BatchShape.of(64, tokens=576, page_size=16)
    with gpt_on_a_gpu(torch.bfloat16) as gpt:
        monkeypatch.setattr(engine_memory, "memory_of", lambda device: (5 * GIB, 16 * GIB))
        expected = (
            "no memory for the KV cache: cuda:0 has 5.0 GiB of 16.0 GiB free, "
            "gpu_memory_utilization is 0.5, 2.0 GiB are kept "
            "for graphs and steps of 64 rows, a page of 16 tokens takes 0.2 MiB: raise "
            "gpu_memory_utilization, lower max_num_"
        )
        with pytest.raises(ValueError, match=re.escape(expected)):
            pool_pages(gpt, shape, config)
        monkeypatch.setattr(engine_memory, "memory_of", lambda device: (2**20, 16 * GIB))
        with pytest.raises(
            ValueError,
            match=r"^max_num_seqs 64: steps of so many rows take .* lower max_num_seqs or",
        ):
            pool_pages(gpt, shape, config)


@pytest.mark.parametrize(("ranks", "engines"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_engines_and_ranks_on_a_cpu_share_its_memory(
    monkeypatch: pytest.MonkeyPatch, ranks: int, engines: int
) -> None:
    """Fails if several engines or ranks on a CPU take the pages of one each."""
    monkeypatch.setattr(engine_memory, "memory_of", lambda device: (6 * GIB, 6 * GIB))
    config = EngineConfig(tensor_parallel_size=ranks, engines_on_cpu=engines)
    shape = BatchShape.of(config.max_num_seqs, tokens=576, page_size=16)
    gpt_shape = GPTConfig(dim=1280, n_layer=2, n_head=20, block_size=576, ranks=ranks)
    gpt = Transformer(gpt_shape).eval()
    taken = ranks * engines * pool_pages(gpt, shape, config)
    taken *= page_bytes(gpt, 16, torch.float32)
    assert 1.45 * GIB < taken <= 1.5 * GIB  # a quarter


def test_torchs_attention_is_reckoned_with() -> None:
    """Fails if a GPU without Triton, where attention gathers every row's keys and values, fills
    that memory with pages.
    """
    shape = BatchShape.of(64, tokens=576, page_size=16)
    least = 64 * 576 * GPT_SHAPES["GPT-XL"].dim * 2 * 4  # keys and values in float32, of one layer
    with gpt_on_a_gpu(torch.float16, capability=75) as gpt:
        gathered = StepBytes.of(gpt, shape, EngineConfig()).gathered
        assert least < gathered < 2 * least
        with_scores = StepBytes.of(gpt, shape, EngineConfig(lookahead=64)).gathered
        scores = 64 * 64 * gpt.config.n_head * 576 * 4  # rows, window
        assert scores < with_scores - gathered < 4 * scores


@pytest.mark.parametrize(("capability", "heads"), [(75, 20), (90, 40)])
def test_auto_is_off_where_torch_attends_on_a_gpu(capability: int, heads: int) -> None:
    """Fails if "auto" looks ahead on a GPU whose attention is torch's, for its age or for the size
    of the heads: the tokens would depend on the window.
    """
    shape = BatchShape.of(8, tokens=576, page_size=16)
    with gpt_on_a_gpu(torch.float16, capability, heads) as gpt:
        assert {window for _, window in pass_sizes(gpt, shape, EngineConfig())} == {1}
        assert pass_sizes(gpt, shape, EngineConfig(lookahead=4))[0][1] == 4
    with gpt_on_a_gpu(torch.float16) as gpt:
        assert {window for _, window in pass_sizes(gpt, shape, EngineConfig())} == {1, 2, 4, 8}


def test_more_logits_than_a_draw_addresses_are_refused() -> None:
    """Fails if so many positions a pass end in an error of a kernel, while graphs are captured."""
    shape = BatchShape.of(2048, tokens=576, page_size=16)
    with gpt_on_a_gpu(torch.bfloat16) as gpt:
        assert pass_sizes(gpt, shape, EngineConfig(2048, lookahead=63))
        expected = (
            "lookahead 64: 2048 rows make passes of 131072 positions; at most 131071 can be: lower "
            "lookahead or lower max_num_seqs"
        )
        with pytest.raises(UserError, match=re.escape(expected)):
            pass_sizes(gpt, shape, EngineConfig(2048, lookahead=64))


@pytest.mark.parametrize(
    ("word", "limited"),
    [("1073741824\n", True), ("max\n", False), ("9223372036854771712\n", False), (None, False)],
)
def test_a_containers_limit_bounds_the_pages_of_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str | None, limited: bool
) -> None:
    """Fails if an engine in a container takes its share of the whole machine's memory, and is
    killed for it.
    """
    path = tmp_path / "memory.max"
    if word is not None:
        path.write_text(word)
    monkeypatch.setattr(engine_memory, "_CONTAINER_LIMITS", ())
    everything = engine_memory.memory_of(torch.device("cpu"))
    monkeypatch.setattr(engine_memory, "_CONTAINER_LIMITS", (path,))
    assert everything[0] > GIB
    assert engine_memory.memory_of(torch.device("cpu")) == ((GIB, GIB) if limited else everything)
