"""Ranks that share a model, on GPUs: greedy float32 tokens equal those of one rank."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.exchange import ExchangeKind
from autoregressive.serve.worker import rank_processes
from autoregressive.serve.worker.rank_processes import start_ranks
from autoregressive.weights.finding import resolve_model
from autoregressive.weights.loading import load_gpt
from autoregressive.weights.options import ModelOptions

pytestmark = pytest.mark.gpu
SIZES = ["GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B"]
GREEDY = SamplingParams(cfg_scale=2.0, temperature=0.0, top_k=0)
ONE_GPU = [torch.device("cuda", 0)]


def greedy_codes(
    name: str, devices: Sequence[torch.device], *, eager: bool, precision: str = "none"
) -> Tensor:
    """Codes of four guided images of 64 tokens, by a model with random weights."""
    options = ModelOptions(gpt_model=name, precision=precision, device="cuda", random_weights=True)
    model = replace(resolve_model(options), image_size=128)
    assert model.tokens_per_image == 64
    config = EngineConfig(
        max_num_seqs=8,
        num_pages=64,
        enforce_eager=eager,
        lookahead="off",
        tensor_parallel_size=len(devices),
    )
    with start_ranks(model, None, config, lambda why: None, devices) as ranks:
        gpt = load_gpt(model, None, rank=ranks.rank)
        engine = Engine(gpt, None, ranks.config, ranks.make_runner)
    try:
        return engine.generate([1, 7, 3, 900], GREEDY, decode=False)
    finally:
        ranks.stop()


@pytest.mark.parametrize("name", SIZES)
def test_two_ranks_on_one_gpu_draw_one_ranks_tokens(name: str) -> None:
    """Fails if a kernel, the pages or the exchange take a rank's part for the whole model."""
    expected = greedy_codes(name, ONE_GPU, eager=True)
    torch.cuda.empty_cache()
    codes = greedy_codes(name, ONE_GPU * 2, eager=True)
    torch.cuda.empty_cache()
    assert len(expected.unique()) > 20  # random weights repeat themselves
    assert torch.equal(codes, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["nccl", "peer"])
def test_two_gpus_draw_one_ranks_tokens_from_captured_graphs(
    kind: ExchangeKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an exchange within a captured graph reads what another rank has not written yet, or
    has overwritten.
    """
    monkeypatch.setattr(rank_processes, "choose_exchange", lambda devices: kind)
    gpus = [torch.device("cuda", number) for number in range(2)]
    expected = greedy_codes("GPT-L", gpus[:1], eager=False)
    assert torch.equal(greedy_codes("GPT-L", gpus, eager=False), expected)
