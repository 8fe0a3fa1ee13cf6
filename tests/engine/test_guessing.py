"""The guesses of a chosen quality, and requests of all kinds: on a CPU with a small model, what
tests/engine/test_gpu_lookahead.py does on a GPU.
"""

from copy import deepcopy

import pytest
import torch
from conftest import reference_weights
from torch import Tensor

from autoregressive.benchmarks.guessing import (
    GuessingRunner,
    draw_all,
    fewest_passes,
    kept_a_pass,
    right_guesses,
    seed_for,
    share_for,
    spoiled,
    tokens_a_pass,
)
from autoregressive.benchmarks.mixed_requests import (
    draw_mixed,
    equal_pictures,
    mixed_requests,
    scarce_config,
)
from autoregressive.models.config import GPTConfig
from autoregressive.models.generate import NonFiniteLogitsError
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig, LookaheadSetting
from autoregressive.serve.engine.request import Request, RequestState

TOKENS, CLASSES = 64, 10
LABELS = [1, 2, 3]
PARAMS = [
    SamplingParams(seed=5),
    SamplingParams(cfg_scale=1.0, seed=6, n=2),
    SamplingParams(temperature=0.0, cfg_interval=9, seed=7),
]
WANTED = mixed_requests(12, TOKENS, CLASSES)


@pytest.fixture(scope="module")
def gpt() -> Transformer:
    """A model whose own guesses hold now and then."""
    model = Transformer(
        GPTConfig(
            dim=128, n_layer=2, n_head=2, vocab_size=512, block_size=TOKENS, num_classes=CLASSES
        )
    )
    reference_weights(model, 7)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def one_token_a_pass(gpt: Transformer) -> list[Request]:
    """The mixed requests, drawn without lookahead."""
    return draw_mixed(Engine(gpt, None, EngineConfig(64, page_size=4, lookahead="off")), WANTED)


def passes_one_by_one(codes: Tensor, guesses: Tensor, window: int) -> int:
    """The passes of images [images, tokens] whose guesses are these, with room for every window."""
    passes = 0
    for line, offered in zip(codes.tolist(), guesses.tolist(), strict=True):
        position = 0
        while position < len(line):
            passes += 1
            end = min(position + window, len(line)) - 1
            while position < end and offered[position] == line[position]:
                position += 1
            position += 1
    return passes


@pytest.mark.parametrize("window", [3, 4, 8, 16])
def test_passes_follow_from_the_share_of_right_guesses(gpt: Transformer, window: int) -> None:
    """Fails if a guess is offered to another image or place than its own, or not at every pass:
    benchmarks would time something else than they say. Also if guesses change a token.
    """
    recorded = draw_all(Engine(gpt, None, EngineConfig(8, lookahead="off")), LABELS, PARAMS)
    codes = torch.cat([request.codes for request in recorded if request.codes is not None])
    engine = Engine(gpt, None, EngineConfig(8, lookahead=window), GuessingRunner)
    assert isinstance(engine.runner, GuessingRunner)
    for right_share in (1.0, 0.8, 0.0):
        engine.runner.offer(recorded, right_share, seed=3)
        drawn = draw_all(engine, LABELS, PARAMS)
        assert equal_pictures(drawn, recorded) == len(codes)
        guesses = spoiled(codes, right_share, gpt.config.vocab_size, seed=3)
        passes = passes_one_by_one(codes, guesses, window)
        assert kept_a_pass(drawn) == codes.numel() / passes
        assert passes == fewest_passes(right_guesses(codes.shape, right_share, 3), window)
    assert kept_a_pass(drawn) == 1


def test_images_without_a_recording_are_drawn_all_the_same(gpt: Transformer) -> None:
    """Fails if an image is offered the guesses of one with another seed or index."""
    recorded = draw_all(Engine(gpt, None, EngineConfig(8, lookahead="off")), LABELS, PARAMS)
    engine = Engine(gpt, None, EngineConfig(8, lookahead=4), GuessingRunner)
    assert isinstance(engine.runner, GuessingRunner)
    engine.runner.offer(recorded[:1], 1.0)
    known, *unknown = draw_all(engine, LABELS, PARAMS)
    assert kept_a_pass([known]) == 4
    assert kept_a_pass(unknown) < 1.5
    assert equal_pictures([known, *unknown], recorded) == 4


