"""The layer kernels against their torch references, and a whole engine on them, in Triton's interpreter."""

from functools import partial

import numpy as np
import pytest
import torch
from kernel_cases import (
    LargeTilesRunner,
    Place,
    check_add_norm,
    check_attention,
    check_embed,
    check_gate,
    check_linear,
    check_swiglu,
)
from teacher import TeacherForced, reference_model
from test_model_runner import TINY, engine_codes

from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.model_runner import ModelRunner, RunnerConfig
from kernels.attention import AttentionTiles
from kernels.linear import LinearTiles
from kernels.swiglu import SwigluTiles

# The interpreter's bf16 products are wrong (Triton 3.6): float32 and float16 stand for it.
PLACES = [Place(torch.device("cpu"), torch.float32), Place(torch.device("cpu"), torch.float16)]


@pytest.fixture(params=PLACES, ids=lambda place: str(place.dtype))
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tiles"),
    [
        (2, 64, 64, LinearTiles(outputs=64, inputs=64, tiles=1, early=1, stages=1, warps=4)),
        (16, 128, 200, LinearTiles(outputs=64, inputs=32, tiles=2, early=1, stages=2, warps=4)),
        (5, 100, 96, LinearTiles(outputs=64, inputs=32, tiles=3, early=0, stages=3, warps=4)),
        (70, 64, 64, LinearTiles(outputs=64, inputs=64, tiles=1, early=1, stages=1, warps=4)),
    ],
)
def test_linear(place: Place, rows: int, outputs: int, inputs: int, tiles: LinearTiles) -> None:
    check_linear(place, rows, outputs, inputs, tiles)


@pytest.mark.parametrize(("rows", "early"), [(1, 1), (18, 0), (7, 2)])
def test_swiglu(place: Place, rows: int, early: int) -> None:
    check_swiglu(place, rows, 64, 80, SwigluTiles(outputs=32, inputs=32, early=early, stages=2, warps=4))


def test_gate(place: Place) -> None:
    check_gate(place, 3, 1500)


@pytest.mark.parametrize(("rows", "width", "splits"), [(1, 64, 1), (3, 200, 4)])
def test_add_norm(place: Place, rows: int, width: int, splits: int) -> None:
    check_add_norm(place, rows, width, splits)


def test_embed(place: Place) -> None:
    check_embed(place, 13, 72)


@pytest.mark.parametrize("head_size", [64, 80, 100, 128])
@pytest.mark.parametrize("positions", [[0, 15, 16, 17], [-1, 33, -1, 1]])
def test_attention(place: Place, head_size: int, positions: list[int]) -> None:
    check_attention(place, positions, 2, head_size, 4, AttentionTiles(chunk=16, warps=2))


@pytest.mark.parametrize("name", TINY)
def test_engine_tokens_are_llamagens(name: str) -> None:
    """The kernels together: greedy tokens of LlamaGen's own code."""
    pieces = 2 if name == "gpt_tiny_nocfg" else 1  # partial sums and chunks to combine in one of them
    codes, expected = engine_codes(name, torch.device("cpu"), "triton", partial(LargeTilesRunner, pieces=pieces))
    assert np.array_equal(codes, expected)


def test_gpt_b_logits_are_llamagens() -> None:
    """The kernels at a published model's size: guided logits at LlamaGen's five recorded positions.

    Keys and values of the tokens between them are the torch operations', which all agree with LlamaGen's (test_model_runner.py).
    One of the two images, and two chunks of context: a step of this size takes the interpreter a quarter of a minute.
    """
    model, meta, expected = reference_model("gpt_b_256")
    wanted, codes, labels = expected["guided_logits_at_positions"][:1], torch.from_numpy(expected["tokens"][:1]), meta["labels"][:1]
    shape = BatchShape.of(2, meta["block_size"], page_size=16)
    num_pages = 2 * shape.pages_per_row
    plain = TeacherForced(ModelRunner(model, shape, num_pages, RunnerConfig("torch")), codes, labels)
    kernels = TeacherForced(LargeTilesRunner(model, shape, num_pages, RunnerConfig("triton"), pieces=3), codes, labels)
    kernels.runner.kv_pages = plain.runner.kv_pages
    for position in range(meta["block_size"]):
        if position in meta["positions"]:
            guided = kernels.guided_logits(position, meta["cfg_scale"])
            assert np.abs(guided.numpy() - wanted[:, meta["positions"].index(position)]).max() < 1e-3, position
        plain.logits(position)
