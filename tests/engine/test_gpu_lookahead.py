"""Lookahead on a GPU draws the very tokens of one token a pass, whatever it guesses: each published
size in bf16 with offered guesses, and the demo model in every precision with its own.
"""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from autoregressive.benchmarks.guessing import (
    GuessingRunner,
    draw_all,
    kept_a_pass,
    tokens_a_pass,
)
from autoregressive.benchmarks.harness import empty_transformer, with_random_weights
from autoregressive.benchmarks.mixed_requests import (
    draw_mixed,
    equal_pictures,
    mixed_requests,
    scarce_config,
)
from autoregressive.devices import PRECISIONS
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig, LookaheadSetting
from autoregressive.serve.engine.request import Request
from autoregressive.weights.checkpoint import load_weights
from kernels.operations import MANY_ROWS

pytestmark = pytest.mark.gpu

DEMO = Path(__file__).parents[2] / "pretrained_models" / "demo_gpt.safetensors"
# Pictures of the demo model in each precision; 10,000 take ten minutes each.
PICTURES = int(os.environ.get("LOOKAHEAD_PICTURES", "60"))
WINDOWS = [3, 4, 8, 16]
IMAGES = MANY_ROWS // (2 * 3)
# Half of them take the likeliest token, which the last bits of a logit turn soonest.
LABELS = [7 * image for image in range(IMAGES)]
PARAMS = [
    SamplingParams(cfg_scale=4.0, temperature=image % 2, top_k=2000, seed=image)
    for image in range(IMAGES)
]


@pytest.mark.parametrize("model", ["GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B"])
def test_guesses_right_or_wrong_change_no_token(model: str) -> None:
    """Fails if a window computes a token otherwise than a pass of one token, in bf16 and at up to
    64 positions a pass; or if right guesses do not hold.
    """
    gpt = with_random_weights(empty_transformer(model, 256), torch.device("cuda"), torch.bfloat16)
    gpt.output.weight.mul_(4)  # so that logits differ by about as much as a trained model's
    recorded = draw_all(
        Engine(gpt, None, EngineConfig(2 * IMAGES, lookahead="off")), LABELS, PARAMS
    )
    for window in WINDOWS:
        rows = MANY_ROWS // window // 2 * 2
        engine = Engine(gpt, None, EngineConfig(rows, lookahead=window), GuessingRunner)
        assert isinstance(engine.runner, GuessingRunner)
        for right_share in (0.9, 0.5):
            engine.runner.offer(recorded, right_share)
            drawn = draw_all(engine, LABELS, PARAMS)
            kept, expected = kept_a_pass(drawn), tokens_a_pass(right_share, window)
            print(f"{model}, window {window}: {kept:.3f} tokens a pass, expected {expected:.3f}")
            assert differing(drawn, recorded) == []
            assert kept == pytest.approx(expected, rel=0.15)


def differing(drawn: list[Request], recorded: list[Request]) -> list[tuple[int, int]]:
    """Requests that differ, with the first token that does."""
    found = []
    for index, (request, other) in enumerate(zip(drawn, recorded, strict=True)):
        assert request.codes is not None
        assert other.codes is not None
        unequal = (request.codes != other.codes)[0].nonzero().flatten().tolist()
        found += [(index, first) for first in unequal[:1]]
    return found


@cache
def demo_gpt(precision: str) -> Transformer:
    """The model that ships, on the GPU; or a random one of its size."""
    gpt = empty_transformer("GPT-demo")
    if not DEMO.exists():
        return with_random_weights(gpt, torch.device("cuda"), PRECISIONS[precision])
    load_weights(gpt, DEMO, device=torch.device("cuda"), dtype=PRECISIONS[precision])
    return gpt.eval().requires_grad_(False)


@cache
def one_token_a_pass(precision: str) -> list[Request]:
    """The requests of the tests below, drawn without lookahead."""
    gpt = demo_gpt(precision)
    wanted = mixed_requests(PICTURES, gpt.config.block_size, gpt.config.num_classes)
    return draw_mixed(Engine(gpt, None, EngineConfig(MANY_ROWS, lookahead="off")), wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("lookahead", ["off", *WINDOWS, "auto", "8 of many rows"])
def test_the_demo_model_draws_the_same(precision: str, lookahead: LookaheadSetting) -> None:
    """Fails if a class, guidance, an interval, a filter, a seed, the company, a cancelled request
    or a scarce pool makes lookahead draw another token.
    """
    gpt = demo_gpt(precision)
    model = gpt.config
    wanted = mixed_requests(PICTURES, model.block_size, model.num_classes)
    config = scarce_config(8, model.block_size, max_num_seqs=48, deterministic=True)
    if lookahead != "8 of many rows":
        config = scarce_config(lookahead, model.block_size)
    # They come and go at other moments than before.
    drawn = draw_mixed(Engine(gpt, None, config), wanted, seed=1)
    print(f"{precision}, lookahead {lookahead}: {kept_a_pass(drawn):.3f} tokens a pass")
    assert equal_pictures(drawn, one_token_a_pass(precision)) == PICTURES
    if DEMO.exists() and lookahead != "auto":  # which looks ahead where that is faster
        assert (kept_a_pass(drawn) > 1.2) == (lookahead != "off")


def test_windows_of_any_size_in_graphs_and_without() -> None:
    """Fails if a captured pass keeps other tokens than one whose kernels are launched one by
    one.
    """
    gpt = demo_gpt("bf16")
    wanted = mixed_requests(12, gpt.config.block_size, gpt.config.num_classes, seed=2)
    config = scarce_config(5, gpt.config.block_size)
    runs = [
        draw_mixed(Engine(gpt, None, replace(config, enforce_eager=eager)), wanted)
        for eager in (False, True)
    ]
    assert equal_pictures(*runs) == 12
    kept = [[(each.drafted, each.accepted) for each in run] for run in runs]
    print(f"{kept_a_pass(runs[0]):.3f} tokens a pass in graphs, {kept_a_pass(runs[1]):.3f} without")
    assert all(accepted > 0 for _, accepted in kept[0])
