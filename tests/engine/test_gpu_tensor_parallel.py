"""Ranks that share a model, on GPUs: greedy float32 tokens equal those of one rank."""

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fake_service import Service, is_alive
from own_process import in_its_own_process
from rank_service import rank_service, tree
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
TWO_GPUS = [torch.device("cuda", number) for number in range(2)]
ONE_GPU = TWO_GPUS[:1]


def greedy_codes(
    name: str,
    devices: Sequence[torch.device],
    *,
    eager: bool,
    precision: str = "none",
    images: int = 4,
) -> Tensor:
    """Codes of guided images of 64 tokens, by a model with random weights. They must be the same
    when they are drawn again.
    """
    options = ModelOptions(gpt_model=name, precision=precision, device="cuda", random_weights=True)
    model = replace(resolve_model(options), image_size=128)
    assert model.tokens_per_image == 64
    config = EngineConfig(
        max_num_seqs=2 * images,
        num_pages=16 * images,
        enforce_eager=eager,
        lookahead="off",
        tensor_parallel_size=len(devices),
    )
    labels = [1 + 7 * image for image in range(images)]
    with start_ranks(model, None, config, lambda why: None, devices) as ranks:
        gpt = load_gpt(model, None, rank=ranks.rank)
        engine = Engine(gpt, None, ranks.config, ranks.make_runner)
    try:
        codes, again = (engine.generate(labels, GREEDY, decode=False) for _ in range(2))
    finally:
        ranks.stop()
    assert torch.equal(codes, again)
    return codes


def codes_on_two_gpus(kind: ExchangeKind, name: str, **how: Any) -> Tensor:
    """The same with two ranks, in this process, which must not have had ranks before."""
    rank_processes.choose_exchange = lambda devices: kind
    return greedy_codes(name, TWO_GPUS, eager=False, **how)


@pytest.mark.parametrize("name", SIZES)
def test_two_ranks_on_one_gpu_draw_one_ranks_tokens(name: str) -> None:
    """Fails if a kernel, the pages or the exchange take a rank's part for the whole model."""
    expected = greedy_codes(name, ONE_GPU, eager=True)
    torch.cuda.empty_cache()
    codes = greedy_codes(name, ONE_GPU * 2, eager=True)
    torch.cuda.empty_cache()
    assert len(expected.unique()) > 20  # random weights repeat themselves
    assert torch.equal(codes, expected)


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two_gpus
@pytest.mark.parametrize(("kind", "name"), [("nccl", "GPT-L"), *(("peer", name) for name in SIZES)])
def test_two_gpus_draw_one_ranks_tokens_from_captured_graphs(kind: ExchangeKind, name: str) -> None:
    """Fails if an exchange within a captured graph reads what another rank has not written yet, or
    has overwritten.
    """
    expected = greedy_codes(name, ONE_GPU, eager=False)
    torch.cuda.empty_cache()
    assert torch.equal(in_its_own_process(codes_on_two_gpus, kind, name, seconds=240), expected)


@needs_two_gpus
@pytest.mark.parametrize("images", [8, 40])
def test_products_exchange_from_captured_graphs(images: int) -> None:
    """Fails if a product takes a number of another sum for that of this one. In 16 bits two ranks
    round otherwise than one, so that some images part ways with theirs; most begin alike.
    """
    how: dict[str, Any] = {"precision": "bf16", "images": images}
    expected = greedy_codes("GPT-L", ONE_GPU, eager=False, **how)
    codes = in_its_own_process(codes_on_two_gpus, "peer", "GPT-L", **how)
    alike = (codes[:, :6] == expected[:, :6]).all(dim=1)
    assert alike.float().mean() >= 0.5


@needs_two_gpus
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_ends_the_service(tmp_path: Path, rank: int) -> None:
    """Fails if a GPU that waits for a dead rank's numbers keeps its process."""

    def draw(service: Service) -> int:
        status = 200
        while status == 200:
            body = {"prompt": "1", "n": 10}
            status = httpx2.post(f"{service.url}/v1/codes", json=body, timeout=60).status_code
        return status

    def health(service: Service) -> int:
        try:
            return int(httpx2.get(f"{service.url}/health", timeout=5).status_code)
        except httpx2.TransportError:
            return 0

    with rank_service(tmp_path, "--device", "cuda", "--max-num-seqs", "8") as service:
        processes = tree(service.process.pid)
        with ThreadPoolExecutor(1) as pool:
            drawing = pool.submit(draw, service)
            time.sleep(1)
            os.kill(processes[1 + rank], signal.SIGKILL)
            assert service.wait_for(lambda: health(service) == 503, 10) <= 2
            assert service.process.wait(30) == 1
            assert drawing.result() == 503
        service.wait_for(lambda: not any(map(is_alive, processes)), 5)
