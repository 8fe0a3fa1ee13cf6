"""The paged decode attention of `kernels.attention` on Hopper, keys and values as asynchronous
copies.

It is cut the same way and gives the same result. A program asks for all keys and values of its
chunk at once, into shared memory, and holds no register for what has not come yet. Triton's own
loads would ask for the values only after the keys have come.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import AttentionTiles, launch_attention

COLUMNS = gl.constexpr(8)  # least width of a matrix product; queries of one
PHASES = gl.constexpr(8)  # tokens after which the order of bytes in shared memory repeats


@gluon.jit(do_not_specialize=["rows"])
def _hopper_attention_kernel(
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
    keys, values = _copy_pages(
        key_pages,
        value_pages,
        page,
        head,
        first_token,
        position,
        HEADS,
        HEAD_TILE,
        STRIDE,
        PAGE_SIZE,
    )
    WIDTH: gl.constexpr = HEADS * HEAD_SIZE
    SCALE: gl.constexpr = HEAD_SIZE**-0.5 * 1.4426950408889634  # scores are in base 2
    shared_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, PHASES, [1, 0])
    # Query i is in group i // COLUMNS. Its place there follows from its token's.
    GROUPS: gl.constexpr = (WINDOW + COLUMNS - 1) // COLUMNS
    queries = gl.allocate_shared_memory(keys.dtype, [GROUPS * COLUMNS, 1, HEAD_TILE], shared_layout)
    offsets = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(0, vector_layout))[None, :]
    new_end = gl.minimum(end, first_token + CHUNK)
    places: gl.tuple = ()
    for index in gl.static_range(WINDOW):
        # Shared memory has the elements of each token in an order of its own.
        new_token = position + index
        offset = offsets ^ (new_token % PHASES * 8)
        angle = gl.load(
            rotary + new_token * HEAD_SIZE + offset,
            mask=(offset < HEAD_SIZE) & (new_token < end),
            other=0.0,
        )
        new = (new_token >= first_token) & (new_token < new_end)
        page = gl.load(page_table + sequence * PAGES + new_token // PAGE_SIZE, mask=new, other=0)
        places = places + ((angle, page),)
    gdc_wait()  # README, rule 3: qkv comes after it
    split_size = rows.to(gl.int64) * 3 * WIDTH
    vectors: gl.tuple = ()
    for index in gl.static_range(WINDOW):
        angle, _ = places[index]
        new_token = position + index
        new = (new_token >= first_token) & (new_token < new_end)
        offset = offsets ^ (new_token % PHASES * 8)
        mask = offset < HEAD_SIZE
        source = qkv + ((sequence * WINDOW + index).to(gl.int64) * 3 * HEADS + head) * HEAD_SIZE
        query = sum_of_splits(source + offset, mask, split_size, SPLITS)
        key = sum_of_splits(source + WIDTH + offset, mask & new, split_size, SPLITS)
        value = sum_of_splits(source + 2 * WIDTH + offset, mask & new, split_size, SPLITS)
        place = index // COLUMNS * COLUMNS + new_token % COLUMNS
        queries.index(place).store(rotated(query, angle).to(keys.dtype))
        vectors = vectors + ((rotated(key, angle).to(keys.dtype), value.to(keys.dtype)),)
    async_copy.wait_group(0)
    gl.thread_barrier()
    for index in gl.static_range(WINDOW):
        _, page = places[index]
        new_token = position + index
        if (new_token >= first_token) & (new_token < new_end):
            new_key, new_value = vectors[index]
            if WINDOW > 1:
                new_key, new_value = _harmless(new_key, new_value)
            offset = offsets ^ (new_token % PHASES * 8)
            at = (page.to(gl.int64) * HEADS + head) * PAGE_SIZE + new_token % PAGE_SIZE
            gl.store(key_pages + at * STRIDE + offset, new_key, mask=offset < STRIDE)
            gl.store(value_pages + at * STRIDE + offset, new_value, mask=offset < STRIDE)
            keys.index(new_token - first_token).store(new_key)
            values.index(new_token - first_token).store(new_value)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, product_layout))
    offset = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(1, product_layout))[:, None]
    for group in gl.static_range(GROUPS):
        index = group * COLUMNS + ((column - position) & (COLUMNS - 1))
        query_token = position + index
        largest, total, weights = _attend(
            queries,
            group,
            _tile(keys),
            _tile(values),
            first_token,
            query_token,
            product_layout,
            SCALE,
        )
        attends = (query_token < end) & (query_token >= first_token)
        row = (sequence * WINDOW + index).to(gl.int64)
        result = (row * HEADS + head) * CHUNKS + chunk
        gl.store(
            chunk_out + result[None, :] * HEAD_SIZE + offset,
            total,
            mask=(offset < HEAD_SIZE) & attends[None, :],
        )
        gl.store(chunk_stats + result * 2, largest, mask=attends)
        gl.store(chunk_stats + result * 2 + 1, weights, mask=attends)


@gluon.jit
def _copy_pages(
    key_pages,
    value_pages,
    page,  # [CHUNK], of each token
    head,
    first_token,
    position,
    HEADS: gl.constexpr,
    HEAD_TILE: gl.constexpr,
    STRIDE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """Begins to copy the context's keys and values of a chunk to shared memory. Returns both
    [CHUNK, 1, HEAD_TILE]. What the context does not have comes as zeros.
    """
    CHUNK: gl.constexpr = page.shape[0]
    dtype: gl.constexpr = key_pages.dtype.element_ty
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_TILE, HEAD_TILE // 8], [gl.num_warps(), 1], [1, 0]
    )
    shared_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, PHASES, [1, 0])
    page = gl.convert_layout(page, gl.SliceLayout(1, layout)).to(gl.int64)
    token = first_token + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    offset = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    at = ((page * HEADS + head) * (PAGE_SIZE * STRIDE) + token % PAGE_SIZE * STRIDE)[
        :, None
    ] + offset
    mask = (token < position)[:, None] & (offset < STRIDE)
    keys = gl.allocate_shared_memory(dtype, [CHUNK, 1, HEAD_TILE], shared_layout)
    values = gl.allocate_shared_memory(dtype, [CHUNK, 1, HEAD_TILE], shared_layout)
    # Past the first-level cache, which another step's token beside these may have filled.
    async_copy.async_copy_global_to_shared(
        _tile(keys), key_pages + at, mask=mask, cache_modifier=".cg"
    )
    async_copy.async_copy_global_to_shared(
        _tile(values), value_pages + at, mask=mask, cache_modifier=".cg"
    )
    async_copy.commit_group()
    return keys, values


@gluon.jit
def _tile(tokens):
    """Tokens in shared memory [T, 1, HEAD_TILE] as one tile [T, HEAD_TILE]."""
    return tokens._reinterpret(tokens.dtype, [tokens.shape[0], tokens.shape[2]], tokens.layout)


@gluon.jit
def _attend(
    queries,  # [GROUPS * COLUMNS, 1, HEAD_TILE], in shared memory
    group: gl.constexpr,
    keys,  # [CHUNK, HEAD_TILE], in shared memory
    values,  # likewise
    first_token,
    query_token,  # [COLUMNS], of the group's queries
    layout: gl.constexpr,  # of the products
    SCALE: gl.constexpr,
):
    """Returns, for each query of a group, the largest score [COLUMNS], the weighted sum of values
    [HEAD_TILE, COLUMNS] and the sum of weights [COLUMNS]. Queries depend on nothing of each other.
    """
    GROUPS: gl.constexpr = queries.shape[0] // COLUMNS
    HEAD_TILE: gl.constexpr = keys.shape[1]
    groups = queries._reinterpret(queries.dtype, [GROUPS, COLUMNS, HEAD_TILE], queries.layout)
    scores = chunk_scores(groups.index(group), keys, first_token, query_token, layout, SCALE)
    largest, weight = softmax_weights(scores)
    return largest, weighted_values(weight, values, layout), gl.sum(weight, 0)


@gluon.jit
def chunk_scores(
    queries,  # [COLUMNS, HEAD_TILE], in shared memory
    keys,  # [CHUNK, HEAD_TILE], in shared memory
    first_token,
    query_token,  # [COLUMNS]
    layout: gl.constexpr,  # of the products
    SCALE: gl.constexpr,
):
    """Returns the scores of a chunk's tokens [CHUNK, COLUMNS], of base 2; -inf after the query."""
    CHUNK: gl.constexpr = keys.shape[0]
    score = mma_v2(
        keys.load(gl.DotOperandLayout(0, layout, 2)),
        queries.permute((1, 0)).load(gl.DotOperandLayout(1, layout, 2)),
        gl.zeros([CHUNK, COLUMNS], gl.float32, layout),
    )
    token = first_token + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    return gl.where(token[:, None] <= query_token[None, :], score * SCALE, float("-inf"))


