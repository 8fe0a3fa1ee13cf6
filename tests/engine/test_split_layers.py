"""The layers of ranks that share a model: LlamaGen's stored outputs, and the codes of one rank."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import reference_weights
from fused_runners import FusedRunner
from teacher import TINY, engine_codes, reference_model
from threaded_ranks import ThreadedRanks, ThreadPeers
from torch import Tensor

from autoregressive.errors import SettingError
from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine, RunnerFactory
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.exchange import choose_exchange
from autoregressive.serve.engine.layers import (
    FusedSplitLayers,
    Layers,
    LayersFactory,
    ScratchPlan,
    SplitLayers,
    SplitLibraryLayers,
)
from autoregressive.serve.engine.model_runner import ModelRunner
from kernels.operations import triton_operations
from kernels.tiles import SWIGLU, TileTable

CPU = torch.device("cpu")


FUSED_RANKS = partial(ThreadedRanks, make_runner=FusedRunner, make_exchange=ThreadPeers)


def model_of_four_heads(head_size: int) -> Transformer:
    shape = GPTConfig(dim=4 * head_size, n_layer=2, n_head=4, block_size=36, vocab_size=128)
    model = Transformer(replace(shape, num_classes=8))
    reference_weights(model, 11)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("make_runner", [ThreadedRanks, FUSED_RANKS], ids=["plain", "fused"])
@pytest.mark.parametrize("name", [name for name in TINY if "head100" not in name])
def test_ranks_draw_llamagens_tokens(name: str, make_runner: RunnerFactory) -> None:
    """Fails if a head, a term of a sum or a part of the logits is lost, doubled or taken for that
    of another rank, or if two ranks hold other bits than each other.
    """
    codes, expected = engine_codes(name, CPU, "torch", make_runner)
    assert np.array_equal(codes, expected)


@pytest.mark.parametrize("name", [name for name in TINY if "head100" not in name])
def test_ranks_draw_llamagens_tokens_by_a_librarys_products(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails as the test above, where passes of many rows take the products of cuBLAS."""
    asked: list[torch.dtype | None] = []

    def mm(x: Tensor, weight: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> None:
        """A CPU's product, which has no `out_dtype`."""
        out.copy_(x @ weight)
        asked.append(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(LayersFactory, "kind", lambda factory, rows: SplitLibraryLayers)
    codes, expected = engine_codes(name, CPU, "torch", ThreadedRanks)
    assert np.array_equal(codes, expected)
    # of each layer the output and the down product, and the head, beside two other products
    layers = reference_model(name)[0].config.n_layer
    assert asked.count(torch.float32) * (4 * layers + 1) == len(asked) * (2 * layers + 1) > 0


@pytest.mark.parametrize("lookahead", [3, "auto"])
@pytest.mark.parametrize(("ranks", "head_size"), [(2, 64), (4, 64), (2, 100)])
def test_ranks_draw_one_ranks_codes_whatever_runs_beside(
    ranks: int, head_size: int, lookahead: int | str
) -> None:
    """Fails if the batches of ranks drift apart as images come and go, or with windows."""
    model = model_of_four_heads(head_size)
    config = EngineConfig(max_num_seqs=6, page_size=4, num_pages=40, lookahead=lookahead)  # type: ignore[arg-type]
    jobs = [
        (1, SamplingParams(cfg_scale=2.0, top_k=20, seed=5, n=2)),
        (3, SamplingParams(cfg_scale=1.0, temperature=0.7, seed=6)),
        (0, SamplingParams(cfg_scale=4.0, cfg_interval=3, top_p=0.8, seed=7)),
        (2, SamplingParams(cfg_scale=1.5, temperature=0.0)),
    ]
    drawn: list[list[Tensor]] = []
    for make_runner in (ModelRunner, partial(ThreadedRanks, count=ranks)):
        engine = Engine(model, None, config, make_runner)
        requests = [engine.submit(label, params) for label, params in jobs]
        cancelled = engine.submit(1, SamplingParams(seed=8))
        engine.step()
        engine.cancel(cancelled)
        while engine.wait_for_work(timeout=0):
            engine.step()
            engine.audit()
        drawn.append([request.codes for request in requests if request.codes is not None])
        assert engine.scheduler.pool.used_pages == 0
    assert len(drawn[0]) == len(jobs)
    for one, several in zip(*drawn, strict=True):
        assert len(one.unique()) > 5
        assert torch.equal(one, several)


@pytest.mark.parametrize("pages", ["fp8", "int8"])
def test_ranks_have_scaled_pages(pages: str) -> None:
    """Fails if a rank's scales are those of other heads."""
    model, config = model_of_four_heads(64), EngineConfig(max_num_seqs=4, kv_cache_dtype=pages)
    params = SamplingParams(cfg_scale=2.0, top_k=20, seed=5)
    codes = [
        Engine(model, None, config, make_runner).generate([1, 2], params, decode=False)
        for make_runner in (ModelRunner, partial(ThreadedRanks, count=2))
    ]
    assert len(codes[0].unique()) > 5
    assert torch.equal(*codes)


def test_quantised_weights_are_not_split() -> None:
    """Fails if ranks quantise their parts, whose scales are others than those of one process."""
    with pytest.raises(SettingError, match="quantised weights are not split among processes"):
        EngineConfig(quantization="int8", tensor_parallel_size=2)


def test_a_rank_holds_the_pages_of_its_heads() -> None:
    """Fails if each rank takes the memory of the whole KV cache."""
    model, _, _ = reference_model("gpt_tiny_head64")
    engine = Engine(model, None, EngineConfig(max_num_seqs=4), partial(ThreadedRanks, count=2))
    assert isinstance(engine.runner, ThreadedRanks)
    alone = Engine(model, None, EngineConfig(max_num_seqs=4)).runner
    assert isinstance(alone, ModelRunner)
    for runner in engine.runner.runners:
        assert runner.kv_pages.nbytes * 2 == alone.kv_pages.nbytes


@pytest.mark.parametrize(
    ("make_runner", "kind"),
    [(ThreadedRanks, SplitLayers), (FUSED_RANKS, FusedSplitLayers)],
    ids=["plain", "fused"],
)
def test_a_layer_exchanges_twice_and_the_head_once(
    make_runner: RunnerFactory, kind: type[Layers]
) -> None:
    """Fails if ranks exchange more than they must: each exchange holds up all of them."""
    model, _, _ = reference_model("gpt_tiny_head64")
    engine = Engine(model, None, EngineConfig(4, lookahead="off"), make_runner)
    engine.generate([1], SamplingParams(), decode=False)
    assert isinstance(engine.runner, ThreadedRanks)
    exchange = engine.runner.runners[0].exchange
    assert type(engine.runner.runners[0].layers_for(2, 1)) is kind
    expected = (2 * model.config.n_layer + 1) * engine.totals.passes
    assert getattr(exchange, "calls") == expected  # noqa: B009


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("name", GPT_SHAPES)
def test_the_kernels_take_every_part(name: str, itemsize: int) -> None:
    """Fails if a number of ranks is offered that leaves a part which no tile of a kernel fits."""
    shape = GPT_SHAPES[name]
    for ranks in shape.rank_counts[1:]:
        part = replace(shape, ranks=ranks)
        table = TileTable(itemsize=itemsize)
        operations = triton_operations(table, part.heads_of_rank, part.head_size, launch_pdl=False)
        assert part.ffn_of_rank % table.find(SWIGLU, part.ffn_of_rank, part.dim).outputs == 0
        factory = LayersFactory(part, torch.float32, operations, library=True)
        assert factory.kind(64) is SplitLayers
        assert factory.kind(65) is SplitLibraryLayers
        one_term, own_logits = 512 * part.dim, 512 * part.vocabulary_of_rank
        assert factory.plan([(64, 1), (512, 1)]).shared == {"terms": max(one_term, own_logits)}
        fused = triton_operations(
            table, part.heads_of_rank, part.head_size, launch_pdl=True, hopper=True
        )
        factory = replace(factory, operations=fused)
        assert factory.kind(64) is SplitLayers
        factory = replace(factory, reaches_memory=True)
        assert factory.kind(64) is factory.kind(512) is FusedSplitLayers
        shared = factory.plan([(64, 1), (512, 1)]).shared
        terms = ranks * 512 * part.dim
        logits = 512 * part.vocab_size
        assert shared == {"attention": terms, "ffn": terms, "logits": logits}


@pytest.mark.parametrize(("rows", "qkv"), [(64, torch.float32), (65, torch.bfloat16)])
def test_a_rank_sends_one_float32_term(rows: int, qkv: torch.dtype) -> None:
    """Fails if ranks exchange the partial sums of all splits, or round their terms."""
    part = replace(GPT_SHAPES["GPT-3B"], ranks=2)
    operations = triton_operations(
        TileTable(), part.heads_of_rank, part.head_size, launch_pdl=False
    )
    factory = LayersFactory(part, torch.bfloat16, operations, library=True)
    layers = factory.make(rows, 1, ScratchPlan().count)
    assert isinstance(layers, SplitLayers)
    assert layers.qkv.dtype == qkv
    for term in (layers.projected, layers.down):
        assert term.dtype == torch.float32
        assert term.shape == (1, rows, part.dim)


def test_an_engine_without_its_ranks_is_refused() -> None:
    """Fails if one process draws with half of a model."""
    model, _, _ = reference_model("gpt_tiny_head64")
    with pytest.raises(SettingError, match="tensor_parallel_size 2: the model is one of 1"):
        Engine(model, None, EngineConfig(tensor_parallel_size=2))


def test_the_exchange_suits_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if GPUs that cannot reach each other are told to, or ranks that share one use NCCL."""
    gpus = [torch.device("cuda", number) for number in range(3)]
    assert choose_exchange([CPU, CPU]) == "host"
    assert choose_exchange([gpus[0], gpus[0]]) == "host"
    apart = {(gpus[1], gpus[2])}
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) not in apart)
    assert choose_exchange(gpus[:2]) == "peer"
    assert choose_exchange(gpus) == "nccl"
