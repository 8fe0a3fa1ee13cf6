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

_COLUMNS = gl.constexpr(8)  # least width of a matrix product


@gluon.jit(do_not_specialize=["rows"])
def _hopper_attention_kernel(
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
    head, chunk, row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    token_layout: gl.constexpr = gl.BlockedLayout(
        [max(1, CHUNK // (32 * WARPS))], [32], [WARPS], [0]
    )
    head_layout: gl.constexpr = gl.BlockedLayout([HEAD_TILE // 32], [32], [WARPS], [0])
    product_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    dtype: gl.constexpr = key_pages.dtype.element_ty
    # README, rule 2: positions, page table, and every key and value but the newest token's were
    # written before this step began.
    position = gl.load(positions + row)
    first_token = chunk * CHUNK
    token = first_token + gl.arange(0, CHUNK, layout=token_layout)
    page = gl.load(
        page_table + row * PAGES + token // PAGE_SIZE, mask=token < PAGES * PAGE_SIZE, other=0
    )
    if first_token > position:
        # README, rule 5: the row's first chunk waits, so this program need not
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
    offset = gl.arange(0, HEAD_TILE, layout=head_layout)
    head_mask, stride_mask = offset < HEAD_SIZE, offset < STRIDE
    angle = rotary + position * HEAD_SIZE + offset // 2 * 2
    cosine = gl.load(angle, mask=head_mask, other=0.0)
    sine = gl.load(angle + 1, mask=head_mask, other=0.0)
    sine = gl.where(offset % 2 == 0, -sine, sine)
    newest = position < first_token + CHUNK  # the newest token falls into this chunk
    new_page = gl.load(page_table + row * PAGES + position // PAGE_SIZE).to(gl.int64)
    new_at = (new_page * HEADS + head) * (PAGE_SIZE * STRIDE) + position % PAGE_SIZE * STRIDE
    gdc_wait()  # README, rule 3: qkv comes after it
    WIDTH: gl.constexpr = HEADS * HEAD_SIZE
    SCALE: gl.constexpr = HEAD_SIZE**-0.5 * 1.4426950408889634  # scores are in base 2
    source = qkv + row.to(gl.int64) * 3 * WIDTH + head * HEAD_SIZE
    split_size = rows.to(gl.int64) * 3 * WIDTH
    query, key, value = _newest_token(
        source, split_size, offset, cosine, sine, newest, WIDTH, HEAD_SIZE, SPLITS
    )
    new_key, new_value = key.to(dtype), value.to(dtype)
    new_score = gl.to_tensor(float("-inf"))
    if newest:
        gl.store(key_pages + new_at + offset, new_key, mask=stride_mask)
        gl.store(value_pages + new_at + offset, new_value, mask=stride_mask)
        new_score = gl.sum(query * new_key.to(gl.float32), 0) * SCALE
    new_value = new_value.to(gl.float32)
    async_copy.wait_group(0)
    gl.thread_barrier()
    largest, total, weight, new_weight = _attend(
        query,
        keys,
        values,
        first_token,
        position,
        new_score,
        new_value,
        product_layout,
        SCALE,
    )
    result = (row.to(gl.int64) * HEADS + head) * CHUNKS + chunk
    offset = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(1, product_layout))[:, None]
    column = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, product_layout))
    first = column == 0
    gl.store(
        chunk_out + result * HEAD_SIZE + offset + column[None, :],
        total,
        mask=(offset < HEAD_SIZE) & first[None, :],
    )
    gl.store(chunk_stats + result * 2 + column, largest, mask=first)
    gl.store(chunk_stats + result * 2 + 1 + column, gl.sum(weight, 0) + new_weight, mask=first)


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
    """Begins to copy the context's keys and values of a chunk to shared memory. Returns
    both [CHUNK, HEAD_TILE]. What the context does not have comes as zeros.
    """
    CHUNK: gl.constexpr = page.shape[0]
    dtype: gl.constexpr = key_pages.dtype.element_ty
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_TILE, HEAD_TILE // 8], [gl.num_warps(), 1], [1, 0]
    )
    shared_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    page = gl.convert_layout(page, gl.SliceLayout(1, layout)).to(gl.int64)
    token = first_token + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
    offset = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    at = ((page * HEADS + head) * (PAGE_SIZE * STRIDE) + token % PAGE_SIZE * STRIDE)[
        :, None
    ] + offset
    mask = (token < position)[:, None] & (offset < STRIDE)
    keys = gl.allocate_shared_memory(dtype, [CHUNK, HEAD_TILE], shared_layout)
    values = gl.allocate_shared_memory(dtype, [CHUNK, HEAD_TILE], shared_layout)
    # Past the first-level cache, which another step's token beside these may have filled.
    async_copy.async_copy_global_to_shared(keys, key_pages + at, mask=mask, cache_modifier=".cg")
    async_copy.async_copy_global_to_shared(
        values, value_pages + at, mask=mask, cache_modifier=".cg"
    )
    async_copy.commit_group()
    return keys, values


@gluon.jit
def _attend(
    query,  # [HEAD_TILE]
    keys,  # [CHUNK, HEAD_TILE], in shared memory
    values,  # likewise
    first_token,
    position,
    new_score,
    new_value,  # [HEAD_TILE]
    layout: gl.constexpr,  # of the products
    SCALE: gl.constexpr,
):
    """Returns the largest score [COLUMNS], the weighted sum of values [HEAD_TILE, COLUMNS], the
    weights [CHUNK, COLUMNS] and the newest token's weight [COLUMNS]; the columns are alike.

    One query is repeated to the least number of columns that the matrix unit takes.
    """
    CHUNK: gl.constexpr = keys.shape[0]
    HEAD_TILE: gl.constexpr = keys.shape[1]
    wide_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    narrow_layout: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    dtype: gl.constexpr = keys.dtype
    query = gl.convert_layout(query.to(dtype), gl.SliceLayout(1, narrow_layout))
    queries, _ = gl.broadcast(query[:, None], gl.zeros([HEAD_TILE, _COLUMNS], dtype, narrow_layout))
    score = (
        mma_v2(keys.load(wide_layout), queries, gl.zeros([CHUNK, _COLUMNS], gl.float32, layout))
        * SCALE
    )
    old = first_token + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout)) < position
    score = gl.where(old[:, None], score, float("-inf"))
    largest = gl.maximum(gl.max(score, 0), new_score)
    weight = gl.exp2(score - largest[None, :])
    new_weight = gl.exp2(new_score - largest)
    weights = gl.convert_layout(weight.to(dtype), narrow_layout)
    total = gl.zeros([HEAD_TILE, _COLUMNS], gl.float32, layout)
    total = mma_v2(values.permute((1, 0)).load(wide_layout), weights, total)
    total += gl.convert_layout(new_value, gl.SliceLayout(1, layout))[:, None] * new_weight[None, :]
    return largest, total, weight, new_weight


