"""Random cases for the layer kernels, and how a kernel is compared with its torch reference: for
the interpreter and for a GPU.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.model_runner import ModelRunner
from kernels.attention import AttentionTiles, attention, combine, head_stride
from kernels.attention_reference import attention_reference, combine_reference
from kernels.hopper.attention import hopper_attention
from kernels.hopper.products import FusedTiles, fused_linear, fused_project, fused_swiglu
from kernels.hopper.products_reference import (
    fused_linear_reference,
    fused_project_reference,
    fused_swiglu_reference,
)
from kernels.linear import (
    LinearTiles,
    SwigluTiles,
    gate,
    gate_reference,
    linear,
    linear_reference,
    swiglu,
    swiglu_reference,
)
from kernels.norm import add_norm, add_norm_reference, embed, embed_reference
from kernels.operations import Operations, triton_operations
from kernels.tiles import TileTable

POISON = float("nan")


@dataclass(frozen=True)
class Place:
    """Where kernels run and with which numbers."""

    device: torch.device
    dtype: torch.dtype
    launch_pdl: bool = False

    @property
    def tolerance(self) -> float:
        """Largest relative error (of norms) against a float32 reference on the same inputs."""
        return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[self.dtype]

    def random(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed numbers."""
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device, dtype or self.dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """NaN everywhere: what a kernel leaves unwritten shows."""
        return torch.full(shape, POISON, device=self.device, dtype=dtype or self.dtype)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over norm of what is wanted; NaN fails every comparison."""
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check_linear(place: Place, rows: int, outputs: int, inputs: int, tiles: LinearTiles) -> None:
    """Guards splits, tails along every axis, and early tiles against the pipeline."""
    x, weight = place.random(rows, inputs, seed=1), place.random(outputs, inputs, seed=2)
    out = place.poisoned(tiles.splits(inputs), rows, outputs, dtype=torch.float32)
    linear(x, weight, out, tiles, launch_pdl=place.launch_pdl)
    wanted = torch.empty_like(out)
    linear_reference(x.float(), weight.float(), wanted)
    assert relative_error(out.sum(0), wanted.sum(0)) < place.tolerance


def check_swiglu(place: Place, rows: int, hidden: int, inputs: int, tiles: SwigluTiles) -> None:
    """Guards which rows of the weights belong together."""
    x, weight = (
        place.random(rows, inputs, seed=1) * inputs**-0.5,
        place.random(2 * hidden, inputs, seed=2),
    )
    out = place.poisoned(rows, hidden)
    swiglu(x, weight, out, tiles, launch_pdl=place.launch_pdl)
    wanted = torch.empty(rows, hidden, device=place.device)
    swiglu_reference(x.float(), weight.float(), wanted)
    assert relative_error(out, wanted) < place.tolerance


def check_gate(place: Place, rows: int, hidden: int) -> None:
    """Guards the two halves' places."""
    products, out = place.random(rows, 2 * hidden, seed=1), place.poisoned(rows, hidden)
    gate(products, out, launch_pdl=place.launch_pdl)
    wanted = torch.empty(rows, hidden, device=place.device)
    gate_reference(products.float(), wanted)
    assert relative_error(out, wanted) < place.tolerance


def check_add_norm(place: Place, rows: int, width: int, splits: int) -> None:
    """Guards widths that are no power of two, and the order of the partial sums (residuals equal
    bit for bit).
    """
    residual = place.random(rows, width, seed=1, dtype=torch.float32)
    partials, norm_weight = (
        place.random(splits, rows, width, seed=2, dtype=torch.float32),
        place.random(width, seed=3),
    )
    normed, wanted_residual = place.poisoned(rows, width), residual.clone()
    wanted = torch.empty(rows, width, device=place.device)
    add_norm(residual, partials, norm_weight, normed, eps=1e-5, launch_pdl=place.launch_pdl)
    add_norm_reference(wanted_residual, partials, norm_weight, wanted, eps=1e-5)
    assert torch.equal(residual, wanted_residual)
    assert relative_error(normed, wanted) < place.tolerance


def check_fused_linear(
    place: Place, rows: int, outputs: int, inputs: int, tiles: FusedTiles
) -> None:
    """Guards splits, tails along every axis, and the division that is left to the product."""
    x, weight = place.random(rows, inputs, seed=1), place.random(outputs, inputs, seed=2)
    squares = place.random(5, rows, seed=3, dtype=torch.float32).abs() * inputs
    out = place.poisoned(tiles.splits, rows, outputs, dtype=torch.float32)
    fused_linear(x, squares, weight, out, tiles, eps=1e-5)
    wanted = torch.empty_like(out)
    fused_linear_reference(x.float(), squares, weight.float(), wanted, eps=1e-5)
    assert relative_error(out.sum(0), wanted.sum(0)) < place.tolerance


