"""The layer kernels and the engine's tokens on a GPU, in every dtype."""

import numpy as np
import pytest
import torch
from kernel_cases import (
    Place,
    check_add_norm,
    check_attention,
    check_combine,
    check_embed,
    check_fused_linear,
    check_fused_project,
    check_fused_swiglu,
    check_gate,
    check_gather,
    check_int4_groups,
    check_linear,
    check_project_of_ranks,
    check_swiglu,
    check_window_is_steps,
)
from quantized_cases import (
    check_quantized_linear,
    check_quantized_project,
    check_quantized_swiglu,
)
from teacher import TINY, engine_codes

from autoregressive.models.config import GPT_SHAPES, GPTConfig
from kernels import QUANTIZATIONS
from kernels.attention import HEAD_SIZES, AttentionTiles
from kernels.hopper.products import FusedTiles
from kernels.hopper.quantized_products import quantized_project
from kernels.linear import LinearTiles
from kernels.quantization import FP8, QuantizedMatrix
from kernels.tiles import (
    ATTENTION,
    FUSED_HEAD,
    FUSED_LINEAR,
    FUSED_PROJECT,
    FUSED_SWIGLU,
    LINEAR,
    QUANTIZED_LINEAR,
    QUANTIZED_PROJECT,
    QUANTIZED_SWIGLU,
    SWIGLU,
    WHOLE_LINEAR,
    TileTable,
    tile_table,
)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODELS = ("GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B")  # all that the tile table holds


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
    width, ffn = config.dim, config.ffn_dim
    for outputs, inputs in ((3 * width, width), (width, width), (width, ffn)):
        check_linear(place, rows, outputs, inputs, table.find(LINEAR, outputs, inputs))
    check_linear(place, rows, 16384, width, table.find(WHOLE_LINEAR, 16384, width))
    check_swiglu(place, rows, ffn, width, table.find(SWIGLU, ffn, width))
    check_gate(place, rows, ffn)
    check_add_norm(place, rows, width, 3)


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
@pytest.mark.parametrize("model", ["GPT-B", "GPT-3B"])
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_products_of_quantized_weights(place: Place, model: str, rows: int, scheme: str) -> None:
    """The tiles that the table or the rules choose for weights that are not quantised."""
    if scheme == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 takes compute capability 8.9")
    shape = GPT_SHAPES[model]
    config = GPTConfig(dim=shape.dim, n_layer=1, n_head=shape.n_head)
    table = tile_table(torch.cuda.get_device_capability(), place.dtype)
    width, ffn = config.dim, config.ffn_dim
    for outputs, inputs in ((3 * width, width), (width, width), (width, ffn)):
        check_linear(place, rows, outputs, inputs, table.find(LINEAR, outputs, inputs), scheme)
    check_swiglu(place, rows, ffn, width, table.find(SWIGLU, ffn, width), scheme)


@pytest.mark.parametrize("group", [2, 48, 64, 192])
def test_groups_of_other_sizes(place: Place, group: int) -> None:
    """Groups of int4 that divide a tile of 64 inputs, and others."""
    check_int4_groups(place, group, LinearTiles(32, 64, tiles=2, early=1, stages=2, warps=4))


@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("head_size", [64, 100])
def test_attention_of_scaled_pages(place: Place, head_size: int, dtype: torch.dtype) -> None:
    """Guards the rounding to fp8, which the interpreter gets wrong, and what is not finite."""
    if dtype == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 takes compute capability 8.9")
    tiles = AttentionTiles(chunk=32, warps=2)
    positions = [0, 15, 31, -1, 77]
    for window in (1, 5):
        check_attention(place, positions, 4, head_size, 16, tiles, window=window, page_dtype=dtype)
    check_window_is_steps(place, positions, 4, head_size, tiles, 5, page_dtype=dtype)


@pytest.fixture(params=(torch.float16, torch.bfloat16), ids=str)
def hopper(request: pytest.FixtureRequest) -> Place:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for GPUs of compute capability 9.0")
    return Place(CUDA, request.param, launch_pdl=True)


# The two 16-bit types differ in the instructions for a product alone, so one model stands for all.
@pytest.mark.parametrize(
    ("hopper", "model"),
    [*((torch.bfloat16, model) for model in MODELS), (torch.float16, MODELS[0])],
    indirect=["hopper"],
    ids=str,
)
# A tile of 16 rows, of 32, of 64; of many rows 64 and 128, the last one in part.
@pytest.mark.parametrize("rows", [2, 16, 24, 70, 500])
@pytest.mark.parametrize("measured", [True, False], ids=["table", "rules"])
def test_fused_products(hopper: Place, model: str, rows: int, measured: bool) -> None:
    """The tiles that the table, and the rules, choose for the models' shapes."""
    shape = GPT_SHAPES[model]
    config = GPTConfig(dim=shape.dim, n_layer=1, n_head=shape.n_head)
    table = tile_table((9, 0), hopper.dtype) if measured else TileTable()
    width, ffn = config.dim, config.ffn_dim
    check_fused_linear(hopper, rows, 3 * width, width, table.find(FUSED_LINEAR, 3 * width, width))
    check_fused_linear(hopper, rows, 16384, width, table.find(FUSED_HEAD, 16384, width))
    check_fused_swiglu(hopper, rows, ffn, width, table.find(FUSED_SWIGLU, ffn, width))
    for inputs in (width, ffn):
        check_fused_project(hopper, rows, width, inputs, table.find(FUSED_PROJECT, width, inputs))


