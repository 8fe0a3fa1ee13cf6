"""Paged decode attention: the new tokens of each sequence against all tokens before them.

A pass has the same number of new tokens for every sequence, its window: row r is token r % window
of sequence r // window. A sequence's keys and values are read once for all of them. The context is
cut into chunks, a program each, so that few rows fill a GPU; `combine` weighs the chunks' results.
The attention kernel also finishes the query-key-value product (adding its partial sums), turns
queries and keys by their rotary angles, and writes the new keys and values. A page holds [heads,
page_size, stride] elements, so that one head's part of it is contiguous; `stride` is the head size
rounded up to 16 bytes (`head_stride`), and what pads it is always written as zeros. Pages may be
fp8 (e4m3) or int8: a key or a value is then what the page holds times a scale of its own. A new
token is rounded to that before anyone attends to it, so it is to all passes what it is to its own.
Rotary positions as in LlamaGen: adjacent elements are a pair (Su et al. 2021, arXiv:2104.09864);
combining chunks as in flash-decoding (Dao et al. 2023).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

from kernels.linear import pdl_option
from kernels.lookahead import row_position
from kernels.quantization import FP8, LARGEST

HEAD_SIZES = (64, 80, 96, 100, 112, 128, 256)
_COLUMNS = tl.constexpr(8)  # least width of a matrix product; queries of one
LARGEST_FP8, LARGEST_INT8 = tl.constexpr(LARGEST[FP8]), tl.constexpr(LARGEST[torch.int8])
ROUNDING = tl.constexpr(1.5 * 2**23)  # float32 of this size has no fraction


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
    token starts at a multiple of 16 bytes, or of 8 where an element has one.
    """
    step = 16 // max(2, itemsize)
    return -(-head_size // step) * step


@triton.jit(do_not_specialize=["rows"])
def _attention_kernel(
    qkv,  # [SPLITS, rows, 3, HEADS, HEAD_SIZE] partial sums
    rotary,  # [positions, HEAD_SIZE / 2, 2] float32
    key_pages,  # [pages, HEADS, PAGE_SIZE, STRIDE]
    value_pages,  # likewise
    page_table,  # [sequences, PAGES]
    positions,  # [sequences]
    limits,  # [sequences]
    chunk_out,  # [rows, HEADS, CHUNKS, HEAD_SIZE] float32, written
    # [rows, HEADS, CHUNKS, 2] float32, written: largest score (base 2), sum of weights
    chunk_stats,
    rows,
    key_scales,  # None, or of fp8 and int8 pages [pages, HEADS, PAGE_SIZE] float32
    value_scales,  # likewise
    DTYPE: tl.constexpr,  # of products
    WINDOW: tl.constexpr,
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
    head, chunk, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if LAUNCH_PDL:
        gdc_launch_dependents()
    # README, rule 2: positions, limits, page table, and every key and value of an earlier pass were
    # written before this one began.
    position = tl.load(positions + sequence)
    end = tl.minimum(position + WINDOW, tl.load(limits + sequence))
    first_token = chunk * CHUNK
    token = first_token + tl.arange(0, CHUNK)
    page = tl.load(
        page_table + sequence * PAGES + token // PAGE_SIZE,
        mask=token < PAGES * PAGE_SIZE,
        other=0,
    ).to(tl.int64)
    if (position < 0) | (position >= end) | (first_token >= end):
        # README, rule 5: the sequence's first chunk waits, so this program need not
        return
    offset = tl.arange(0, HEAD_TILE)
    head_mask = offset < HEAD_SIZE
    stride_mask = offset < STRIDE
    at = (page * HEADS + head) * (PAGE_SIZE * STRIDE) + token % PAGE_SIZE * STRIDE
    mask = (token < position)[:, None] & stride_mask[None, :]
    # Past the first-level cache, which another step's token beside these may have filled.
    keys = tl.load(
        key_pages + at[:, None] + offset[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )
    values = tl.load(
        value_pages + at[:, None] + offset[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )
    keys, values = keys.to(DTYPE), values.to(DTYPE)
    if key_scales is not None:
        scale_at = (page * HEADS + head) * PAGE_SIZE + token % PAGE_SIZE
        old = token < position
        of_keys = tl.load(key_scales + scale_at, mask=old, other=0.0, cache_modifier=".cg")
        of_values = tl.load(value_scales + scale_at, mask=old, other=0.0, cache_modifier=".cg")
        keys, values = _times(keys, of_keys[:, None]), _times(values, of_values[:, None])
    if LAUNCH_PDL:
        gdc_wait()  # README, rule 3: qkv comes after it
    WIDTH: tl.constexpr = HEADS * HEAD_SIZE
    SCALE: tl.constexpr = HEAD_SIZE**-0.5 * 1.4426950408889634  # scores are in base 2
    split_size = rows.to(tl.int64) * 3 * WIDTH
    source = qkv + sequence.to(tl.int64) * WINDOW * 3 * WIDTH + head * HEAD_SIZE
    column = tl.arange(0, _COLUMNS)
    queries: tl.tuple = ()  # groups of as many as there are columns
    for first in tl.static_range(0, WINDOW, _COLUMNS):
        group = tl.zeros([HEAD_TILE, _COLUMNS], DTYPE)
        for index in tl.static_range(first, min(first + _COLUMNS, WINDOW)):
            if position + index < end:
                cosine, sine = _angle(rotary, position + index, HEAD_SIZE, HEAD_TILE)
                query = _rotated_sum(
                    source + index * 3 * WIDTH,
                    split_size,
                    cosine,
                    sine,
                    HEAD_SIZE,
                    HEAD_TILE,
                    SPLITS,
                )
                mine = (column == index - first)[None, :]
                group = tl.where(mine, query.to(DTYPE)[:, None], group)
        queries = queries + (group,)
    for index in tl.static_range(WINDOW):
        new_token = position + index
        if (new_token >= first_token) & (new_token < tl.minimum(end, first_token + CHUNK)):
            cosine, sine = _angle(rotary, new_token, HEAD_SIZE, HEAD_TILE)
            key, value = _new_key_value(
                source + index * 3 * WIDTH,
                split_size,
                cosine,
                sine,
                DTYPE if key_scales is None else tl.float32,  # rounded once
                WIDTH,
                HEAD_SIZE,
                HEAD_TILE,
                SPLITS,
            )
            if WINDOW > 1:
                key, value = _harmless(key, value)
            new_page = tl.load(page_table + sequence * PAGES + new_token // PAGE_SIZE).to(tl.int64)
            new_at = (new_page * HEADS + head) * PAGE_SIZE + new_token % PAGE_SIZE
            if key_scales is not None:
                key, key_scale = _rounded(key, key_pages.dtype.element_ty)
                value, value_scale = _rounded(value, key_pages.dtype.element_ty)
                tl.store(key_scales + new_at, key_scale)
                tl.store(value_scales + new_at, value_scale)
            tl.store(key_pages + new_at * STRIDE + offset, key, mask=stride_mask)
            tl.store(value_pages + new_at * STRIDE + offset, value, mask=stride_mask)
            if key_scales is not None:
                key, value = _times(key.to(DTYPE), key_scale), _times(value.to(DTYPE), value_scale)
            keys = tl.where((token == new_token)[:, None], key[None, :], keys)
            values = tl.where((token == new_token)[:, None], value[None, :], values)
    for group in tl.static_range(len(queries)):
        index = group * _COLUMNS + column
        largest, total, weights = _attend(
            queries[group], keys, values, token, position + index, SCALE
        )
        attends = (position + index < end) & (position + index >= first_token)
        row = (sequence * WINDOW + index).to(tl.int64)
        result = (row * HEADS + head) * CHUNKS + chunk
        tl.store(
            chunk_out + result[None, :] * HEAD_SIZE + offset[:, None],
            total,
            mask=head_mask[:, None] & attends[None, :],
        )
        tl.store(chunk_stats + result * 2, largest, mask=attends)
        tl.store(chunk_stats + result * 2 + 1, weights, mask=attends)


@triton.jit
def _angle(rotary, token, HEAD_SIZE: tl.constexpr, HEAD_TILE: tl.constexpr):
    """Returns cosine and sine of a token [HEAD_TILE]; the sine has the sign of the even
    elements.
    """
    offset = tl.arange(0, HEAD_TILE)
    angle = rotary + token * HEAD_SIZE + offset // 2 * 2
    cosine = tl.load(angle, mask=offset < HEAD_SIZE, other=0.0)
    sine = tl.load(angle + 1, mask=offset < HEAD_SIZE, other=0.0)
    return cosine, tl.where(offset % 2 == 0, -sine, sine)


@triton.jit
def _attend(
    queries,  # [HEAD_TILE, COLUMNS]
    keys,  # [CHUNK, HEAD_TILE]
    values,  # [CHUNK, HEAD_TILE]
    token,  # [CHUNK], of the keys
    query_token,  # [COLUMNS]
    SCALE: tl.constexpr,
):
    """Returns, for each column's query, the largest score [COLUMNS], the weighted sum of values
    [HEAD_TILE, COLUMNS] and the sum of weights [COLUMNS]. Columns depend on nothing of each other.
    """
    score = tl.dot(keys, queries, input_precision="ieee") * SCALE  # [CHUNK, COLUMNS]
    score = tl.where(token[:, None] <= query_token[None, :], score, float("-inf"))
    largest = tl.max(score, 0)
    weight = tl.exp2(score - largest[None, :])
    total = tl.dot(tl.trans(values), weight.to(values.dtype), input_precision="ieee")
    return largest, total, tl.sum(weight, 0)


@triton.jit
def _new_key_value(
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
    """Adds up key and value of a head's new token, and rotates the key: [HEAD_TILE] each."""
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
def _rounded(vector, DTYPE: tl.constexpr):
    """Rounds a vector [HEAD_TILE] to e4m3 or int8, and returns it with its scale, which makes the
    largest element the largest number. That of a vector which is not finite is NaN.
    """
    LARGEST: tl.constexpr = LARGEST_INT8 if tl.int8 == DTYPE else LARGEST_FP8
    largest = tl.max(tl.abs(vector), 0)
    broken = tl.sum(vector * 0.0, 0)  # 0, or NaN
    scale = tl.where(largest > 0.0, largest / LARGEST, 1.0)
    within = tl.minimum(tl.maximum(vector / scale, -LARGEST), LARGEST)
    within = tl.where(broken == 0.0, within, 0.0)
    if tl.int8 == DTYPE:
        within = (within + ROUNDING) - ROUNDING
    return within.to(DTYPE), scale + broken


@triton.jit
def _times(vectors, scales):
    """What numbers of pages stand for, in the products' dtype. The scales are broadcast."""
    return (vectors.to(tl.float32) * scales).to(vectors.dtype)


@triton.jit
def _harmless(key, value):
    """Replaces a value that is not finite by zeros, and its key by NaN. So it hurts every token
    that sees it, and no earlier one: their weight of it is 0, and 0 times NaN would be NaN.
    """
    finite = tl.sum(value.to(tl.float32) * 0.0, 0) == 0.0
    return tl.where(finite, key, float("nan")), tl.where(finite, value, 0.0)


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
    # Fused as written here, and not as a compiler likes: bits do not depend on the window.
    return tl.fma(value, cosine, partner * sine)


@triton.jit
def _combine_kernel(
    chunk_out,  # [rows, HEADS, CHUNKS, HEAD_SIZE]
    chunk_stats,  # [rows, HEADS, CHUNKS, 2]
    positions,  # [sequences]
    limits,  # [sequences]
    out,  # [rows, HEADS * HEAD_SIZE]
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(1)
    if LAUNCH_PDL:
        gdc_launch_dependents()
    position = row_position(positions, limits, row, WINDOW)
    offset = tl.arange(0, HEAD_TILE)
    head_mask = offset < HEAD_SIZE
    result = (row.to(tl.int64) * HEADS + head) * CHUNKS
    if LAUNCH_PDL:
        gdc_wait()  # README, rule 3: the chunks come after it
    parts: tl.tuple = ()  # all on their way before the first is used
    for chunk in tl.static_range(CHUNKS):
        at = result + chunk
        there = chunk * CHUNK <= position
        largest = tl.load(chunk_stats + at * 2, mask=there, other=float("-inf"))
        weights = tl.load(chunk_stats + at * 2 + 1, mask=there, other=0.0)
        part = tl.load(chunk_out + at * HEAD_SIZE + offset, mask=head_mask & there, other=0.0)
        parts = parts + ((largest, weights, part),)
    largest, weights, total = parts[0]
    for chunk in tl.static_range(1, CHUNKS):
        its_largest, its_weights, part = parts[chunk]
        # A chunk beyond the context changes nothing: its largest score is -inf, so its factor is 0
        # and the other 1.
        grown = tl.maximum(largest, its_largest)
        old, new = tl.exp2(largest - grown), tl.exp2(its_largest - grown)
        total = tl.fma(total, old, part * new)
        weights = tl.fma(weights, old, its_weights * new)
        largest = grown
    # A row that takes no part has no chunk at all: its result is zero, not 0 / 0.
    joined = tl.where(position >= 0, total / weights, 0.0)
    at = (row.to(tl.int64) * HEADS + head) * HEAD_SIZE + offset
    tl.store(out + at, joined.to(out.dtype.element_ty), mask=head_mask)


def attention(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    limits: Tensor,
    chunk_out: Tensor,
    chunk_stats: Tensor,
    out: Tensor,
    kv_scales: Tensor | None = None,
    *,
    tiles: AttentionTiles,
    launch_pdl: bool,
) -> None:
    """Writes the new tokens' keys and values, and attends from each of them to itself and all
    before it. Launches two kernels.

    Args:
        qkv: [splits, rows, 3 * heads * head_size], partial sums of the query-key-value product.
        rotary: float32 [positions, head_size / 2, 2], cosine and sine.
        key_pages, value_pages: [pages, heads, page_size, stride]
        page_table: int32 [sequences, pages of a sequence]; only entries up to the last new token
            are read.
        positions: int32 [sequences], of the first new token; below 0 for padding. There are
            rows / sequences new tokens, the window.
        limits: int32 [sequences]. A row at or beyond its sequence's limit, or of padding, touches
            no page and comes out as zeros.
        chunk_out: float32 [rows, heads, chunks, head_size], scratch.
        chunk_stats: float32 [rows, heads, chunks, 2], scratch.
        out: [rows, heads * head_size]
        kv_scales: float32 [2, pages, heads, page_size], of keys and values, where the pages are
            fp8 or int8. None: the pages are of the products' dtype.
    """
    assert (kv_scales is None) == (key_pages.dtype not in LARGEST)
    dtype = key_pages.dtype if kv_scales is None else out.dtype
    launch_attention(
        _attention_kernel,
        qkv,
        rotary,
        key_pages,
        value_pages,
        page_table,
        positions,
        limits,
        chunk_out,
        chunk_stats,
        out,
        tiles,
        launch_pdl=launch_pdl,
        LAUNCH_PDL=launch_pdl,
        key_scales=None if kv_scales is None else kv_scales[0],
        value_scales=None if kv_scales is None else kv_scales[1],
        DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
    )


def launch_attention(
    kernel: JITFunction,
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    limits: Tensor,
    chunk_out: Tensor,
    chunk_stats: Tensor,
    out: Tensor,
    tiles: AttentionTiles,
    *,
    launch_pdl: bool,
    **more: object,
) -> None:
    """Launches a kernel that attends within chunks, and `combine`. The tensors are those of
    `attention`.

    Args:
        more: arguments of the kernel alone.
    """
    splits, rows = qkv.shape[:2]
    _, heads, page_size, stride = key_pages.shape
    head_size, chunks = rotary.shape[1] * 2, chunk_out.shape[2]
    assert chunk_out.shape == (rows, heads, chunks, head_size)
    assert chunk_stats.shape == (rows, heads, chunks, 2)
    longest = min(rotary.shape[0] - 1, page_table.shape[1] * page_size)
    assert chunks * tiles.chunk >= longest, "the chunks do not cover the longest context"
    assert rows % len(positions) == 0
    assert qkv.shape[2] == 3 * heads * head_size
    assert stride == head_stride(head_size, key_pages.element_size())
    window = rows // len(positions)
    kernel[(heads, chunks, len(positions))](
        qkv,
        rotary,
        key_pages,
        value_pages,
        page_table,
        positions,
        limits,
        chunk_out,
        chunk_stats,
        rows,
        WINDOW=window,
        HEADS=heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=triton.next_power_of_2(stride),
        STRIDE=stride,
        PAGE_SIZE=page_size,
        PAGES=page_table.shape[1],
        CHUNK=tiles.chunk,
        CHUNKS=chunks,
        SPLITS=splits,
        **more,
        num_warps=tiles.warps,
        maxnreg=tiles.registers,
        **pdl_option(launch_pdl),
    )
    combine(chunk_out, chunk_stats, positions, limits, out, tiles, launch_pdl=launch_pdl)


def combine(
    chunk_out: Tensor,
    chunk_stats: Tensor,
    positions: Tensor,
    limits: Tensor,
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
        limits,
        out,
        WINDOW=rows // len(positions),
        HEADS=heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=triton.next_power_of_2(head_size),
        CHUNK=tiles.chunk,
        CHUNKS=chunks,
        LAUNCH_PDL=launch_pdl,
        num_warps=1,
        **pdl_option(launch_pdl),
    )
