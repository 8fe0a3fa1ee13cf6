"""The paged decode attention on Hopper for keys and values of a byte an element, which have a scale
each.

The two kernels are those of `kernels.hopper.attention` and `kernels.hopper.many_rows_attention`,
and give the same as each other. Two neighbouring elements are a pair: 16 bits, which shared memory
holds and the matrix unit's loads move. In registers a pair becomes two numbers in fp16, whatever
the model's dtype is, so that even and odd elements have products of their own. Fp16 has more digits
than bf16 for queries and weights, and the hardware converts to it. Values of a byte are exact
there. A query that fp16 does not hold, of more than 65,504, fails as one that is not finite does. A
score is multiplied by its key's scale, and a weight by its value's: no key and no value is
rounded again.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import (
    LARGEST_FP8,
    LARGEST_INT8,
    ROUNDING,
    AttentionTiles,
    head_stride,
    launch_attention,
)
from kernels.hopper.attention import COLUMNS, rotated, softmax_weights, sum_of_splits
from kernels.hopper.many_rows_attention import takes_pages
from kernels.hopper.quantized_products import unpacked
from kernels.quantization import FP8

_SLOTS = gl.constexpr(3)  # of the ring: chunks of keys, or of values
# Weights times scales are multiplied by about half of what makes a scale the largest element that
# it is of. So they are normal numbers of fp16 for any values up to its largest one.
_FACTOR_FP8, _FACTOR_INT8 = gl.constexpr(2.0**8), gl.constexpr(2.0**6)


@gluon.jit(do_not_specialize=["rows"])
def _scaled_attention_kernel(
    qkv,  # [SPLITS, rows, 3, HEADS, HEAD_SIZE] partial sums
    rotary,  # [positions, HEAD_SIZE / 2, 2] float32
    key_pages,  # [pages, HEADS, PAGE_SIZE, STRIDE], bytes
    value_pages,  # likewise
    page_table,  # [sequences, PAGES]
    positions,  # [sequences]
    limits,  # [sequences]
    chunk_out,  # [rows, HEADS, CHUNKS, HEAD_SIZE] float32, written
    # [rows, HEADS, CHUNKS, 2] float32, written: largest score (base 2), sum of weights
    chunk_stats,
    rows,
    key_scales,  # [pages, HEADS, PAGE_SIZE] float32
    value_scales,  # likewise
    FP8: gl.constexpr,  # else int8
    WINDOW: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    HEAD_TILE: gl.constexpr,
    STRIDE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    PAGES: gl.constexpr,
    CHUNK: gl.constexpr,
    CHUNKS: gl.constexpr,
    SPLITS: gl.constexpr,
):
    head, chunk, sequence = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    PAIRS: gl.constexpr = HEAD_TILE // 2
    token_layout: gl.constexpr = gl.BlockedLayout(
        [max(1, CHUNK // (32 * WARPS))], [32], [WARPS], [0]
    )
    vector_layout: gl.constexpr = gl.BlockedLayout(
        [1, HEAD_TILE // 32], [1, 32], [WARPS, 1], [1, 0]
    )
    product_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    # README, rule 2: positions, limits, page table, and every key and value of an earlier pass were
    # written before this one began.
    position = gl.load(positions + sequence)
    end = gl.minimum(position + WINDOW, gl.load(limits + sequence))
    first_token = chunk * CHUNK
    token = first_token + gl.arange(0, CHUNK, layout=token_layout)
    page = gl.load(
        page_table + sequence * PAGES + token // PAGE_SIZE,
        mask=token < PAGES * PAGE_SIZE,
        other=0,
    )
    if (position < 0) | (position >= end) | (first_token >= end):
        # README, rule 5: the sequence's first chunk waits, so this program need not
        return
    key_pages, value_pages = _as_pairs(key_pages), _as_pairs(value_pages)
    pairs_layout: gl.constexpr = _pairs_layout(HEAD_TILE)
    keys = gl.allocate_shared_memory(gl.int16, [CHUNK, 1, PAIRS], pairs_layout)
    values = gl.allocate_shared_memory(gl.int16, [CHUNK, 1, PAIRS], pairs_layout)
    copy_layout: gl.constexpr = _copy_layout(HEAD_TILE, STRIDE, WARPS)
    its_page = gl.convert_layout(page, gl.SliceLayout(1, copy_layout)).to(gl.int64)
    its_token = first_token + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, copy_layout))
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(0, copy_layout))[None, :]
    at = ((its_page * HEADS + head) * PAGE_SIZE + its_token % PAGE_SIZE)[:, None] * (STRIDE // 2)
    mask = (its_token < position)[:, None] & (pair < STRIDE // 2)
    if STRIDE % 16 == 0:
        # Past the first-level cache, which another step's token beside these may have filled.
        async_copy.async_copy_global_to_shared(
            _tile(keys), key_pages + at + pair, mask=mask, cache_modifier=".cg"
        )
        async_copy.async_copy_global_to_shared(
            _tile(values), value_pages + at + pair, mask=mask, cache_modifier=".cg"
        )
        async_copy.commit_group()
    else:  # asynchronous copies past that cache are of 16 bytes
        old_keys = gl.load(key_pages + at + pair, mask=mask, other=0, cache_modifier=".cg")
        old_values = gl.load(value_pages + at + pair, mask=mask, other=0, cache_modifier=".cg")
        _tile(keys).store(old_keys)
        _tile(values).store(old_values)
    scale_at = (page.to(gl.int64) * HEADS + head) * PAGE_SIZE + token % PAGE_SIZE
    old = token < position
    of_keys = gl.load(key_scales + scale_at, mask=old, other=0.0, cache_modifier=".cg")
    of_values = gl.load(value_scales + scale_at, mask=old, other=0.0, cache_modifier=".cg")
    WIDTH: gl.constexpr = HEADS * HEAD_SIZE
    GROUPS: gl.constexpr = (WINDOW + COLUMNS - 1) // COLUMNS
    queries = gl.allocate_shared_memory(
        gl.float16, [GROUPS * 2 * COLUMNS, 1, PAIRS], _query_layout()
    )
    offset = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(0, vector_layout))[None, :]
    new_end = gl.minimum(end, first_token + CHUNK)
    places: gl.tuple = ()
    for index in gl.static_range(WINDOW):
        new_token = position + index
        # Shared memory has the elements of each token in an order of its own.
        moved = offset ^ (_phase(new_token, HEAD_TILE) * 16)
        angles, there = rotary + new_token * HEAD_SIZE, new_token < end
        angle = gl.load(angles + offset, mask=(offset < HEAD_SIZE) & there, other=0.0)
        moved_angle = gl.load(angles + moved, mask=(moved < HEAD_SIZE) & there, other=0.0)
        new = (new_token >= first_token) & (new_token < new_end)
        page = gl.load(page_table + sequence * PAGES + new_token // PAGE_SIZE, mask=new, other=0)
        places = places + ((angle, moved_angle, page),)
    scales_layout: gl.constexpr = gl.SliceLayout(1, product_layout)
    of_keys = gl.convert_layout(of_keys, scales_layout)
    of_values = gl.convert_layout(of_values, scales_layout)
    scale_token = first_token + gl.arange(0, CHUNK, layout=scales_layout)
    gdc_wait()  # README, rule 3: qkv comes after it
    split_size = rows.to(gl.int64) * 3 * WIDTH
    vectors: gl.tuple = ()
    for index in gl.static_range(WINDOW):
        angle, moved_angle, _ = places[index]
        new_token = position + index
        new = (new_token >= first_token) & (new_token < new_end)
        moved = offset ^ (_phase(new_token, HEAD_TILE) * 16)
        mask, new_mask = offset < HEAD_SIZE, (moved < HEAD_SIZE) & new
        source = qkv + ((sequence * WINDOW + index).to(gl.int64) * 3 * HEADS + head) * HEAD_SIZE
        query = sum_of_splits(source + offset, mask, split_size, SPLITS)
        key = sum_of_splits(source + WIDTH + moved, new_mask, split_size, SPLITS)
        value = sum_of_splits(source + 2 * WIDTH + moved, new_mask, split_size, SPLITS)
        _store_query(queries, index // COLUMNS, index % COLUMNS, rotated(query, angle))
        vectors = vectors + ((rotated(key, moved_angle), value),)
    async_copy.wait_group(0)
    gl.thread_barrier()
    for index in gl.static_range(WINDOW):
        _, _, page = places[index]
        new_token = position + index
        if (new_token >= first_token) & (new_token < new_end):
            key, value = vectors[index]
            if WINDOW > 1:
                key, value = _harmless(key, value)
            key_pairs, key_scale = _rounded(key, FP8)
            value_pairs, value_scale = _rounded(value, FP8)
            moved = offset ^ (_phase(new_token, HEAD_TILE) * 16)
            place = (page.to(gl.int64) * HEADS + head) * PAGE_SIZE + new_token % PAGE_SIZE
            _store_new(key_pages, key_scales, place, key_pairs, key_scale, moved, STRIDE)
            _store_new(value_pages, value_scales, place, value_pairs, value_scale, moved, STRIDE)
            keys.index(new_token - first_token).store(key_pairs)
            values.index(new_token - first_token).store(value_pairs)
            of_keys = gl.where(scale_token == new_token, key_scale, of_keys)
            of_values = gl.where(scale_token == new_token, value_scale, of_values)
    gl.thread_barrier()
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, product_layout))
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(1, product_layout))[:, None]
    for group in gl.static_range(GROUPS):
        index = group * COLUMNS + column
        query_token = position + index
        scores = _scores(
            _query_tiles(queries, PAIRS),
            2 * group,
            _tile(keys),
            of_keys,
            first_token,
            query_token,
            product_layout,
            HEAD_SIZE,
            FP8,
        )
        largest, weight = softmax_weights(scores)
        even, odd = _weighted_values(weight, _tile(values), of_values, product_layout, FP8)
        attends = (query_token < end) & (query_token >= first_token)
        row = (sequence * WINDOW + index).to(gl.int64)
        result = (row * HEADS + head) * CHUNKS + chunk
        _store_pairs(
            chunk_out + result[None, :] * HEAD_SIZE, pair, even, odd, attends[None, :], HEAD_SIZE
        )
        gl.store(chunk_stats + result * 2, largest, mask=attends)
        gl.store(chunk_stats + result * 2 + 1, gl.sum(weight, 0), mask=attends)


@gluon.jit(do_not_specialize=["rows"])
def _many_rows_scaled_attention_kernel(
    qkv,  # [SPLITS, rows, 3, HEADS, HEAD_SIZE] partial sums
    rotary,  # [positions, HEAD_SIZE / 2, 2] float32
    key_pages,  # [pages, HEADS, PAGE_SIZE, STRIDE], bytes
    value_pages,  # likewise
    key_scales,  # [pages, HEADS, PAGE_SIZE] float32
    value_scales,  # likewise
    page_table,  # [rows, PAGES]
    positions,  # [rows]
    limits,  # [rows]
    out,  # [rows, HEADS, HEAD_SIZE]
    rows,
    FP8: gl.constexpr,  # else int8
    HEADS: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    HEAD_TILE: gl.constexpr,
    STRIDE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    PAGES: gl.constexpr,
    CHUNK: gl.constexpr,
    SPLITS: gl.constexpr,
):
    head, row = gl.program_id(0), gl.program_id(1)
    gdc_launch_dependents()
    dtype: gl.constexpr = out.dtype.element_ty
    PAIRS: gl.constexpr = HEAD_TILE // 2
    vector_layout: gl.constexpr = gl.BlockedLayout([1, HEAD_TILE // 32], [1, 32], [1, 1], [1, 0])
    product_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    column_layout: gl.constexpr = gl.SliceLayout(0, product_layout)
    # README, rule 2: positions, limits, page table, and every key and value of an earlier pass were
    # written before this one began.
    position = gl.load(positions + row)
    place = (row.to(gl.int64) * HEADS + head) * HEAD_SIZE
    offset = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(0, vector_layout))[None, :]
    if (position < 0) | (position >= gl.load(limits + row)):
        gdc_wait()  # README, rule 4: the kernel before may still read `out`
        gl.store(out + place + offset, gl.zeros_like(offset).to(dtype), mask=offset < HEAD_SIZE)
        return
    ring = gl.allocate_shared_memory(gl.int16, [_SLOTS, CHUNK, PAIRS], _pairs_layout(HEAD_TILE))
    tokens = ring._reinterpret(gl.int16, [_SLOTS * CHUNK, 1, PAIRS], ring.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scale_ring = gl.allocate_shared_memory(gl.float32, [_SLOTS, CHUNK], flat)
    queries = gl.allocate_shared_memory(gl.float16, [2 * COLUMNS, 1, PAIRS], _query_layout())
    keys = _as_pairs(key_pages) + head * (PAGE_SIZE * STRIDE // 2)
    values = _as_pairs(value_pages) + head * (PAGE_SIZE * STRIDE // 2)
    of_keys, of_values = key_scales + head * PAGE_SIZE, value_scales + head * PAGE_SIZE
    table = page_table + row * PAGES
    _copy(keys, of_keys, table, 0, position, ring, scale_ring, 0, HEADS, STRIDE, PAGE_SIZE)
    _copy(values, of_values, table, 0, position, ring, scale_ring, 1, HEADS, STRIDE, PAGE_SIZE)
    _copy(keys, of_keys, table, CHUNK, position, ring, scale_ring, 2, HEADS, STRIDE, PAGE_SIZE)
    # Shared memory has the elements of each token in an order of its own.
    moved = offset ^ (_phase(position, HEAD_TILE) * 16)
    angles = rotary + position * HEAD_SIZE
    mask, moved_mask = offset < HEAD_SIZE, moved < HEAD_SIZE
    angle = gl.load(angles + offset, mask=mask, other=0.0)
    moved_angle = gl.load(angles + moved, mask=moved_mask, other=0.0)
    new_page = gl.load(table + position // PAGE_SIZE)
    gdc_wait()  # README, rule 3: qkv comes after it
    WIDTH: gl.constexpr = HEADS * HEAD_SIZE
    split_size = rows.to(gl.int64) * 3 * WIDTH
    source = qkv + row.to(gl.int64) * 3 * WIDTH + head * HEAD_SIZE
    query = sum_of_splits(source + offset, mask, split_size, SPLITS)
    key = sum_of_splits(source + WIDTH + moved, moved_mask, split_size, SPLITS)
    value = sum_of_splits(source + 2 * WIDTH + moved, moved_mask, split_size, SPLITS)
    _store_query(queries, 0, position % COLUMNS, rotated(query, angle))
    key_pairs, key_scale = _rounded(rotated(key, moved_angle), FP8)
    value_pairs, value_scale = _rounded(value, FP8)
    new_at = (new_page.to(gl.int64) * HEADS + head) * PAGE_SIZE + position % PAGE_SIZE
    _store_new(_as_pairs(key_pages), key_scales, new_at, key_pairs, key_scale, moved, STRIDE)
    _store_new(
        _as_pairs(value_pages), value_scales, new_at, value_pairs, value_scale, moved, STRIDE
    )
    scales_layout: gl.constexpr = gl.SliceLayout(1, product_layout)
    places = gl.arange(0, CHUNK, layout=scales_layout)
    query_token = gl.arange(0, COLUMNS, layout=column_layout)
    query_token = position + ((query_token - position) & (COLUMNS - 1))
    largest = gl.full([COLUMNS], float("-inf"), gl.float32, column_layout)
    weights = gl.zeros([COLUMNS], gl.float32, column_layout)
    even = gl.zeros([PAIRS, COLUMNS], gl.float32, product_layout)
    odd = gl.zeros([PAIRS, COLUMNS], gl.float32, product_layout)
    slot = 0
    for first_token in range(0, position + 1, CHUNK):
        newest = position - first_token  # its place in the chunk, if it is in this one
        async_copy.wait_group(_SLOTS - 1)
        gl.thread_barrier()
        if newest < CHUNK:
            tokens.index(slot * CHUNK + newest).store(key_pairs)
            gl.thread_barrier()
        scales = gl.where(places == newest, key_scale, scale_ring.index(slot).load(scales_layout))
        scores = _scores(
            _query_tiles(queries, PAIRS),
            0,
            ring.index(slot),
            scales,
            first_token,
            query_token,
            product_layout,
            HEAD_SIZE,
            FP8,
        )
        gl.thread_barrier()
        _copy(
            values,
            of_values,
            table,
            first_token + CHUNK,
            position,
            ring,
            scale_ring,
            slot,
            HEADS,
            STRIDE,
            PAGE_SIZE,
        )
        slot = gl.where(slot == _SLOTS - 1, 0, slot + 1)
        its_largest, weight = softmax_weights(scores)
        async_copy.wait_group(_SLOTS - 1)
        gl.thread_barrier()
        if newest < CHUNK:
            tokens.index(slot * CHUNK + newest).store(value_pairs)
            gl.thread_barrier()
        scales = gl.where(places == newest, value_scale, scale_ring.index(slot).load(scales_layout))
        scales = gl.where(places <= newest, scales, 0.0)  # others may be anything
        its_even, its_odd = _weighted_values(weight, ring.index(slot), scales, product_layout, FP8)
        gl.thread_barrier()
        _copy(
            keys,
            of_keys,
            table,
            first_token + 2 * CHUNK,
            position,
            ring,
            scale_ring,
            slot,
            HEADS,
            STRIDE,
            PAGE_SIZE,
        )
        slot = gl.where(slot == _SLOTS - 1, 0, slot + 1)
        grown = gl.maximum(largest, its_largest)
        old, new = gl.exp2(largest - grown), gl.exp2(its_largest - grown)
        even = gl.fma(even, old[None, :], its_even * new[None, :])
        odd = gl.fma(odd, old[None, :], its_odd * new[None, :])
        weights = gl.fma(weights, old, gl.sum(weight, 0) * new)
        largest = grown
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(1, product_layout))[:, None]
    _store_pairs(
        out + place + query_token[None, :] * 0,
        pair,
        even / weights[None, :],
        odd / weights[None, :],
        (query_token == position)[None, :],
        HEAD_SIZE,
    )


@gluon.jit
def _as_pairs(pages):
    return pages.cast(gl.pointer_type(gl.int16), bitcast=True)


@gluon.constexpr_function
def _pairs_layout(head_tile: int) -> gl.SwizzledSharedLayout:
    """How tokens lie in shared memory: eight 16-byte columns of eight tokens meet all its banks."""
    per_phase = _tokens_of_a_phase(head_tile)
    return gl.SwizzledSharedLayout(8, per_phase, 8 // per_phase, [1, 0])


@gluon.constexpr_function
def _tokens_of_a_phase(head_tile: int) -> int:
    """Tokens that all banks of shared memory, of 128 bytes together, hold beside each other."""
    return max(1, 128 // head_tile)


@gluon.jit
def _phase(token, HEAD_TILE: gl.constexpr):
    """What the numbers of a token's 16-byte columns in shared memory are changed by."""
    PER_PHASE: gl.constexpr = _tokens_of_a_phase(HEAD_TILE)
    return token // PER_PHASE % (8 // PER_PHASE)