@gluon.jit
def _newest_token(
    source,
    split_size,
    offset,
    cosine,
    sine,
    newest,
    WIDTH: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """Adds up a head's partial sums in order, rotates query and key, and returns query, key and
    value. For the rotation each element is loaded with the other one of its pair.

    `sine` bears the sign of the even elements. Unless `newest`, key and value are zeros: masked,
    not under a condition, so that their loads do not wait for the query's.
    """
    mask = offset < HEAD_SIZE
    wanted = mask & newest
    query, key, value = gl.zeros_like(cosine), gl.zeros_like(cosine), gl.zeros_like(cosine)
    other_query, other_key = gl.zeros_like(cosine), gl.zeros_like(cosine)
    for split in gl.static_range(SPLITS):
        part = source + split * split_size
        query += gl.load(part + offset, mask=mask, other=0.0).to(gl.float32)
        other_query += gl.load(part + (offset ^ 1), mask=mask, other=0.0).to(gl.float32)
        key += gl.load(part + WIDTH + offset, mask=wanted, other=0.0).to(gl.float32)
        other_key += gl.load(part + WIDTH + (offset ^ 1), mask=wanted, other=0.0).to(gl.float32)
        value += gl.load(part + 2 * WIDTH + offset, mask=wanted, other=0.0).to(gl.float32)
    return query * cosine + other_query * sine, key * cosine + other_key * sine, value


def hopper_attention(
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
        chunk_out,
        chunk_stats,
        out,
        tiles,
        launch_pdl=True,
    )
