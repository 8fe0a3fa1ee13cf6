"""The layer kernels against their torch references in Triton's interpreter."""

import pytest
import torch
from kernel_cases import (
    Place,
    check_add_norm,
    check_attention,
    check_combine,
    check_embed,
    check_gate,
    check_int4_groups,
    check_linear,
    check_swiglu,
    check_window_is_steps,
)

from kernels import QUANTIZATIONS
from kernels.attention import AttentionTiles
from kernels.linear import LinearTiles, SwigluTiles
from kernels.quantization import FP8

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


@pytest.mark.parametrize("group", [2, 48, 64, 192])
def test_groups_of_other_sizes(place: Place, group: int) -> None:
    """Groups that divide a tile of 64 inputs, and others."""
    check_int4_groups(place, group, LinearTiles(32, 64, tiles=2, early=1, stages=2, warps=4))


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_products_of_quantized_weights(place: Place, scheme: str) -> None:
    tiles = LinearTiles(outputs=64, inputs=32, tiles=2, early=1, stages=2, warps=4)
    check_linear(place, 5, 100, 192, tiles, scheme)
    check_swiglu(place, 7, 64, 96, SwigluTiles(32, 32, early=1, stages=2, warps=4), scheme)


@pytest.mark.parametrize(("rows", "early"), [(1, 1), (18, 0), (7, 2)])
def test_swiglu(place: Place, rows: int, early: int) -> None:
    check_swiglu(
        place, rows, 64, 80, SwigluTiles(outputs=32, inputs=32, early=early, stages=2, warps=4)
    )


def test_gate(place: Place) -> None:
    check_gate(place, 3, 1500)


@pytest.mark.parametrize(("rows", "width", "splits"), [(1, 64, 1), (3, 200, 4)])
def test_add_norm(place: Place, rows: int, width: int, splits: int) -> None:
    check_add_norm(place, rows, width, splits)


def test_embed(place: Place) -> None:
    check_embed(place, 13, 72)
    check_embed(place, 20, 72, window=4)


@pytest.mark.parametrize("head_size", [64, 80, 100, 128])
@pytest.mark.parametrize("positions", [[0, 15, 16, 17], [-1, 33, -1, 1]])
def test_attention(place: Place, head_size: int, positions: list[int]) -> None:
    check_attention(place, positions, 2, head_size, 4, AttentionTiles(chunk=16, warps=2))


@pytest.mark.parametrize("window", [2, 5, 9])
def test_attention_of_windows(place: Place, window: int) -> None:
    tiles = AttentionTiles(chunk=16, warps=2)
    check_attention(place, [0, 11, 16, -1, 31], 2, 64, 4, tiles, window=window)
    check_window_is_steps(place, [0, 11, 16, -1, 31], 2, 64, tiles, window)


@pytest.mark.parametrize("head_size", [64, 100])
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_attention_of_scaled_pages(place: Place, dtype: torch.dtype, head_size: int) -> None:
    tiles = AttentionTiles(chunk=16, warps=2)
    check_attention(place, [0, 15, 16, -1, 17], 2, head_size, 4, tiles, page_dtype=dtype)
    check_attention(place, [0, 11, -1, 31], 2, head_size, 4, tiles, window=5, page_dtype=dtype)
    if dtype == torch.int8:  # the interpreter has no NaN in fp8
        positions = [0, 11, 16, -1, 31]
        check_window_is_steps(place, positions, 2, head_size, tiles, 5, page_dtype=dtype)


@pytest.mark.parametrize("head_size", [64, 100])
@pytest.mark.parametrize(
    ("positions", "chunks"), [([0, 15, 16, -1, 47], 3), ([-1, 79, 33], 5), ([7], 1)]
)
def test_combine(place: Place, head_size: int, positions: list[int], chunks: int) -> None:
    check_combine(place, positions, 2, head_size, chunks, AttentionTiles(chunk=16, warps=2))
