"""Paged decode attention: one new token a row against the keys and values of all tokens before it.

The context is cut into chunks, a program each, so that few rows fill a GPU; `combine` weighs the
chunks' results. The attention kernel also finishes the query-key-value product (adding its partial
sums), turns queries and keys by their rotary angles, and writes the new key and value. A page holds
[heads, page_size, stride] elements, so that one head's part of it is contiguous; `stride` is the
head size rounded up to 16 bytes (`head_stride`), and what pads it is always written as zeros.
Rotary positions as in LlamaGen: adjacent elements are a pair (Su et al. 2021, arXiv:2104.09864);
combining chunks as in flash-decoding (Dao et al. 2023).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import pdl_option

HEAD_SIZES = (64, 80, 96, 100, 112, 128, 256)
_COLUMNS = 8  # least width of a matrix product


@dataclass(frozen=True)
class AttentionTiles:
    """How a row's context is cut up."""

    chunk: int  # tokens of a program
    warps: int
    registers: int | None = (
        # most of a thread, so that more programs fit beside each other; None: the compiler's choice
        None
    )

    def chunks(self, tokens: int) -> int:
        """Programs for the longest context."""
        return -(-tokens // self.chunk)


def head_stride(head_size: int, itemsize: int) -> int:
    """Elements from one token to the next in a page: the head size, rounded up so that a token
    starts at a multiple of 16 bytes.
    """
    step = 16 // itemsize
    return -(-head_size // step) * step


@triton.jit(do_not_specialize=["rows"])
def _attention_kernel(
    qkv,  # [SPLITS, rows, 3, HEADS, HEAD_SIZE] partial sums
    rotary,  # [positions, HEAD_SIZE / 2, 2] float32
    key_pages,  # [pages, HEADS, PAGE_SIZE, STRIDE]
    value_pages,  # likewise
    page_table,  # [rows, PAGES]
    positions,  # [rows]
    mixed,  # [rows, HEADS, CHUNKS, HEAD_SIZE] float32, written
    stats,  # [rows, HEADS, CHUNKS, 2] float32, written: largest score (base 2), sum of weights
    rows,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    head, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if LAUNCH_PDL:
        gdc_launch_dependents()
    # Written before this step began: positions, page table, and every key and value but the newest
    # token's.
    position = tl.load(positions + row)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    page = tl.load(
        page_table + row * PAGES + token // PAGE_SIZE, mask=token < PAGES * PAGE_SIZE, other=0
    ).to(tl.int64)
    if chunk * CHUNK > position:
        # without waiting: the row's first chunk waits, so the kernel still ends after the one
        # before it
        return
    lane = tl.arange(0, HEAD_TILE)
    live_lane = lane < HEAD_SIZE
    stored_lane = lane < STRIDE
    old = token < position
    at = (page * HEADS + head) * (PAGE_SIZE * STRIDE) + token % PAGE_SIZE * STRIDE
    live = old[:, None] & stored_lane[None, :]
    # Past the first-level cache, which another step's token beside these may have filled.
    keys = tl.load(
        key_pages + at[:, None] + lane[None, :], mask=live, other=0.0, cache_modifier=".cg"
    )
    values = tl.load(
        value_pages + at[:, None] + lane[None, :], mask=live, other=0.0, cache_modifier=".cg"
    )
    angle = rotary + position * HEAD_SIZE + lane // 2 * 2
    cosine = tl.load(angle, mask=live_lane, other=0.0)
    sine = tl.load(angle + 1, mask=live_lane, other=0.0)
    sine = tl.where(lane % 2 == 0, -sine, sine)
    if LAUNCH_PDL:
        gdc_wait()
    WIDTH: tl.constexpr = HEADS * HEAD_SIZE
    SCALE: tl.constexpr = HEAD_SIZE**-0.5 * 1.4426950408889634  # scores are in base 2
    source = qkv + row.to(tl.int64) * 3 * WIDTH + head * HEAD_SIZE
    split_size = rows.to(tl.int64) * 3 * WIDTH
    query = _turned(source, split_size, cosine, sine, HEAD_SIZE, HEAD_TILE, SPLITS)
    new_score = float("-inf")
    new_value = tl.zeros([HEAD_TILE], tl.float32)
    if position < (chunk + 1) * CHUNK:  # the newest token falls into this chunk
        key = _turned(source + WIDTH, split_size, cosine, sine, HEAD_SIZE, HEAD_TILE, SPLITS).to(
            key_pages.dtype.element_ty
        )
        for split in tl.static_range(SPLITS):
            new_value += tl.load(
                source + split * split_size + 2 * WIDTH + lane, mask=live_lane, other=0.0
            ).to(tl.float32)
        value = new_value.to(value_pages.dtype.element_ty)
        new_page = tl.load(page_table + row * PAGES + position // PAGE_SIZE).to(tl.int64)
        new_at = (new_page * HEADS + head) * (PAGE_SIZE * STRIDE) + position % PAGE_SIZE * STRIDE
        tl.store(key_pages + new_at + lane, key, mask=stored_lane)
        tl.store(value_pages + new_at + lane, value, mask=stored_lane)
        new_score = tl.sum(query * key.to(tl.float32), 0) * SCALE
        new_value = value.to(tl.float32)
    # One query, repeated to the least number of columns that the matrix unit takes: its products
    # cost nothing beside the loads.
    queries = tl.broadcast_to(query.to(key_pages.dtype.element_ty)[:, None], [HEAD_TILE, COLUMNS])
    score = tl.dot(keys, queries, input_precision="ieee") * SCALE  # [CHUNK, COLUMNS], columns alike
    score = tl.where(old[:, None], score, float("-inf"))
    largest = tl.maximum(tl.max(score, 0), new_score)  # [COLUMNS]
    weight = tl.exp2(score - largest[None, :])
    new_weight = tl.exp2(new_score - largest)
    total = tl.dot(
        tl.trans(values), weight.to(value_pages.dtype.element_ty), input_precision="ieee"
    )
    total += new_value[:, None] * new_weight[None, :]  # [HEAD_TILE, COLUMNS]
    result = (row.to(tl.int64) * HEADS + head) * CHUNKS + chunk
    column = tl.arange(0, COLUMNS)
    first = column == 0
    tl.store(
        mixed + result * HEAD_SIZE + lane[:, None] + column[None, :],
        total,
        mask=live_lane[:, None] & first[None, :],
    )
    tl.store(stats + result * 2 + column, largest, mask=first)
    tl.store(stats + result * 2 + 1 + column, tl.sum(weight, 0) + new_weight, mask=first)


@triton.jit
def _turned(
    source,
    split_size,
    cosine,
    sine,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A head's vector [HEAD_TILE]: its partial sums added in order, then turned; `sine` bears the
    sign of the even elements.
    """
    lane = tl.arange(0, HEAD_TILE)
    live = lane < HEAD_SIZE
    own = tl.zeros([HEAD_TILE], tl.float32)
    other = tl.zeros([HEAD_TILE], tl.float32)  # the other element of the pair
    for split in tl.static_range(SPLITS):
        own += tl.load(source + split * split_size + lane, mask=live, other=0.0).to(tl.float32)
        other += tl.load(source + split * split_size + (lane ^ 1), mask=live, other=0.0).to(
            tl.float32
        )
    return own * cosine + other * sine


@triton.jit
def _combine_kernel(
    mixed,  # [rows, HEADS, CHUNKS, HEAD_SIZE]
    stats,  # [rows, HEADS, CHUNKS, 2]
    positions,  # [rows]
    out,  # [rows, HEADS * HEAD_SIZE]
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_TILE: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(1)
    if LAUNCH_PDL:
        gdc_launch_dependents()
    position = tl.load(positions + row)
    lane = tl.arange(0, HEAD_TILE)
    live_lane = lane < HEAD_SIZE
    chunk = tl.arange(0, CHUNKS_TILE)
    live = (chunk * CHUNK <= position) & (chunk < CHUNKS)
    result = (row.to(tl.int64) * HEADS + head) * CHUNKS + chunk
    if LAUNCH_PDL:
        gdc_wait()
    largest = tl.load(stats + result * 2, mask=live, other=float("-inf"))
    total = tl.load(stats + result * 2 + 1, mask=live, other=0.0)
    parts = tl.load(
        mixed + result[:, None] * HEAD_SIZE + lane[None, :],
        mask=live[:, None] & live_lane[None, :],
        other=0.0,
    )
    weight = tl.where(live, tl.exp2(largest - tl.max(largest, 0)), 0.0)
    # A row that is padding has no chunk at all: its result is zero, not 0 / 0.
    joined = tl.sum(parts * weight[:, None], 0) / tl.where(
        position >= 0, tl.sum(total * weight, 0), 1.0
    )
    at = (row.to(tl.int64) * HEADS + head) * HEAD_SIZE + lane
    tl.store(out + at, joined.to(out.dtype.element_ty), mask=live_lane)


def attention(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    mixed: Tensor,
    stats: Tensor,
    out: Tensor,
    tiles: AttentionTiles,
    *,
    launch_pdl: bool,
) -> None:
    """Writes the newest token's key and value, and attends from it to the row's whole context. Two
    kernels.

    Args:
        qkv: [splits, rows, 3 * heads * head_size], partial sums of the query-key-value product.
        rotary: float32 [positions, head_size / 2, 2], cosine and sine.
        key_pages, value_pages: [pages, heads, page_size, stride]
        page_table: int32 [rows, pages of a row]; only entries up to the row's position are read.
        positions: int32 [rows], the newest token's; below 0 for padding, which touches no page and
            comes out as zeros.
        mixed: float32 [rows, heads, chunks, head_size], scratch; stats: float32 [rows, heads,
            chunks, 2], scratch.
        out: [rows, heads * head_size]
    """
    splits, rows, heads, head_size, page_size, stride, chunks = check_sizes(
        qkv, rotary, key_pages, page_table, mixed, stats, tiles
    )
    _attention_kernel[(heads, chunks, rows)](
        qkv,
        rotary,
        key_pages,
        value_pages,
        page_table,
        positions,
        mixed,
        stats,
        rows,
        HEADS=heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=triton.next_power_of_2(stride),
        STRIDE=stride,
        PAGE_SIZE=page_size,
        PAGES=page_table.shape[1],
        CHUNK=tiles.chunk,
        CHUNKS=chunks,
        SPLITS=splits,
        COLUMNS=_COLUMNS,
        LAUNCH_PDL=launch_pdl,
        num_warps=tiles.warps,
        maxnreg=tiles.registers,
        **pdl_option(launch_pdl),
    )
    combine(mixed, stats, positions, out, tiles, launch_pdl=launch_pdl)


def check_sizes(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    page_table: Tensor,
    mixed: Tensor,
    stats: Tensor,
    tiles: AttentionTiles,
) -> tuple[int, int, int, int, int, int, int]:
    """Splits, rows, heads, head size, page size, stride and chunks of the tensors of `attention`,
    once they agree.
    """
    splits, rows = qkv.shape[:2]
    _, heads, page_size, stride = key_pages.shape
    head_size, chunks = rotary.shape[1] * 2, mixed.shape[2]
    assert stats.shape == (rows, heads, chunks, 2) and mixed.shape == (
        rows,
        heads,
        chunks,
        head_size,
    )
    longest = min(rotary.shape[0] - 1, page_table.shape[1] * page_size)
    assert chunks * tiles.chunk >= longest, "the chunks do not cover the longest context"
    assert qkv.shape[2] == 3 * heads * head_size and stride == head_stride(
        head_size, key_pages.element_size()
    )
    return splits, rows, heads, head_size, page_size, stride, chunks


def combine(
    mixed: Tensor,
    stats: Tensor,
    positions: Tensor,
    out: Tensor,
    tiles: AttentionTiles,
    *,
    launch_pdl: bool,
) -> None:
    """Weighs the chunks' results: `out` of `attention` from its `mixed` and `stats`."""
    rows, heads, chunks, head_size = mixed.shape
    _combine_kernel[(heads, rows)](
        mixed,
        stats,
        positions,
        out,
        HEADS=heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=triton.next_power_of_2(head_size),
        CHUNK=tiles.chunk,
        CHUNKS=chunks,
        CHUNKS_TILE=triton.next_power_of_2(chunks),
        LAUNCH_PDL=launch_pdl,
        num_warps=1,
        **pdl_option(launch_pdl),
    )


def combine_reference(
    mixed: Tensor, stats: Tensor, positions: Tensor, out: Tensor, chunk: int
) -> None:
    """The same in torch, for chunks of so many tokens; what lies beyond a row's chunks may be
    anything.
    """
    begins = torch.arange(mixed.shape[2], device=out.device) * chunk
    live = (begins <= positions[:, None])[:, None]  # [rows, 1, chunks]
    largest, total = stats.unbind(-1)  # [rows, heads, chunks]
    largest = largest.masked_fill(~live, -torch.inf)
    weight = (largest - largest.amax(dim=-1, keepdim=True)).exp2().masked_fill(~live, 0)
    # [rows, heads, head_size]
    joined = (mixed.masked_fill(~live[..., None], 0) * weight[..., None]).sum(dim=2)
    weights = (
        (total.masked_fill(~live, 0) * weight).sum(dim=-1).masked_fill(positions[:, None] < 0, 1)
    )
    out.copy_((joined / weights[..., None]).flatten(1))


def attention_reference(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    mixed: Tensor,
    stats: Tensor,
    out: Tensor,
) -> None:
    """The same in torch, for any head size; `mixed` and `stats` are not used."""
    attend = _attend_in_place if out.device.type == "cpu" else _attend_to_copies
    attend(qkv.sum(dim=0), rotary, key_pages, value_pages, page_table, positions, out)


def _attend_in_place(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    """On a CPU, where a look at the positions costs nothing and a copy of the context more than all
    else: none is made.
    """
    out.zero_()
    rows = (positions >= 0).nonzero()[:, 0]
    if len(rows) == 0:
        return
    _, heads, page_size, stride = key_pages.shape
    head_size = rotary.shape[1] * 2
    at, table = positions[rows].long(), page_table[rows].long()
    vectors = qkv[rows].view(len(rows), 3 * heads, head_size)
    # [rows, heads, head_size]
    query, key = _rotated(vectors[:, : 2 * heads], rotary[at]).chunk(2, dim=1)
    newest = table[torch.arange(len(rows)), at // page_size]
    for cache, new in ((key_pages, key), (value_pages, vectors[:, 2 * heads :])):
        cache[newest, :, at % page_size] = torch.nn.functional.pad(new, (0, stride - head_size)).to(
            cache.dtype
        )
    mixed = _mixed_in_place(
        query, key_pages[..., :head_size], value_pages[..., :head_size], table, at
    )
    out[rows] = mixed.flatten(1).to(out.dtype)


def _mixed_in_place(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, at: Tensor
) -> Tensor:
    """Values mixed by the scores of queries [rows, heads, head_size], all rows being live: float32,
    the queries' shape.

    Queries and weights go to the pages, not pages to the rows. What comes of a page that no row has
    is not used.
    """
    rows, heads, head_size = query.shape
    page_size = key_pages.shape[2]
    columns = int(at.max()) // page_size + 1
    # of every page of a row: [n]
    row, column = (torch.arange(columns) <= (at // page_size)[:, None]).nonzero(as_tuple=True)
    extent, place = _extent(table[row, column])
    # [pages, heads, page_size, head_size]
    keys, values = (pages[extent].float() for pages in (key_pages, value_pages))
    row_of_page, column_of_page = torch.zeros(2, len(keys), dtype=torch.int64)
    row_of_page[place], column_of_page[place] = row, column

    # [pages, heads, 1, page_size]
    products = (query * head_size**-0.5)[row_of_page, :, None] @ keys.transpose(2, 3)
    scores = query.new_empty(rows, heads, columns, page_size)
    scores[row, :, column] = products[place, :, 0]
    unseen = (torch.arange(columns * page_size) > at[:, None]).view(rows, 1, columns, page_size)
    weights = scores.masked_fill_(unseen, -torch.inf).flatten(2).softmax(dim=-1).view_as(scores)

    # [pages, heads, 1, page_size]
    weights_of_page = weights[row_of_page, :, column_of_page][:, :, None]
    parts = (weights_of_page @ values)[place, :, 0]  # [n, heads, head_size]
    if (
        not parts.sum().isfinite()
    ):  # behind the newest token its page may hold anything, and 0 times NaN or infinity is not 0
        unseen_of_page = unseen[row_of_page, :, column_of_page]  # [pages, 1, page_size]
        parts = (weights_of_page @ values.masked_fill(unseen_of_page[..., None], 0))[place, :, 0]
    return torch.zeros_like(query).index_add_(0, row, parts)


def _extent(pages: Tensor) -> tuple[slice | Tensor, Tensor]:
    """What of a cache to read for those pages [n], and where therein each of them is.

    All from the first to the last, a view, if at least half of that is wanted; else copies of the
    pages.
    """
    first, last = (int(page) for page in pages.aminmax())
    if last - first < 2 * len(pages):
        return slice(first, last + 1), pages - first
    return pages, torch.arange(len(pages))


def _attend_to_copies(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    """Without a look at the positions, for which the host would have to wait: every page of every
    row is copied, and masked.
    """
    rows = len(positions)
    _, heads, page_size, stride = key_pages.shape
    head_size = rotary.shape[1] * 2
    live = positions >= 0
    at = positions.clamp(min=0).long()
    query, key, value = qkv.view(rows, 3, heads, head_size).unbind(1)  # [rows, heads, head_size]
    angles = rotary[at]  # [rows, head_size / 2, 2]
    query = _rotated(query, angles)
    # Padding rows repeat the write of a live row: were they to write elsewhere, two rows could
    # write one place differently.
    row = torch.arange(rows, device=out.device)
    source = torch.where(live, row, live.int().argmax())
    pages, offsets = page_table.long()[row, at // page_size][source], (at % page_size)[source]
    for cache, new in ((key_pages, _rotated(key, angles)), (value_pages, value.float())):
        filled = torch.nn.functional.pad(new, (0, stride - head_size)).to(cache.dtype)[source]
        cache[pages, :, offsets] = torch.where(live.any(), filled, cache[pages, :, offsets])
    token = torch.arange(page_table.shape[1] * page_size, device=out.device)
    seen = (token[None, :] <= positions[:, None]) & live[:, None]  # [rows, tokens]
    table = torch.where(seen[:, ::page_size], page_table, 0).flatten()
    keys, values = (
        _gathered(pages, table, rows)[..., :head_size].float() for pages in (key_pages, value_pages)
    )
    score = (query[:, :, None] @ keys.transpose(2, 3))[
        :, :, 0
    ] * head_size**-0.5  # [rows, heads, tokens]
    weight = score.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1).nan_to_num()
    # What is not the row's own may be anything, and 0 times that not 0.
    values.masked_fill_(~seen[:, None, :, None], 0)
    joined = weight[:, :, None] @ values
    out.copy_(joined[:, :, 0].flatten(1))


def _gathered(pages: Tensor, table: Tensor, rows: int) -> Tensor:
    """The pages of a table [rows * pages of a row], as a copy [rows, heads, tokens, stride]."""
    _, heads, page_size, stride = pages.shape
    chosen = pages.index_select(0, table).view(rows, -1, heads, page_size, stride)
    return chosen.transpose(1, 2).reshape(rows, heads, -1, stride)


def _rotated(vectors: Tensor, angles: Tensor) -> Tensor:
    """Vectors [rows, heads, head_size] turned by angles [rows, head_size / 2, 2], in float32."""
    first, second = vectors.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles[:, None].unbind(-1)  # [rows, 1, head_size / 2]
    return torch.stack(
        [first * cosine - second * sine, second * cosine + first * sine], dim=-1
    ).flatten(-2)