@gluon.constexpr_function
def _query_layout() -> gl.SwizzledSharedLayout:
    return gl.SwizzledSharedLayout(8, 1, 1, [1, 0])


@gluon.constexpr_function
def _copy_layout(head_tile: int, stride: int, warps: int) -> gl.BlockedLayout:
    """Of pairs: sixteen bytes of a thread, or eight where tokens begin at multiples of eight."""
    pairs = 8 if stride % 16 == 0 else 4
    across = head_tile // 2 // pairs
    return gl.BlockedLayout([1, pairs], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def _tile(tokens):
    """Tokens in shared memory [T, 1, PAIRS] as one tile [T, PAIRS]."""
    return tokens._reinterpret(tokens.dtype, [tokens.shape[0], tokens.shape[2]], tokens.layout)


@gluon.jit
def _query_tiles(queries, PAIRS: gl.constexpr):
    """Of each group of queries its even and its odd elements, as tiles [COLUMNS, PAIRS]."""
    TILES: gl.constexpr = queries.shape[0] // COLUMNS
    return queries._reinterpret(queries.dtype, [TILES, COLUMNS, PAIRS], queries.layout)


@gluon.jit
def _store_query(queries, group: gl.constexpr, column, query):
    """Writes a query [1, HEAD_TILE] to its column of a group."""
    PAIRS: gl.constexpr = query.shape[1] // 2
    even, odd = gl.split(gl.reshape(query.to(queries.dtype), [1, PAIRS, 2]))
    queries.index(2 * group * COLUMNS + column).store(even)
    queries.index((2 * group + 1) * COLUMNS + column).store(odd)


@gluon.jit
def _store_new(pages, scales, place, pairs, scale, offset, STRIDE: gl.constexpr):
    """Writes a new token's key or value to its page.

    Args:
        place: of the token, in all pages.
        pairs: [1, PAIRS]
        offset: [1, HEAD_TILE], which element each one is.
    """
    PAIRS: gl.constexpr = pairs.shape[1]
    even, _ = gl.split(gl.reshape(offset, [1, PAIRS, 2]))
    even = gl.convert_layout(even, pairs.type.layout)
    gl.store(pages + place * (STRIDE // 2) + even // 2, pairs, mask=even < STRIDE)
    gl.store(scales + place, scale)


@gluon.jit
def _rounded(vector, FP8: gl.constexpr):
    """Rounds a vector [1, HEAD_TILE] to e4m3 or int8, as `kernels.attention` does. Returns pairs
    [1, PAIRS] and the scale.
    """
    MOST: gl.constexpr = LARGEST_FP8 if FP8 else LARGEST_INT8
    largest = gl.max(gl.max(gl.abs(vector), 1), 0)
    broken = gl.sum(gl.sum(vector * 0.0, 1), 0)  # 0, or NaN
    scale = gl.where(largest > 0.0, largest / MOST, 1.0)
    within = gl.minimum(gl.maximum(vector / scale, -MOST), MOST)
    within = gl.where(broken == 0.0, within, 0.0)
    elements = _e4m3(within) if FP8 else ((within + ROUNDING) - ROUNDING).to(gl.int32) & 255
    PAIRS: gl.constexpr = vector.shape[1] // 2
    even, odd = gl.split(gl.reshape(elements, [1, PAIRS, 2]))
    return (even | (odd << 8)).to(gl.int16), scale + broken


@gluon.jit
def _e4m3(numbers):
    """Bytes of e4m3, as int32. Each number is converted alone: where Triton 3.6's ptxas sees two
    pairs that one register can hold, it stores another register's bits to the page.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .b16 byte; cvt.rn.satfinite.e4m3x2.f32 byte, 0f00000000, $1;"
        " cvt.u32.u16 $0, byte; }",
        "=r,f",
        [numbers],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _harmless(key, value):
    """Replaces a value that is not finite by zeros, and its key by NaN; see `kernels.attention`."""
    finite = gl.sum(gl.sum(value * 0.0, 1), 0) == 0.0  # or NaN
    return gl.where(finite, key, float("nan")), gl.where(finite, value, 0.0)


@gluon.jit
def _scores(
    queries,  # [2 * groups, COLUMNS, PAIRS], in shared memory
    place: gl.constexpr,  # of the group's even elements
    keys,  # [CHUNK, PAIRS], in shared memory
    scales,  # [CHUNK]
    first_token,
    query_token,  # [COLUMNS]
    layout: gl.constexpr,  # of the products
    HEAD_SIZE: gl.constexpr,
    FP8: gl.constexpr,
):
    """Returns the scores of a chunk's tokens [CHUNK, COLUMNS], of base 2; -inf after the query."""
    CHUNK: gl.constexpr = keys.shape[0]
    SCALE: gl.constexpr = HEAD_SIZE**-0.5 * 1.4426950408889634
    halves = unpacked(keys.load(gl.DotOperandLayout(0, layout, 2)), gl.float16, FP8)
    score = gl.zeros([CHUNK, COLUMNS], gl.float32, layout)
    for half in gl.static_range(2):
        its_queries = queries.index(place + half).permute((1, 0))
        score = mma_v2(halves[half], its_queries.load(gl.DotOperandLayout(1, layout, 2)), score)
    token = first_token + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    score = score * scales[:, None] * SCALE
    return gl.where(token[:, None] <= query_token[None, :], score, float("-inf"))


@gluon.jit
def _weighted_values(
    weight,  # [CHUNK, COLUMNS]
    values,  # [CHUNK, PAIRS], in shared memory
    scales,  # [CHUNK]
    layout: gl.constexpr,  # of the products
    FP8: gl.constexpr,
):
    """Returns the weighted sums of even and of odd elements [PAIRS, COLUMNS]."""
    PAIRS: gl.constexpr = values.shape[1]
    FACTOR: gl.constexpr = _FACTOR_FP8 if FP8 else _FACTOR_INT8
    weight = (weight * (scales * FACTOR)[:, None]).to(gl.float16)
    weight = gl.convert_layout(weight, gl.DotOperandLayout(1, layout, 2))
    pairs = values.permute((1, 0)).load(gl.DotOperandLayout(0, layout, 2))
    even, odd = unpacked(pairs, gl.float16, FP8)
    zeros = gl.zeros([PAIRS, COLUMNS], gl.float32, layout)
    even, odd = mma_v2(even, weight, zeros), mma_v2(odd, weight, zeros)
    return even * (1 / FACTOR), odd * (1 / FACTOR)


@gluon.jit
def _store_pairs(target, pair, even, odd, mask, HEAD_SIZE: gl.constexpr):
    """Writes even and odd elements of vectors beside each other.

    Args:
        target: [1, COLUMNS], pointers to the vectors.
        pair: [PAIRS, 1]
        even, odd: [PAIRS, COLUMNS]
    """
    dtype: gl.constexpr = target.dtype.element_ty
    mask = (pair < HEAD_SIZE // 2) & mask
    gl.store(target + pair * 2, even.to(dtype), mask=mask)
    gl.store(target + pair * 2 + 1, odd.to(dtype), mask=mask)


@gluon.jit
def _copy(
    pages,  # pairs of the first page, from the head's first key or value on
    scales,  # of the first page, from the head's first one on
    table,  # [PAGES], of the row
    first_token,
    position,
    ring,  # [SLOTS, CHUNK, PAIRS], in shared memory
    scale_ring,  # [SLOTS, CHUNK], in shared memory
    slot,
    HEADS: gl.constexpr,
    STRIDE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """Begins to copy the context's keys or values of a chunk, and their scales, to shared memory.
    Of what the context does not have, elements come as zeros, and scales as anything. A chunk that
    begins after the newest token is not copied.
    """
    CHUNK: gl.constexpr = ring.shape[1]
    PAIRS: gl.constexpr = ring.shape[2]
    PIECE: gl.constexpr = min(CHUNK, PAGE_SIZE)  # tokens that lie beside each other
    PIECES: gl.constexpr = CHUNK // PIECE
    layout: gl.constexpr = _copy_layout(2 * PAIRS, STRIDE, 1)
    scale_layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    targets = ring._reinterpret(ring.dtype, [ring.shape[0] * PIECES, PIECE, PAIRS], ring.layout)
    scale_targets = scale_ring._reinterpret(
        gl.float32, [ring.shape[0] * PIECES, PIECE], scale_ring.layout
    )
    token = gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
    pair = gl.arange(0, PAIRS, layout=gl.SliceLayout(0, layout))[None, :]
    place = gl.arange(0, PIECE, layout=scale_layout)
    if first_token <= position:
        numbers: gl.tuple = ()
        for piece in gl.static_range(PIECES):
            first = first_token + piece * PIECE
            page = gl.load(table + first // PAGE_SIZE, mask=first < position, other=0)
            numbers = numbers + (page.to(gl.int64) * (HEADS * PAGE_SIZE),)
        for piece in gl.static_range(PIECES):
            first = first_token + piece * PIECE
            source = numbers[piece] + first // PIECE % (PAGE_SIZE // PIECE) * PIECE
            # Past the first-level cache, which another step's token beside these may have filled.
            async_copy.async_copy_global_to_shared(
                scale_targets.index(slot * PIECES + piece),
                scales + source + place,
                cache_modifier=".cg",
            )
            target = targets.index(slot * PIECES + piece)
            source = pages + source * (STRIDE // 2) + (token[:, None] * (STRIDE // 2) + pair)
            mask = (first + token < position)[:, None] & (pair < STRIDE // 2)
            if STRIDE % 16 == 0:
                async_copy.async_copy_global_to_shared(
                    target, source, mask=mask, cache_modifier=".cg"
                )
            else:  # asynchronous copies past that cache are of 16 bytes
                target.store(gl.load(source, mask=mask, other=0, cache_modifier=".cg"))
    async_copy.commit_group()


def scaled_attention(
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
    kv_scales: Tensor,
    tiles: AttentionTiles,
) -> None:
    """Does the same as `kernels.attention.attention` for fp8 or int8 pages and 16-bit weights, on
    compute capability 9.0. A chunk has at least 16 tokens a warp.
    """
    launch_attention(
        _scaled_attention_kernel,
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
        launch_pdl=True,
        key_scales=kv_scales[0],
        value_scales=kv_scales[1],
        FP8=key_pages.dtype == FP8,
    )


def many_rows_scaled_attention(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    limits: Tensor,
    out: Tensor,
    kv_scales: Tensor,
    tiles: AttentionTiles,
) -> None:
    """Does the same as `scaled_attention` for one new token of each sequence, if `takes_pages`. It
    launches one kernel, which needs no scratch memory.
    """
    splits, rows = qkv.shape[:2]
    _, heads, page_size, stride = key_pages.shape
    head_size = rotary.shape[1] * 2
    assert takes_pages(page_size) and rows == len(positions) and tiles.warps == 1, tiles
    assert stride == head_stride(head_size, key_pages.element_size())
    _many_rows_scaled_attention_kernel[(heads, rows)](
        qkv,
        rotary,
        key_pages,
        value_pages,
        kv_scales[0],
        kv_scales[1],
        page_table,
        positions,
        limits,
        out,
        rows,
        FP8=key_pages.dtype == FP8,
        HEADS=heads,
        HEAD_SIZE=head_size,
        HEAD_TILE=triton.next_power_of_2(stride),
        STRIDE=stride,
        PAGE_SIZE=page_size,
        PAGES=page_table.shape[1],
        CHUNK=tiles.chunk,
        SPLITS=splits,
        num_warps=1,
        launch_pdl=True,
    )