@pytest.mark.parametrize(("ranks", "own"), [(2, 0), (2, 1), (4, 1)])
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("rows", [2, 16, 33, 130])
def test_products_add_up_over_ranks(
    hopper: Place, rows: int, splits: int, ranks: int, own: int
) -> None:
    """Guards the exchange with the GPUs of other ranks. The inboxes are on one GPU here."""
    check_project_of_ranks(hopper, rows, 200, 328, FusedTiles(64, 64, splits, 2, 4), ranks, own)
    check_project_of_ranks(hopper, rows, 3200, 1600, FusedTiles(128, 64, splits, 4, 8), ranks, own)
    check_gather(hopper, rows, 4096, ranks, own)
    check_gather(hopper, rows, 1000, ranks, own)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 17, 33, 64, 130])
def test_fused_products_of_odd_shapes(hopper: Place, rows: int, splits: int) -> None:
    """Guards tails along every axis, more programs than tiles, and tiles that must wait
    for room.
    """
    for tiles in (FusedTiles(64, 64, splits, 2, 4), FusedTiles(128, 128, splits, 8, 8)):
        check_fused_linear(hopper, rows, 200, 328, tiles)
        check_fused_project(hopper, rows, 200, 328, tiles)
        check_fused_project(hopper, rows, 48, 1336, tiles)
    check_fused_swiglu(hopper, rows, 72, 328, FusedTiles(32, 64, 1, 2, 4))
    check_fused_swiglu(hopper, rows, 40, 1000, FusedTiles(64, 128, 1, 3, 8))


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
@pytest.mark.parametrize(
    ("hopper", "model"),
    [*((torch.bfloat16, model) for model in MODELS), (torch.float16, MODELS[0])],
    indirect=["hopper"],
    ids=str,
)
@pytest.mark.parametrize("rows", [2, 24, 70, 500])
def test_products_of_paired_weights(hopper: Place, model: str, rows: int, scheme: str) -> None:
    """The tiles that the table or the rules choose for the models' shapes."""
    shape = GPT_SHAPES[model]
    config = GPTConfig(dim=shape.dim, n_layer=1, n_head=shape.n_head)
    table, width, ffn = tile_table((9, 0), hopper.dtype), config.dim, config.ffn_dim
    tiles = table.find(QUANTIZED_LINEAR, 3 * width, width)
    check_quantized_linear(hopper, rows, 3 * width, width, tiles, scheme)
    tiles = table.find(QUANTIZED_SWIGLU, ffn, width)
    check_quantized_swiglu(hopper, rows, ffn, width, tiles, scheme)
    for inputs in (width, ffn):
        tiles = table.find(QUANTIZED_PROJECT, width, inputs)
        check_quantized_project(hopper, rows, width, inputs, tiles, scheme)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 17, 33, 64, 130])
def test_products_of_paired_weights_of_odd_shapes(hopper: Place, rows: int, splits: int) -> None:
    """Guards tails along every axis, programs without inputs, and tiles that must wait for room."""
    for tiles in (FusedTiles(64, 128, splits, 2, 4), FusedTiles(128, 128, splits, 8, 8)):
        check_quantized_linear(hopper, rows, 200, 384, tiles, "fp8")
        check_quantized_project(hopper, rows, 200, 384, tiles, "int8")
        check_quantized_project(hopper, rows, 48, 1408, tiles, "fp8")
    check_quantized_swiglu(hopper, rows, 72, 384, FusedTiles(32, 128, 1, 2, 4), "fp8")
    check_quantized_swiglu(hopper, rows, 40, 1024, FusedTiles(64, 128, 1, 3, 8), "int8")


@pytest.mark.parametrize("fp8", [True, False])
def test_every_byte_is_unpacked(hopper: Place, fp8: bool) -> None:
    """Fails if one of the 256 weights that a byte can be comes out as another number. Bytes that
    stand for NaN are left out.
    """
    every = torch.arange(256).to(torch.uint8).view(FP8 if fp8 else torch.int8)
    every = every[every.float().isfinite()].to(CUDA)
    values = every[torch.arange(64 * 128, device=CUDA) % len(every)].view(64, 128)
    matrix = QuantizedMatrix(values.clone(), torch.ones(64, device=CUDA)).pair()
    residual = torch.zeros(128, 64, device=CUDA)
    others = torch.empty(128, 64, device=CUDA, dtype=hopper.dtype), torch.empty(1, 128, device=CUDA)
    norm_weight = torch.ones(64, device=CUDA, dtype=hopper.dtype)
    one_hot = torch.eye(128, device=CUDA, dtype=hopper.dtype)
    tiles = FusedTiles(64, 128, 1, 1, 4)
    quantized_project(one_hot, matrix, residual, norm_weight, *others, tiles)
    assert torch.equal(residual.T, values.float())