def test_damaged_weights_end_a_benchmark(gpt: Transformer) -> None:
    """Fails if images that failed are timed as if they had been drawn."""
    damaged = deepcopy(gpt)
    damaged.output.weight[3] = torch.nan
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinite"):
        draw_all(Engine(damaged, None, EngineConfig(8, lookahead="off")), LABELS, PARAMS)


def test_a_share_of_the_guesses_is_wrong() -> None:
    """Fails if a wrong guess may be right by chance, or the share is another one."""
    codes = torch.randint(0, 3, (50, 400), generator=torch.Generator().manual_seed(1)).int()
    for share in (0.0, 0.3, 1.0):
        guesses = spoiled(codes, share, 3, seed=2)
        assert (guesses == codes).float().mean().item() == pytest.approx(share, abs=0.02)
        assert guesses.min() >= 0
        assert guesses.max() < 3
        assert guesses.dtype == codes.dtype


@pytest.mark.parametrize("window", [2, 4, 16])
@pytest.mark.parametrize("tokens", [1.0, 1.5, 2.0])
def test_the_share_for_so_many_tokens_a_pass(window: int, tokens: float) -> None:
    """Fails if a benchmark at "2x" keeps another number of tokens a pass."""
    assert tokens_a_pass(share_for(tokens, window), window) == pytest.approx(tokens)
    with pytest.raises(ValueError, match=f"keeps 1 to {window} tokens"):
        share_for(window + 1, window)


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize(("tokens", "window"), [(2.0, 2), (2.0, 4), (3.0, 4), (3.0, 16)])
def test_a_job_at_2x_takes_half_the_passes(images: int, tokens: float, window: int) -> None:
    """Fails if the luck of one seed decides what a benchmark of a few images says."""
    shape = images, 576
    seed = seed_for(shape, tokens, window)
    right = right_guesses(shape, share_for(tokens, window), seed)
    assert images * 576 / fewest_passes(right, window) == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize("lookahead", ["off", 3, 4, 8, 16, "auto"])
def test_requests_of_all_kinds_draw_the_same(
    gpt: Transformer, one_token_a_pass: list[Request], lookahead: LookaheadSetting
) -> None:
    """Fails if lookahead draws another token for a class, guidance, an interval, a filter, a seed,
    a late or a cancelled neighbour, or a scarce pool.
    """
    engine = Engine(gpt, None, scarce_config(lookahead, TOKENS, page_size=4))
    drawn = draw_mixed(engine, WANTED, seed=1)
    assert equal_pictures(drawn, one_token_a_pass) == 12
    # "auto" looks ahead where that is faster.
    assert lookahead == "auto" or (kept_a_pass(drawn) > 1) == (lookahead != "off")


def test_requests_are_of_all_kinds() -> None:
    """Fails if the mix lacks what it is there for, or has another number of pictures."""
    wanted = mixed_requests(200, TOKENS, CLASSES)
    assert sum(each.params.n for each in wanted) == 200
    params = [each.params for each in wanted]
    assert {each.guided for each in params} == {False, True}
    assert {each.temperature == 0 for each in params} == {False, True}
    assert {0 <= each.cfg_interval < TOKENS for each in params if each.guided} == {False, True}
    assert {each.top_p < 1 for each in params} == {each.top_k > 0 for each in params}
    assert {each.n for each in params} == {1, 2}
    assert len({each.label for each in wanted}) == CLASSES


def test_pictures_are_compared_one_by_one(gpt: Transformer) -> None:
    """Fails if a picture that differs, or has no codes, passes for equal."""
    wanted = mixed_requests(4, TOKENS, CLASSES)
    first, second = (
        draw_mixed(Engine(gpt, None, EngineConfig(64, lookahead="off")), wanted) for _ in range(2)
    )
    assert equal_pictures(first, second) == 4
    assert first[0].codes is not None
    first[0].codes[0, 5] += 1
    assert equal_pictures(first, second) == 3
    second[-1].codes = None
    assert equal_pictures(first, second) == 3 - second[-1].params.n
    assert all(each.state is RequestState.FINISHED for each in first)