def check_fused_project(
    place: Place, rows: int, width: int, inputs: int, tiles: FusedTiles
) -> None:
    """Guards the cluster's sum, what each of its programs writes, and the blocks of squares."""
    x, weight = (
        place.random(rows, inputs, seed=1) * inputs**-0.5,
        place.random(width, inputs, seed=2),
    )
    residual, norm_weight = (
        place.random(rows, width, seed=3, dtype=torch.float32),
        place.random(width, seed=4),
    )
    normed, squares = (
        place.poisoned(rows, width),
        place.poisoned(-(-width // tiles.outputs), rows, dtype=torch.float32),
    )
    wanted_residual, wanted = residual.clone(), torch.empty(rows, width, device=place.device)
    wanted_squares = torch.empty_like(squares)
    fused_project(x, weight, residual, norm_weight, normed, squares, tiles)
    fused_project_reference(
        x.float(), weight.float(), wanted_residual, norm_weight.float(), wanted, wanted_squares
    )
    assert relative_error(residual, wanted_residual) < place.tolerance
    assert relative_error(normed, wanted) < place.tolerance
    assert relative_error(squares.sum(0), wanted_squares.sum(0)) < place.tolerance


def check_fused_swiglu(
    place: Place, rows: int, hidden: int, inputs: int, tiles: FusedTiles
) -> None:
    """Guards which rows of the weights belong together, and the division that is left to the
    product.
    """
    x, weight = place.random(rows, inputs, seed=1), place.random(2 * hidden, inputs, seed=2)
    squares = place.random(5, rows, seed=3, dtype=torch.float32).abs() * 4096 * inputs**2
    out, wanted = place.poisoned(rows, hidden), torch.empty(rows, hidden, device=place.device)
    fused_swiglu(x, squares, weight, out, tiles, eps=1e-5)
    fused_swiglu_reference(x.float(), squares, weight.float(), wanted, eps=1e-5)
    assert relative_error(out, wanted) < place.tolerance


def check_embed(place: Place, rows: int, width: int, blocks: int | None = None) -> None:
    """Guards class against token, the slot, and ids outside the tables (clamped, not read); with
    blocks, the sums of squares.
    """
    codes = torch.arange(5 * 9, dtype=torch.int32, device=place.device).view(5, 9) - 3
    codes[1, 3] = 10**9
    slots = torch.arange(rows, dtype=torch.int32, device=place.device) % 5
    positions = torch.arange(rows, dtype=torch.int32, device=place.device) % 6 - 1
    labels = torch.arange(rows, dtype=torch.int32, device=place.device) * 3
    tables = (
        place.random(20, width, seed=1),
        place.random(7, width, seed=2),
        place.random(width, seed=3),
    )
    residual, normed = place.poisoned(rows, width, dtype=torch.float32), place.poisoned(rows, width)
    wanted_residual, wanted = (
        torch.empty_like(residual),
        torch.empty(rows, width, device=place.device),
    )
    squares, wanted_squares = (
        (None, None)
        if blocks is None
        else [place.poisoned(blocks, rows, dtype=torch.float32) for _ in range(2)]
    )
    sources = codes, slots, positions, labels, *tables
    embed(*sources, residual, normed, squares, eps=1e-5, headroom=0.25, launch_pdl=place.launch_pdl)
    embed_reference(*sources, wanted_residual, wanted, wanted_squares, eps=1e-5, headroom=0.25)
    assert torch.equal(residual, wanted_residual)
    assert relative_error(normed, wanted) < place.tolerance
    if squares is not None and wanted_squares is not None:
        assert relative_error(squares, wanted_squares) < place.tolerance


def check_attention(
    place: Place,
    positions: list[int],
    heads: int,
    head_size: int,
    page_size: int,
    tiles: AttentionTiles,
    splits: int = 2,
    *,
    hopper: bool = False,
) -> None:
    """Guards chunk borders, pages in any order, padding rows, and that nothing but a row's own
    context is read or written.
    """
    rows, tokens = len(positions), max(*positions, 1) + 1
    pages_per_row = -(-tokens // page_size)
    pages, stride = rows * pages_per_row + 3, head_stride(head_size, place.dtype.itemsize)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))[
        : rows * pages_per_row
    ]
    table = order.to(torch.int32).view(rows, pages_per_row).to(place.device)
    keys, values = (place.poisoned(pages, heads, page_size, stride) for _ in range(2))
    for row, position in enumerate(positions):
        for token in range(
            position
        ):  # what earlier steps wrote, the padding of each token as zeros
            page, offset = table[row, token // page_size], token % page_size
            for cache, seed in ((keys, 10), (values, 11)):
                filled = place.random(heads, head_size, seed=seed + 1000 * row + 7 * token)
                cache[page, :, offset] = torch.nn.functional.pad(filled, (0, stride - head_size))
    qkv = place.random(splits, rows, 3 * heads * head_size, seed=5, dtype=torch.float32)
    angles = torch.rand(tokens, head_size // 2, generator=torch.Generator().manual_seed(6)) * 6
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1).to(place.device)
    at = torch.tensor(positions, dtype=torch.int32, device=place.device)
    chunks = tiles.chunks(tokens)
    chunk_out, chunk_stats = (
        place.poisoned(rows, heads, chunks, size, dtype=torch.float32) for size in (head_size, 2)
    )
    out, wanted = (
        place.poisoned(rows, heads * head_size),
        place.poisoned(rows, heads * head_size, dtype=torch.float32),
    )
    wanted_keys, wanted_values = keys.clone(), values.clone()
    tensors = qkv, rotary, keys, values, table, at, chunk_out, chunk_stats, out
    if hopper:
        hopper_attention(*tensors, tiles)
    else:
        attention(*tensors, tiles, launch_pdl=place.launch_pdl)
    attention_reference(
        qkv, rotary, wanted_keys, wanted_values, table, at, chunk_out, chunk_stats, wanted
    )
    assert relative_error(out, wanted) < place.tolerance
    for got, expected in ((keys, wanted_keys), (values, wanted_values)):
        written = ~expected.isnan()
        assert torch.equal(got.isnan(), expected.isnan()), (
            "a page that is not the row's was written, or a token was not"
        )
        assert relative_error(got[written], expected[written]) < place.tolerance


def check_combine(
    place: Place,
    positions: list[int],
    heads: int,
    head_size: int,
    chunks: int,
    tiles: AttentionTiles,
) -> None:
    """Guards the chunks' weights, padding rows, and that chunks beyond a row's position are not
    read.
    """
    rows = len(positions)
    chunk_out = place.random(rows, heads, chunks, head_size, seed=1, dtype=torch.float32)
    largest = place.random(rows, heads, chunks, seed=2, dtype=torch.float32) * 4
    chunk_stats = torch.stack(
        [largest, place.random(rows, heads, chunks, seed=3, dtype=torch.float32).abs() + 1], dim=-1
    )
    for row, position in enumerate(positions):
        for unwritten in (chunk_out, chunk_stats):
            unwritten[row, :, position // tiles.chunk + 1 :] = (
                POISON  # all of it where the row is padding
            )
    at = torch.tensor(positions, dtype=torch.int32, device=place.device)
    out, wanted = (
        place.poisoned(rows, heads * head_size),
        place.poisoned(rows, heads * head_size, dtype=torch.float32),
    )
    combine(chunk_out, chunk_stats, at, out, tiles, launch_pdl=place.launch_pdl)
    combine_reference(chunk_out, chunk_stats, at, wanted, tiles.chunk)
    assert relative_error(out, wanted) < place.tolerance
    for result in (out, wanted):
        assert not result[at < 0].any()


def large_tiles(model: GPTConfig, pieces: int) -> TileTable:
    """Tiles for the interpreter, where a program costs milliseconds whatever its size: `pieces`
    along the sums, else few.
    """
    width, ffn = model.dim, model.ffn_dim

    def part_of(size: int) -> int:
        return triton.next_power_of_2(-(-size // pieces))

    def product(outputs: int, inputs: int, *, whole: bool) -> LinearTiles:
        tiles = pieces if whole else 1
        return LinearTiles(
            min(1024, triton.next_power_of_2(outputs)),
            part_of(inputs),
            tiles,
            early=1,
            stages=1,
            warps=4,
        )

    largest_half = max(power for power in (64, 128, 256, 512, 1024) if ffn % power == 0)
    return TileTable(
        {
            "linear": {
                # the many programs of the attention add the partial sums
                (3 * width, width): product(3 * width, width, whole=True),
                (width, width): product(width, width, whole=False),
                (width, ffn): product(width, ffn, whole=False),
            },
            "whole_linear": {
                (model.vocab_size, width): product(model.vocab_size, width, whole=True)
            },
            "swiglu": {
                (ffn, width): SwigluTiles(largest_half, part_of(width), early=1, stages=1, warps=4)
            },
            "attention": {
                (model.n_head, model.head_size): AttentionTiles(part_of(model.block_size), warps=2)
            },
        }
    )


class LargeTilesRunner(ModelRunner):
    """The real runner on Triton's kernels, cut up by `large_tiles`."""

    def __init__(
        self,
        gpt: Transformer,
        shape: BatchShape,
        num_pages: int,
        config: EngineConfig,
        pieces: int = 1,
    ) -> None:
        self._pieces = pieces
        super().__init__(gpt, shape, num_pages, config)

    def make_operations(self, gpt: Transformer) -> Operations:
        """As the tiles say."""
        model = gpt.config
        return triton_operations(
            large_tiles(model, self._pieces), model.n_head, model.head_size, launch_pdl=False
        )