def test_embed(place: Place) -> None:
    check_embed(place, 40, 1280)
    check_embed(place, 40, 1280, blocks=20)
    check_embed(place, 40, 1280, blocks=20, window=8)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("positions", [[0, 63, 64, 65, -1, 200], [31, 32, 33, 130, 1, 2]])
def test_attention(place: Place, head_size: int, positions: list[int]) -> None:
    tiles = tile_table(torch.cuda.get_device_capability(), place.dtype).find(
        ATTENTION, 3, head_size
    )
    check_attention(place, positions, 3, head_size, 16, tiles)
    check_attention(
        place,
        positions,
        3,
        head_size,
        7,
        TileTable(itemsize=place.dtype.itemsize).find(ATTENTION, 3, head_size),
    )


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("positions", [[0, 63, 64, 65, -1, 200], [31, 32, 33, 130, 1, 2]])
def test_hopper_attention(hopper: Place, head_size: int, positions: list[int]) -> None:
    tiles = tile_table((9, 0), hopper.dtype).find(ATTENTION, 3, head_size)
    for page_size in (8, 16, 128):
        check_attention(hopper, positions, 3, head_size, page_size, tiles, hopper=True)
    check_attention(
        hopper,
        positions,
        3,
        head_size,
        7,
        TileTable().find(ATTENTION, 3, head_size),
        splits=1,
        hopper=True,
    )


@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("positions", [[0, 63, 64, 65, -1, 200], [31, 32, 33, 130, 1, 2]])
def test_hopper_attention_of_scaled_pages(
    hopper: Place, head_size: int, positions: list[int], dtype: torch.dtype
) -> None:
    tiles = tile_table((9, 0), hopper.dtype).find(ATTENTION, 3, head_size)
    for page_size in (8, 16, 128):
        check_attention(
            hopper, positions, 3, head_size, page_size, tiles, hopper=True, page_dtype=dtype
        )
    for window in (2, 9):
        check_attention(
            hopper, positions, 3, head_size, 16, tiles, window=window, hopper=True, page_dtype=dtype
        )
    check_window_is_steps(
        hopper, WINDOW_POSITIONS, 3, head_size, tiles, 9, hopper=True, page_dtype=dtype
    )


WINDOWS = [2, 3, 8, 16]
# Windows begin at, end at and cross the borders of chunks and pages.
WINDOW_POSITIONS = [0, 1, 13, 16, 27, 31, 57, 60, 63, 64, -1, 200]


@pytest.mark.parametrize("head_size", [64, 100, 128])
@pytest.mark.parametrize("window", WINDOWS)
def test_attention_of_windows(place: Place, head_size: int, window: int) -> None:
    tiles = tile_table(torch.cuda.get_device_capability(), place.dtype).find(
        ATTENTION, 3, head_size
    )
    check_attention(place, WINDOW_POSITIONS, 3, head_size, 16, tiles, window=window)
    check_window_is_steps(place, WINDOW_POSITIONS, 3, head_size, tiles, window)


@pytest.mark.parametrize("head_size", [64, 80, 100, 256])
@pytest.mark.parametrize("window", WINDOWS)
def test_hopper_attention_of_windows(hopper: Place, head_size: int, window: int) -> None:
    tiles = tile_table((9, 0), hopper.dtype).find(ATTENTION, 3, head_size)
    check_attention(hopper, WINDOW_POSITIONS, 3, head_size, 16, tiles, window=window, hopper=True)
    check_window_is_steps(hopper, WINDOW_POSITIONS, 3, head_size, tiles, window, hopper=True)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize(
    ("positions", "chunks"), [([0, 63, 64, -1, 200, 319], 5), ([-1, 1023, 1], 16), ([7], 1)]
)
def test_combine(place: Place, head_size: int, positions: list[int], chunks: int) -> None:
    check_combine(place, positions, 3, head_size, chunks, AttentionTiles(chunk=64, warps=2))


@pytest.mark.parametrize("name", [*TINY, "gpt_b_256"])
@pytest.mark.parametrize(
    ("backend", "eager"), [("triton", False), ("triton", True), ("torch", True), ("torch", False)]
)
def test_engine_tokens_are_llamagens(name: str, backend: str, eager: bool) -> None:
    """IEEE float32 on the GPU, with and without graphs, on the kernels and on torch's
    operations.
    """
    codes, expected = engine_codes(name, CUDA, backend, enforce_eager=eager)
    assert np.array_equal(codes, expected)
