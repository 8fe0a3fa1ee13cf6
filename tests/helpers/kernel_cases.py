"""Random cases for the layer kernels, and how a kernel is compared with its torch reference: for
the interpreter and for a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

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
from kernels.hopper.many_rows_attention import many_rows_attention, takes_pages
from kernels.hopper.many_rows_products import (
    many_rows_linear,
    many_rows_project,
    many_rows_swiglu,
)
from kernels.hopper.peers import EMPTY, Inboxes, gather_parts
from kernels.hopper.products import (
    HEADROOM,
    SQUARES_BLOCK,
    FusedTiles,
    fused_linear,
    fused_project,
    fused_swiglu,
)
from kernels.hopper.products_reference import (
    fused_linear_reference,
    fused_project_reference,
    fused_swiglu_reference,
)
from kernels.hopper.scaled_attention import many_rows_scaled_attention, scaled_attention
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
from kernels.lookahead import row_positions_reference
from kernels.norm import add_norm, add_norm_reference, embed, embed_reference
from kernels.operations import MANY_ROWS, Operations, triton_operations
from kernels.quantization import FP8, QuantizedMatrix, Weights, quantize
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


def quantized(weight: Tensor, scheme: str | None) -> tuple[Weights, Weights]:
    """Weights for a kernel and for its reference, which computes in float32."""
    if scheme is None:
        return weight, weight.float()
    matrix = quantize(weight, scheme)
    return matrix, matrix


def check_int4_groups(place: Place, group: int, tiles: LinearTiles) -> None:
    """Guards which scale a weight has in files of others, whose groups are of other sizes."""
    outputs, inputs, x = 100, 192, place.random(5, 192, seed=1)
    values = quantize(place.random(outputs, inputs, seed=2), "int4").values
    scales = place.random(outputs, inputs // group, seed=3, dtype=torch.float32)
    weight = QuantizedMatrix(values, scales)
    out = place.poisoned(tiles.splits(inputs), len(x), outputs, dtype=torch.float32)
    linear(x, weight, out, tiles, launch_pdl=place.launch_pdl)
    wanted = torch.empty_like(out)
    linear_reference(x.float(), weight, wanted)
    assert relative_error(out.sum(0), wanted.sum(0)) < place.tolerance


def check_linear(
    place: Place,
    rows: int,
    outputs: int,
    inputs: int,
    tiles: LinearTiles,
    scheme: str | None = None,
) -> None:
    """Guards splits, tails along every axis, and early tiles against the pipeline; with a scheme,
    that each weight gets its own scale.
    """
    x = place.random(rows, inputs, seed=1)
    weight, wanted_weight = quantized(place.random(outputs, inputs, seed=2), scheme)
    out = place.poisoned(tiles.splits(inputs), rows, outputs, dtype=torch.float32)
    linear(x, weight, out, tiles, launch_pdl=place.launch_pdl)
    wanted = torch.empty_like(out)
    linear_reference(x.float(), wanted_weight, wanted)
    assert relative_error(out.sum(0), wanted.sum(0)) < place.tolerance


def check_swiglu(
    place: Place,
    rows: int,
    hidden: int,
    inputs: int,
    tiles: SwigluTiles,
    scheme: str | None = None,
) -> None:
    """Guards which rows of the weights, and which scales, belong together."""
    x = place.random(rows, inputs, seed=1) * inputs**-0.5
    weight, wanted_weight = quantized(place.random(2 * hidden, inputs, seed=2), scheme)
    out = place.poisoned(rows, hidden)
    swiglu(x, weight, out, tiles, launch_pdl=place.launch_pdl)
    wanted = torch.empty(rows, hidden, device=place.device)
    swiglu_reference(x.float(), wanted_weight, wanted)
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
    """Guards splits, tails along every axis, and the division left to the product. With many
    rows, their kernel must give the sum of the splits, bit for bit.
    """
    x, weight = place.random(rows, inputs, seed=1), place.random(outputs, inputs, seed=2)
    squares = place.random(5, rows, seed=3, dtype=torch.float32).abs() * inputs
    out = place.poisoned(tiles.splits, rows, outputs, dtype=torch.float32)
    fused_linear(x, squares, weight, out, tiles, eps=1e-5)
    wanted = torch.empty_like(out)
    fused_linear_reference(x.float(), squares, weight.float(), wanted, eps=1e-5)
    assert relative_error(out.sum(0), wanted.sum(0)) < place.tolerance
    if rows > MANY_ROWS:
        of_many = place.poisoned(1, rows, outputs, dtype=torch.float32)
        many_rows_linear(x, squares, weight, of_many, tiles, eps=1e-5)
        assert torch.equal(of_many[0], reduce(add, out))


def check_fused_project(
    place: Place, rows: int, width: int, inputs: int, tiles: FusedTiles
) -> None:
    """Guards the cluster's sum, what each of its programs writes, and the blocks of squares. With
    many rows, their kernel must write the same, bit for bit.
    """
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
        place.poisoned(-(-width // SQUARES_BLOCK), rows, dtype=torch.float32),
    )
    wanted_residual, wanted = residual.clone(), torch.empty(rows, width, device=place.device)
    wanted_squares = torch.empty_like(squares)
    of_many = residual.clone(), place.poisoned(rows, width), torch.full_like(squares, POISON)
    fused_project(x, weight, residual, norm_weight, normed, squares, tiles=tiles)
    fused_project_reference(
        x.float(), weight.float(), wanted_residual, norm_weight.float(), wanted, wanted_squares
    )
    assert relative_error(residual, wanted_residual) < place.tolerance
    assert relative_error(normed, wanted) < place.tolerance
    assert relative_error(squares.sum(0), wanted_squares.sum(0)) < place.tolerance
    if rows > MANY_ROWS:
        many_rows_project(x, weight, of_many[0], norm_weight, *of_many[1:], tiles)
        assert all(map(torch.equal, of_many, (residual, normed, squares)))


def check_project_of_ranks(
    place: Place, rows: int, width: int, inputs: int, tiles: FusedTiles, ranks: int, own: int
) -> None:
    """Guards the sum over ranks, in their order; what is sent to the others; and that the own inbox
    is empty again. The other ranks' terms are there already.
    """
    x, weight = (
        place.random(rows, inputs, seed=1) * inputs**-0.5,
        place.random(width, inputs, seed=2),
    )
    residual, norm_weight = (
        place.random(rows, width, seed=3, dtype=torch.float32),
        place.random(width, seed=4),
    )
    terms = place.random(ranks, rows, width, seed=5, dtype=torch.float32)
    x[0, 0] = float("nan")  # of damaged weights: it must arrive, too
    places, inboxes = inboxes_on_one_gpu(place, terms, own)
    expected = residual.clone()
    normed, squares = (
        place.poisoned(rows, width),
        place.poisoned(-(-width // SQUARES_BLOCK), rows, dtype=torch.float32),
    )
    fused_project(x, weight, residual, norm_weight, normed, squares, inboxes=inboxes, tiles=tiles)
    sent = check_sent(places, own)
    assert sent[0].isnan().all()
    assert relative_error(sent[1:], (x.float() @ weight.float().T)[1:]) < place.tolerance
    terms[own] = sent
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    expected += total
    assert torch.equal(residual[1:], expected[1:])
    assert relative_error(normed[1:], (expected * norm_weight * HEADROOM)[1:]) < place.tolerance
    wanted_squares = expected.square().sum(dim=1)
    assert relative_error(squares.sum(0)[1:], wanted_squares[1:]) < place.tolerance


def check_gather(place: Place, rows: int, columns: int, ranks: int, own: int) -> None:
    """Guards whose part goes where."""
    parts = place.random(ranks, rows, columns, seed=1, dtype=torch.float32)
    places, inboxes = inboxes_on_one_gpu(place, parts, own)
    out = place.poisoned(rows, ranks * columns, dtype=torch.float32)
    gather_parts(parts[own], inboxes, out)
    assert torch.equal(out, parts.transpose(0, 1).flatten(1))
    assert torch.equal(check_sent(places, own), parts[own])


def inboxes_on_one_gpu(place: Place, numbers: Tensor, own: int) -> tuple[Tensor, Inboxes]:
    """All ranks' inboxes: the own one has the others' numbers [ranks, rows, columns], and those of
    the others are empty.

    Returns:
        places: int32 [ranks, ranks, rows, columns]
    """
    ranks = len(numbers)
    places = torch.full((ranks, *numbers.shape), EMPTY, dtype=torch.int32, device=place.device)
    places[own] = numbers.view(torch.int32)
    places[own, own] = EMPTY
    return places, Inboxes(tuple(inbox.data_ptr() for inbox in places), own)


def check_sent(places: Tensor, own: int) -> Tensor:
    """Asserts that the own inbox is empty, and that each other one has the same numbers of this
    rank and nothing else. Returns the numbers.
    """
    others = [rank for rank in range(len(places)) if rank != own]
    sent = places[others[0], own].clone()
    for rank in others:
        assert torch.equal(places[rank, own], sent)
        places[rank, own] = EMPTY
    assert (places == EMPTY).all()
    return sent.view(torch.float32)


def check_fused_swiglu(
    place: Place, rows: int, hidden: int, inputs: int, tiles: FusedTiles
) -> None:
    """Guards which rows of the weights belong together, and the division that is left to the
    product. With many rows, their kernel must write the same, bit for bit.
    """
    x, weight = place.random(rows, inputs, seed=1), place.random(2 * hidden, inputs, seed=2)
    squares = place.random(5, rows, seed=3, dtype=torch.float32).abs() * 4096 * inputs**2
    out, wanted = place.poisoned(rows, hidden), torch.empty(rows, hidden, device=place.device)
    fused_swiglu(x, squares, weight, out, tiles, eps=1e-5)
    fused_swiglu_reference(x.float(), squares, weight.float(), wanted, eps=1e-5)
    assert relative_error(out, wanted) < place.tolerance
    if rows > MANY_ROWS:
        of_many = place.poisoned(rows, hidden)
        many_rows_swiglu(x, squares, weight, of_many, tiles, eps=1e-5)
        assert torch.equal(of_many, out)


def check_embed(
    place: Place, rows: int, width: int, blocks: int | None = None, window: int = 1
) -> None:
    """Guards class against token, the slot, and ids outside the tables (clamped, not read); with
    blocks, the sums of squares.
    """
    codes = torch.arange(5 * 9, dtype=torch.int32, device=place.device).view(5, 9) - 3
    codes[1, 3] = 10**9
    sequence = torch.arange(rows // window, dtype=torch.int32, device=place.device)
    slots, positions, labels = sequence % 5, sequence % 6 - 1, sequence * 3
    limits = positions + 1 + sequence % window
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
    sources = codes, slots, positions, limits, labels, *tables
    embed(*sources, residual, normed, squares, eps=1e-5, headroom=0.25, launch_pdl=place.launch_pdl)
    embed_reference(*sources, wanted_residual, wanted, wanted_squares, eps=1e-5, headroom=0.25)
    assert torch.equal(residual, wanted_residual)
    assert relative_error(normed, wanted) < place.tolerance
    if squares is not None and wanted_squares is not None:
        assert relative_error(squares, wanted_squares) < place.tolerance


def poisoned_pages(place: Place, dtype: torch.dtype, *shape: int) -> Tensor:
    """Pages of NaN; of int8, which has none, the NaN is in the scales."""
    if dtype == torch.int8:
        return torch.full(shape, 99, dtype=dtype, device=place.device)
    return place.poisoned(*shape).to(dtype)


@dataclass
class AttentionCase:
    """New tokens of some sequences, and pages with what came before them. All else is NaN."""

    qkv: Tensor  # [splits, sequences, window, 3 * heads * head_size]
    rotary: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    positions: Tensor
    limits: Tensor
    # of fp8 and int8 pages, [2, pages, heads, page_size]
    kv_scales: Tensor | None = None

    @classmethod
    def random(
        cls,
        place: Place,
        positions: list[int],
        heads: int,
        head_size: int,
        page_size: int,
        splits: int,
        window: int,
        page_dtype: torch.dtype | None = None,
    ) -> "AttentionCase":
        """Sequences at these positions, with pages in any order. All tokens of the window take
        part in the first sequence, all but the last one in the second, and so on.
        """
        sequences, tokens = len(positions), max(*positions, 1) + window
        pages_of_one = -(-tokens // page_size)
        dtype = page_dtype or place.dtype
        pages, stride = sequences * pages_of_one + 3, head_stride(head_size, dtype.itemsize)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        table = order[: sequences * pages_of_one].int().view(sequences, -1).to(place.device)
        keys, values = (
            poisoned_pages(place, dtype, pages, heads, page_size, stride) for _ in range(2)
        )
        # Numbers of about 9 times their scales are about 1, as the queries are.
        scales = place.random(2, pages, heads, page_size, seed=9, dtype=torch.float32).exp() / 9
        kv_scales = torch.full_like(scales, POISON) if page_dtype else None
        for sequence, position in enumerate(positions):
            for token in range(position):  # the padding of each token is zeros
                page, offset = table[sequence, token // page_size], token % page_size
                if kv_scales is not None:
                    kv_scales[:, page, :, offset] = scales[:, page, :, offset]
                for cache, seed in ((keys, 10), (values, 11)):
                    filled = place.random(heads, head_size, seed=seed + 1000 * sequence + 7 * token)
                    filled = filled * 9 if page_dtype else filled
                    cache[page, :, offset] = torch.nn.functional.pad(
                        filled, (0, stride - head_size)
                    ).to(dtype)
        qkv = place.random(
            splits, sequences, window, 3 * heads * head_size, seed=5, dtype=torch.float32
        )
        angles = torch.rand(tokens, head_size // 2, generator=torch.Generator().manual_seed(6)) * 6
        if page_dtype == FP8 and place.device.type == "cpu":
            # The interpreter rounds to fp8 wrongly (Triton 3.6): nothing is left to round.
            qkv[1:], angles = 0, torch.zeros_like(angles)
            qkv = qkv.to(FP8).float()
            qkv.unflatten(-1, (-1, head_size))[0, ..., 0] = 7  # the largest, times 448 / 7
        rotary = torch.stack([angles.cos(), angles.sin()], dim=-1).to(place.device)
        at = torch.tensor(positions, dtype=torch.int32, device=place.device)
        taking_part = window - torch.arange(sequences, device=place.device) % window
        limits = (at + taking_part).int()
        return cls(qkv, rotary, keys, values, table, at, limits, kv_scales)

    @property
    def taking_part(self) -> Tensor:
        """Which new tokens take part: [sequences, window]."""
        window = self.qkv.shape[2]
        return row_positions_reference(self.positions, self.limits, window).view(-1, window) >= 0

    def attend(
        self,
        place: Place,
        tiles: AttentionTiles | None,
        *,
        hopper: bool = False,
        many_rows: bool = False,
        first: int = 0,
        window: int | None = None,
    ) -> Tensor:
        """What the kernel, or with no tiles the reference, writes: [sequences, window, heads *
        head_size]. It writes to the pages, too.

        Args:
            many_rows: with Hopper's kernel of many rows.
            first, window: of the new tokens, only these; by default all.
        """
        window = window or self.qkv.shape[2]
        qkv = self.qkv[:, :, first : first + window].flatten(1, 2).contiguous()
        rows, width = qkv.shape[1], qkv.shape[2] // 3
        head_size = self.rotary.shape[1] * 2
        heads, chunks = width // head_size, 1 if tiles is None else tiles.chunks(len(self.rotary))
        scratch = [
            place.poisoned(rows, heads, chunks, size, dtype=torch.float32)
            for size in (head_size, 2)
        ]
        out = place.poisoned(rows, width, dtype=torch.float32 if tiles is None else None)
        at = torch.where(self.positions < 0, -1, self.positions + first).int()
        attend: Callable[..., None] = attention_reference
        scales = () if self.kv_scales is None else (self.kv_scales,)
        if tiles is not None and hopper:
            attend = partial(scaled_attention if scales else hopper_attention, tiles=tiles)
        elif tiles is not None:
            attend = partial(attention, tiles=tiles, launch_pdl=place.launch_pdl)
        pages = self.keys, self.values, self.table
        if many_rows:
            assert tiles is not None
            attend_at_once: Callable[..., None] = many_rows_attention
            if scales:
                attend_at_once = many_rows_scaled_attention
            attend_at_once(qkv, self.rotary, *pages, at, self.limits, out, *scales, tiles)
            return out.view(-1, window, width)
        attend(qkv, self.rotary, *pages, at, self.limits, *scratch, out, *scales)
        return out.view(-1, window, width)


def check_attention(
    place: Place,
    positions: list[int],
    heads: int,
    head_size: int,
    page_size: int,
    tiles: AttentionTiles,
    splits: int = 2,
    *,
    window: int = 1,
    hopper: bool = False,
    page_dtype: torch.dtype | None = None,
) -> None:
    """Guards chunk borders, pages in any order, padding and rows beyond a limit, and that nothing
    but a row's own context is read or written; with pages of a byte an element, scales. Hopper's
    kernel of many rows must write the same, bit for bit.
    """
    shape = (positions, heads, head_size, page_size, splits, window, page_dtype)
    case, wanted_case = (AttentionCase.random(place, *shape) for _ in range(2))
    out, wanted = case.attend(place, tiles, hopper=hopper), wanted_case.attend(place, None)
    # Sums in another order can round one element in thousands to its neighbour.
    tolerance = place.tolerance if page_dtype is None else max(place.tolerance, 5e-3)
    assert relative_error(out, wanted) < tolerance
    assert not out[~case.taking_part].any()
    written_by = [
        (case.keys.float(), wanted_case.keys.float()),
        (case.values.float(), wanted_case.values.float()),
    ]
    if case.kv_scales is not None and wanted_case.kv_scales is not None:
        written_by.append((case.kv_scales, wanted_case.kv_scales))
    for got, expected in written_by:
        written = ~expected.isnan()
        assert torch.equal(got.isnan(), expected.isnan()), (
            "a page that is not the row's was written, or a token was not"
        )
        assert relative_error(got[written], expected[written]) < tolerance
    if hopper and window == 1 and tiles.warps == 1 and takes_pages(page_size):
        again = AttentionCase.random(place, *shape)
        assert torch.equal(again.attend(place, tiles, many_rows=True), out)
        for got, expected in ((again.keys, case.keys), (again.values, case.values)):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        if case.kv_scales is not None and again.kv_scales is not None:
            assert torch.equal(again.kv_scales.view(torch.int32), case.kv_scales.view(torch.int32))


def check_window_is_steps(
    place: Place,
    positions: list[int],
    heads: int,
    head_size: int,
    tiles: AttentionTiles,
    window: int,
    *,
    hopper: bool = False,
    page_dtype: torch.dtype | None = None,
) -> None:
    """Guards that a token of a window comes out as it does alone, bit for bit, whatever is behind
    it: the last token of each window is huge or not finite.
    """
    case = AttentionCase.random(place, positions, heads, head_size, 16, 3, window, page_dtype)
    case.limits = case.positions + window
    case.qkv[:, ::2, -1] *= 3e3  # beyond fp8, too
    case.qkv[:, 1::2, -1] = torch.inf
    together = case.attend(place, tiles, hopper=hopper)
    for index in range(window - 1):
        alone = case.attend(place, tiles, hopper=hopper, first=index, window=1)
        assert torch.equal(together[:, index], alone[:, 0]), index
    finite = together[:, -1].isfinite().all(dim=1).tolist()
    expected = [position < 0 or index % 2 == 0 for index, position in enumerate(positions)]
    assert finite == expected


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
    combine(chunk_out, chunk_stats, at, at + 1, out, tiles, launch_pdl=place.launch_pdl)
    combine_reference(chunk_out, chunk_stats, at, at + 1, wanted, tiles.chunk)
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
