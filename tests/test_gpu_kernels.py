"""The layer kernels and the engine's tokens on a GPU, in every dtype."""

import numpy as np
import pytest
import torch
from kernel_cases import Place, check_add_norm, check_attention, check_embed, check_gate, check_linear, check_swiglu
from test_model_runner import TINY, engine_codes

from autoregressive.models.config import GPT_SHAPES, GPTConfig
from kernels.attention import HEAD_SIZES
from kernels.configs import default_attention_tiles, tile_table

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODELS = ("GPT-B", "GPT-XL", "GPT-3B")


@pytest.fixture(params=DTYPES, ids=str)
def place(request: pytest.FixtureRequest) -> Place:
    return Place(CUDA, request.param, launch_pdl=torch.cuda.get_device_capability() >= (9, 0))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows", [1, 2, 16, 70])
def test_products(place: Place, model: str, rows: int) -> None:
    """The tiles that the table or the rules choose for the models' shapes."""
    shape = GPT_SHAPES[model]
    config = GPTConfig(dim=shape.dim, n_layer=1, n_head=shape.n_head)
    table = tile_table(torch.cuda.get_device_capability(), place.dtype)
    width, ffn, size = config.dim, config.ffn_dim, place.dtype.itemsize
    for outputs, inputs in ((3 * width, width), (width, width), (width, ffn)):
        check_linear(place, rows, outputs, inputs, table.linear_tiles(outputs, inputs, size))
    check_linear(place, rows, 16384, width, table.whole_linear_tiles(16384, width, size))
    check_swiglu(place, rows, ffn, width, table.swiglu_tiles(ffn, width, size))
    check_gate(place, rows, ffn)
    check_add_norm(place, rows, width, 3)


def test_embed(place: Place) -> None:
    check_embed(place, 40, 1280)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("positions", [[0, 63, 64, 65, -1, 200], [31, 32, 33, 130, 1, 2]])
def test_attention(place: Place, head_size: int, positions: list[int]) -> None:
    tiles = tile_table(torch.cuda.get_device_capability(), place.dtype).attention_tiles(head_size, place.dtype.itemsize)
    check_attention(place, positions, 3, head_size, 16, tiles)
    check_attention(place, positions, 3, head_size, 7, default_attention_tiles(head_size, place.dtype.itemsize))


@pytest.mark.parametrize("name", [*TINY, "gpt_b_256"])
@pytest.mark.parametrize(("backend", "eager"), [("triton", False), ("triton", True), ("torch", True), ("torch", False)])
def test_engine_tokens_are_llamagens(name: str, backend: str, eager: bool) -> None:
    """IEEE float32 on the GPU, with and without graphs, on the kernels and on torch's operations."""
    codes, expected = engine_codes(name, CUDA, backend, enforce_eager=eager)
    assert np.array_equal(codes, expected)
