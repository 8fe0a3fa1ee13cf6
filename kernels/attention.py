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

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

from kernels.linear import pdl_option

HEAD_SIZES = (64, 80, 96, 100, 112, 128, 256)
_COLUMNS = tl.constexpr(8)  # least width of a matrix product


@dataclass(frozen=True)
class AttentionTiles:
    """How a row's context is cut up."""

    chunk: int  # tokens of a program
    warps: int
    # the most of a thread, so that more programs fit beside each other; None: the compiler's choice
    registers: int | None = None

    def chunks(self, tokens: int) -> int:
        """Programs that the longest context takes."""
        return -(-tokens // self.chunk)


def head_stride(head_size: int, itemsize: int) -> int:
    """Elements from one token to the next in a page. This is the head size, rounded up so that a
    token starts at a multiple of 16 bytes.
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
    chunk_out,  # [rows, HEADS, CHUNKS, HEAD_SIZE] float32, written
    # [rows, HEADS, CHUNKS, 2] float32, written: largest score (base 2), sum of weights
    chunk_stats,
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
    LAUNCH_PDL: tl.constexpr,
):
    head, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if LAUNCH_PDL:
        gdc_launch_dependents()
    # README, rule 2: positions, page table, and every key and value but the newest token's were
    # written before this step began.
    position = tl.load(positions + row)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    page = tl.load(
        page_table + row * PAGES + token // PAGE_SIZE, mask=token < PAGES * PAGE_SIZE, other=0
    ).to(tl.int64)
    if chunk * CHUNK > position:
        # README, rule 5: the row's first chunk waits, so this program need not
        return
    offset = tl.arange(0, HEAD_TILE)
    head_mask = offset < HEAD_SIZE
    stride_mask = offset < STRIDE
    old = token < position
    at = (page * HEADS + head) * (PAGE_SIZE * STRIDE) + token % PAGE_SIZE * STRIDE
    mask = old[:, None] & stride_mask[None, :]
    # Past the first-level cache, which another step's token beside these may have filled.
    keys = tl.load(
        key_pages + at[:, None] + offset[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )
    values = tl.load(
        value_pages + at[:, None] + offset[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )
    angle = rotary + position * HEAD_SIZE + offset // 2 * 2
    cosine = tl.load(angle, mask=head_mask, other=0.0)
    sine = tl.load(angle + 1, mask=head_mask, other=0.0)
    sine = tl.where(offset % 2 == 0, -sine, sine)
    if LAUNCH_PDL:
        gdc_wait()  # README, rule 3: qkv comes after it
    WIDTH: tl.constexpr = HEADS * HEAD_SIZE
    SCALE: tl.constexpr = HEAD_SIZE**-0.5 * 1.4426950408889634  # scores are in base 2
    source = qkv + row.to(tl.int64) * 3 * WIDTH + head * HEAD_SIZE
    split_size = rows.to(tl.int64) * 3 * WIDTH
    query = _rotated_sum(source, split_size, cosine, sine, HEAD_SIZE, HEAD_TILE, SPLITS)
    new_score = float("-inf")
    new_value = tl.zeros([HEAD_TILE], tl.float32)
    if position < (chunk + 1) * CHUNK:  # the newest token falls into this chunk
        key, value = _newest_key_value(
            source, split_size, cosine, sine, keys.dtype, WIDTH, HEAD_SIZE, HEAD_TILE, SPLITS
        )
        new_page = tl.load(page_table + row * PAGES + position // PAGE_SIZE).to(tl.int64)
        new_at = (new_page * HEADS + head) * (PAGE_SIZE * STRIDE) + position % PAGE_SIZE * STRIDE
        tl.store(key_pages + new_at + offset, key, mask=stride_mask)
        tl.store(value_pages + new_at + offset, value, mask=stride_mask)
        new_score = tl.sum(query * key.to(tl.float32), 0) * SCALE
        new_value = value.to(tl.float32)
    largest, total, weight, new_weight = _attend(
        query, keys, values, old, new_score, new_value, SCALE, HEAD_TILE
    )
    result = (row.to(tl.int64) * HEADS + head) * CHUNKS + chunk
    column = tl.arange(0, _COLUMNS)
    first = column == 0
    tl.store(
        chunk_out + result * HEAD_SIZE + offset[:, None] + column[None, :],
        total,
        mask=head_mask[:, None] & first[None, :],
    )
    tl.store(chunk_stats + result * 2 + column, largest, mask=first)
    tl.store(chunk_stats + result * 2 + 1 + column, tl.sum(weight, 0) + new_weight, mask=first)


@triton.jit
def _attend(
    query,  # [HEAD_TILE]
    keys,  # [CHUNK, HEAD_TILE]
    values,  # [CHUNK, HEAD_TILE]
    old,  # [CHUNK], which of them are the context's
    new_score,
    new_value,  # [HEAD_TILE]
    SCALE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
):
    """Returns the largest score [COLUMNS], the weighted sum of values [HEAD_TILE, COLUMNS], the
    weights [CHUNK, COLUMNS] and the newest token's weight [COLUMNS]; the columns are alike.

    One query is repeated to the least number of columns that the matrix unit takes: its products
    cost nothing beside the loads.
    """
    queries = tl.broadcast_to(query.to(keys.dtype)[:, None], [HEAD_TILE, _COLUMNS])
    score = tl.dot(keys, queries, input_precision="ieee") * SCALE  # [CHUNK, COLUMNS]
    score = tl.where(old[:, None], score, float("-inf"))
    largest = tl.maximum(tl.max(score, 0), new_score)  # [COLUMNS]
    weight = tl.exp2(score - largest[None, :])
    new_weight = tl.exp2(new_score - largest)
    total = tl.dot(tl.trans(values), weight.to(values.dtype), input_precision="ieee")
    total += new_value[:, None] * new_weight[None, :]
    return largest, total, weight, new_weight


@triton.jit
def _newest_key_value(
    source,
    split_size,
    cosine,
    sine,
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Adds up key and value of a head's newest token, and rotates the key: [HEAD_TILE] each."""
    key = _rotated_sum(source + WIDTH, split_size, cosine, sine, HEAD_SIZE, HEAD_TILE, SPLITS)
    key = key.to(DTYPE)
    offset = tl.arange(0, HEAD_TILE)
    value = tl.zeros([HEAD_TILE], tl.float32)
    for split in tl.static_range(SPLITS):
        value += tl.load(
            source + split * split_size + 2 * WIDTH + offset, mask=offset < HEAD_SIZE, other=0.0
        ).to(tl.float32)
    return key, value.to(DTYPE)


@triton.jit
def _rotated_sum(
    source,
    split_size,
    cosine,
    sine,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Adds a head's partial sums in order and rotates the vector [HEAD_TILE]. `sine` has the sign
    of the even elements.
    """
    offset = tl.arange(0, HEAD_TILE)
    mask = offset < HEAD_SIZE
    value = tl.zeros([HEAD_TILE], tl.float32)
    partner = tl.zeros([HEAD_TILE], tl.float32)  # the other element of the pair
    for split in tl.static_range(SPLITS):
        value += tl.load(source + split * split_size + offset, mask=mask, other=0.0).to(tl.float32)
        partner += tl.load(source + split * split_size + (offset ^ 1), mask=mask, other=0.0).to(
            tl.float32
        )
    return value * cosine + partner * sine


@triton.jit
def _combine_kernel(
    chunk_out,  # [rows, HEADS, CHUNKS, HEAD_SIZE]
    chunk_stats,  # [rows, HEADS, CHUNKS, 2]
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
    offset = tl.arange(0, HEAD_TILE)
    head_mask = offset < HEAD_SIZE
    chunk = tl.arange(0, CHUNKS_TILE)
    chunk_mask = (chunk * CHUNK <= position) & (chunk < CHUNKS)
    result = (row.to(tl.int64) * HEADS + head) * CHUNKS + chunk
    if LAUNCH_PDL:
        gdc_wait()  # README, rule 3: the chunks come after it
    largest = tl.load(chunk_stats + result * 2, mask=chunk_mask, other=float("-inf"))
    total = tl.load(chunk_stats + result * 2 + 1, mask=chunk_mask, other=0.0)
    parts = tl.load(
        chunk_out + result[:, None] * HEAD_SIZE + offset[None, :],
        mask=chunk_mask[:, None] & head_mask[None, :],
        other=0.0,
    )
    weight = tl.where(chunk_mask, tl.exp2(largest - tl.max(largest, 0)), 0.0)
    # A row that is padding has no chunk at all: its result is zero, not 0 / 0.
    joined = tl.sum(parts * weight[:, None], 0) / tl.where(
        position >= 0, tl.sum(total * weight, 0), 1.0
    )
    at = (row.to(tl.int64) * HEADS + head) * HEAD_SIZE + offset
    tl.store(out + at, joined.to(out.dtype.element_ty), mask=head_mask)


def attention(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    chunk_out: Tensor,
    chunk_stats: Tensor,
    out: Tensor,
    tiles: AttentionTiles,
    *,
    launch_pdl: bool,
) -> None:
    """Writes the newest token's key and value, and attends from it to the row's whole context.
    Launches two kernels.

    Args:
        qkv: [splits, rows, 3 * heads * head_size], partial sums of the query-key-value product.
        rotary: float32 [positions, head_size / 2, 2], cosine and sine.
        key_pages, value_pages: [pages, heads, page_size, stride]
        page_table: int32 [rows, pages of a row]; only entries up to the row's position are read.
        positions: int32 [rows], the newest token's; below 0 for padding, which touches no page and
            comes out as zeros.
        chunk_out: float32 [rows, heads, chunks, head_size], scratch.
        chunk_stats: float32 [rows, heads, chunks, 2], scratch.
        out: [rows, heads * head_size]
    """
    launch_attention(
        _attention_kernel,
        qkv,
        rotary,
        key_pages,
        value_pages,
        page_table,
        positions,
        chunk_out,
        chunk_stats,
        out,
        tiles,
        launch_pdl=launch_pdl,
        LAUNCH_PDL=launch_pdl,
    )


def launch_attention(
    kernel: JITFunction,
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    chunk_out: Tensor,
    chunk_stats: Tensor,
    out: Tensor,
    tiles: AttentionTiles,
    *,
    launch_pdl: bool,
    **constants: bool,
) -> None:
    """Launches a kernel that attends within chunks, and `combine`. The tensors are those of
    `attention`.

    Args:
        constants: of the kernel alone.
    """
    splits, rows = qkv.shape[:2]
    _, heads, page_size, stride = key_pages.shape
    head_size, chunks = rotary.shape[1] * 2, chunk_out.shape[2]
    assert chunk_out.shape == (rows, heads, chunks, head_size)
    assert chunk_stats.shape == (rows, heads, chunks, 2)
    longest = min(rotary.shape[0] - 1, page_table.shape[1] * page_size)
    assert chunks * tiles.chunk >= longest, "the chunks do not cover the longest context"
    assert qkv.shape[2] == 3 * heads * head_size
    assert stride == head_stride(head_size, key_pages.element_size())
    kernel[(heads, chunks, rows)](
        qkv,
        rotary,
        key_pages,
        value_pages,
        page_table,
        positions,
        chunk_out,
        chunk_stats,
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
        **constants,
        num_warps=tiles.warps,
        maxnreg=tiles.registers,
        **pdl_option(launch_pdl),
    )
    combine(chunk_out, chunk_stats, positions, out, tiles, launch_pdl=launch_pdl)


def combine(
    chunk_out: Tensor,
    chunk_stats: Tensor,
    positions: Tensor,
    out: Tensor,
    tiles: AttentionTiles,
    *,
    launch_pdl: bool,
) -> None:
    """Joins the chunks' results: writes `out` of `attention` from its `chunk_out` and
    `chunk_stats`.
    """
    rows, heads, chunks, head_size = chunk_out.shape
    _combine_kernel[(heads, rows)](
        chunk_out,
        chunk_stats,
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