@gluon.jit
def softmax_weights(scores):
    """Returns the largest score [COLUMNS], and the tokens' weights [CHUNK, COLUMNS]."""
    largest = gl.max(scores, 0)
    return largest, gl.exp2(scores - largest[None, :])


@gluon.jit
def weighted_values(
    weight,  # [CHUNK, COLUMNS]
    values,  # [CHUNK, HEAD_TILE], in shared memory
    layout: gl.constexpr,  # of the products
):
    """Returns the weighted sum of values [HEAD_TILE, COLUMNS]."""
    HEAD_TILE: gl.constexpr = values.shape[1]
    return mma_v2(
        values.permute((1, 0)).load(gl.DotOperandLayout(0, layout, 2)),
        gl.convert_layout(weight.to(values.dtype), gl.DotOperandLayout(1, layout, 2)),
        gl.zeros([HEAD_TILE, COLUMNS], gl.float32, layout),
    )


@gluon.jit
def sum_of_splits(source, mask, split_size, SPLITS: gl.constexpr):
    """Adds up partial sums in order: float32."""
    total = gl.load(source, mask=mask, other=0.0).to(gl.float32)
    for split in gl.static_range(1, SPLITS):
        total += gl.load(source + split * split_size, mask=mask, other=0.0).to(gl.float32)
    return total


