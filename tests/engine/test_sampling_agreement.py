"""The commands, the engine and the service take the same sampling parameters, and they mean the
same.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.cli.drawing import resolve_settings
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.sample import sample_c2i as naive
from autoregressive.serve import sample_c2i as fast
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.web.schema import CodesRequest
from autoregressive.weights.finding import ModelSettings, find_weights
from autoregressive.weights.loading import LoadedModels, load_models

FLAGS = ["--gpt-model", "GPT-demo", "--device", "cpu"]
LABELS = [6, 9]  # whose likeliest pictures are more than background


@pytest.fixture(scope="module")
def shipped() -> tuple[ModelSettings, LoadedModels]:
    """The demo model, with the weights that ship."""
    model = resolve_settings(fast.build_engine_parser().parse_args(FLAGS)).model
    return model, load_models(model, find_weights(model))


def test_the_default_sampling_parameters_suit_the_shipped_model(
    shipped: tuple[ModelSettings, LoadedModels],
) -> None:
    """Fails if `SamplingParams()` is refused, or if a top-k beyond the codebook is anything but all
    tokens.
    """
    model, models = shipped
    assert SamplingParams().top_k > model.codebook_size
    kept = (0, 1024, 2000, 2**31 - 1, 5)
    engine = Engine(models.gpt, None, EngineConfig(max_num_seqs=len(kept)))
    every = [SamplingParams(cfg_scale=1.0, top_k=top_k) for top_k in kept]
    *unlimited, few = engine.generate([6] * len(kept), every, decode=False)
    assert all(torch.equal(codes, unlimited[0]) for codes in unlimited[1:])
    assert not torch.equal(few, unlimited[0])


def test_temperature_0_takes_the_likeliest_token_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shipped: tuple[ModelSettings, LoadedModels]
) -> None:
    """Fails if a command refuses it, draws at random, or takes other tokens than the engine or than
    top-k 1; with the weights that ship.
    """
    monkeypatch.chdir(tmp_path)
    drawn = []
    for command in (naive, fast):
        flags = ["--class-labels", *map(str, LABELS), "--temperature", "0"]
        command.main([*FLAGS, *flags, "--save-codes", "codes.npy"])
        drawn.append(np.load("codes.npy"))
    engine = Engine(shipped[1].gpt, None, EngineConfig(max_num_seqs=8))
    ways = [SamplingParams(cfg_scale=2.0, temperature=0), SamplingParams(cfg_scale=2.0, top_k=1)]
    params = [way for way in ways for _ in LABELS]
    drawn += engine.generate(LABELS * 2, params, decode=False).numpy().reshape(2, len(LABELS), -1)
    for codes in drawn[1:]:
        assert np.array_equal(codes, drawn[0])
    assert min(len(np.unique(picture)) for picture in drawn[0]) >= 100


@pytest.mark.parametrize("top_k", [0, 1025, 2**31 - 1])
@pytest.mark.parametrize("temperature", [0, 1e38])
def test_all_three_ways_in_take_the_ends_of_the_ranges(top_k: int, temperature: float) -> None:
    """Fails if the command, the engine or the service refuses what another takes."""
    typed = ["--top-k", str(top_k), "--temperature", str(temperature)]
    for command in (naive, fast):
        parser = fast.build_engine_parser() if command is fast else naive.build_parser("", "")
        sampling = resolve_settings(parser.parse_args([*FLAGS, *typed])).sampling
        assert (sampling.top_k, sampling.temperature) == (top_k, temperature)
    SamplingParams(top_k=top_k, temperature=temperature)
    CodesRequest.model_validate({"prompt": "cat", "top_k": top_k, "temperature": temperature})