@gluon.jit
def rotated(vector, angle):
    """Rotates each pair of a vector [1, HEAD_TILE]. `angle` is cosine and sine of each."""
    layout: gl.constexpr = vector.type.layout
    even, odd = gl.split(gl.reshape(vector, [vector.shape[1] // 2, 2]))
    cosine, sine = gl.split(gl.reshape(angle, [vector.shape[1] // 2, 2]))
    # Fused as written here, and not as a compiler likes: bits do not depend on the window.
    pairs = gl.join(gl.fma(even, cosine, -(odd * sine)), gl.fma(odd, cosine, even * sine))
    return gl.convert_layout(gl.reshape(pairs, vector.shape), layout, assert_trivial=True)


@gluon.jit
def _harmless(key, value):
    """Replaces a value that is not finite by zeros, and its key by NaN. So it hurts every token
    that sees it, and no earlier one: their weight of it is 0, and 0 times NaN would be NaN.
    """
    finite = gl.sum(value.to(gl.float32) * 0.0, 1)[:, None] == 0.0  # or NaN
    return gl.where(finite, key, float("nan")), gl.where(finite, value, 0.0)


def hopper_attention(
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
) -> None:
    """Does the same as `kernels.attention.attention` for 16-bit keys and values, on compute
    capability 9.0. A chunk has at least 16 tokens a warp.
    """
    assert key_pages.element_size() == 2
    launch_attention(
        _hopper_attention_kernel,
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
    )
