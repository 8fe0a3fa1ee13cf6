"""The paged decode attention of many rows on Hopper: a program walks the whole context of a head.

Many rows fill the GPU with a program for each head and row, so the context need not be cut over
programs, and nothing is left to combine. A program holds a ring of chunks: while the keys of one
are used, its values and the next one's keys are on their way.

Every sum is that of `kernels.hopper.attention` and `kernels.attention.combine`, in their order. So
a row's result does not depend on which of the two ways computed it.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import AttentionTiles, head_stride
from kernels.hopper.attention import (
    COLUMNS,
    PHASES,
    chunk_scores,
    rotated,
    softmax_weights,
    sum_of_splits,
    weighted_values,
)

_SLOTS = gl.constexpr(3)  # of the ring: chunks of keys, or of values


@gluon.jit(do_not_specialize=["rows"])
def _many_rows_attention_kernel(
    qkv,  # [SPLITS, rows, 3, HEADS, HEAD_SIZE] partial sums
    rotary,  # [positions, HEAD_SIZE / 2, 2] float32
    key_pages,  # [pages, HEADS, PAGE_SIZE, STRIDE]
    value_pages,  # likewise
    page_table,  # [rows, PAGES]
    positions,  # [rows]
    limits,  # [rows]
    out,  # [rows, HEADS, HEAD_SIZE]
    rows,
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
    vector_layout: gl.constexpr = gl.BlockedLayout([1, HEAD_TILE // 32], [1, 32], [1, 1], [1, 0])
    product_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    column_layout: gl.constexpr = gl.SliceLayout(0, product_layout)
    shared_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, PHASES, [1, 0])
    # README, rule 2: positions, limits, page table, and every key and value of an earlier pass were
    # written before this one began.
    position = gl.load(positions + row)
    place = (row.to(gl.int64) * HEADS + head) * HEAD_SIZE
    column = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(0, vector_layout))[None, :]
    if (position < 0) | (position >= gl.load(limits + row)):
        gdc_wait()  # README, rule 4: the kernel before may still read `out`
        zeros = gl.zeros_like(column).to(out.dtype.element_ty)
        gl.store(out + place + column, zeros, mask=column < HEAD_SIZE)
        return
    dtype: gl.constexpr = key_pages.dtype.element_ty
    ring = gl.allocate_shared_memory(dtype, [_SLOTS, CHUNK, HEAD_TILE], shared_layout)
    tokens = ring._reinterpret(dtype, [_SLOTS * CHUNK, 1, HEAD_TILE], shared_layout)
    queries = gl.allocate_shared_memory(dtype, [COLUMNS, 1, HEAD_TILE], shared_layout)
    query_tile = queries._reinterpret(dtype, [COLUMNS, HEAD_TILE], shared_layout)
    keys = key_pages + head * (PAGE_SIZE * STRIDE)
    values = value_pages + head * (PAGE_SIZE * STRIDE)
    table = page_table + row * PAGES
    PAGE: gl.constexpr = HEADS * PAGE_SIZE * STRIDE
    _copy(keys, table, 0, position, ring, 0, PAGE, STRIDE, PAGE_SIZE)
    _copy(values, table, 0, position, ring, 1, PAGE, STRIDE, PAGE_SIZE)
    _copy(keys, table, CHUNK, position, ring, 2, PAGE, STRIDE, PAGE_SIZE)
    # Shared memory has the elements of each token in an order of its own.
    offset = column ^ position % PHASES * 8
    mask = offset < HEAD_SIZE
    angle = gl.load(rotary + position * HEAD_SIZE + offset, mask=mask, other=0.0)
    page = gl.load(table + position // PAGE_SIZE)
    gdc_wait()  # README, rule 3: qkv comes after it
    WIDTH: gl.constexpr = HEADS * HEAD_SIZE
    split_size = rows.to(gl.int64) * 3 * WIDTH
    source = qkv + row.to(gl.int64) * 3 * WIDTH + head * HEAD_SIZE + offset
    query = sum_of_splits(source, mask, split_size, SPLITS)
    new_key = sum_of_splits(source + WIDTH, mask, split_size, SPLITS)
    new_value = sum_of_splits(source + 2 * WIDTH, mask, split_size, SPLITS).to(dtype)
    new_key = rotated(new_key, angle).to(dtype)
    queries.index(position % COLUMNS).store(rotated(query, angle).to(dtype))
    new_at = page.to(gl.int64) * PAGE + position % PAGE_SIZE * STRIDE + offset
    gl.store(keys + new_at, new_key, mask=offset < STRIDE)
    gl.store(values + new_at, new_value, mask=offset < STRIDE)
    SCALE: gl.constexpr = HEAD_SIZE**-0.5 * 1.4426950408889634  # scores are in base 2
    query_token = gl.arange(0, COLUMNS, layout=column_layout)
    query_token = position + ((query_token - position) & (COLUMNS - 1))
    largest = gl.full([COLUMNS], float("-inf"), gl.float32, column_layout)
    weights = gl.zeros([COLUMNS], gl.float32, column_layout)
    total = gl.zeros([HEAD_TILE, COLUMNS], gl.float32, product_layout)
    slot = 0
    for first_token in range(0, position + 1, CHUNK):
        newest = position - first_token  # its place in the chunk, if it is in this one
        async_copy.wait_group(_SLOTS - 1)
        gl.thread_barrier()
        if newest < CHUNK:
            tokens.index(slot * CHUNK + newest).store(new_key)
            gl.thread_barrier()
        scores = chunk_scores(
            query_tile, ring.index(slot), first_token, query_token, product_layout, SCALE
        )
        gl.thread_barrier()
        _copy(values, table, first_token + CHUNK, position, ring, slot, PAGE, STRIDE, PAGE_SIZE)
        slot = gl.where(slot == _SLOTS - 1, 0, slot + 1)
        its_largest, weight = softmax_weights(scores)
        async_copy.wait_group(_SLOTS - 1)
        gl.thread_barrier()
        if newest < CHUNK:
            tokens.index(slot * CHUNK + newest).store(new_value)
            gl.thread_barrier()
        its_total = weighted_values(weight, ring.index(slot), product_layout)
        gl.thread_barrier()
        _copy(keys, table, first_token + 2 * CHUNK, position, ring, slot, PAGE, STRIDE, PAGE_SIZE)
        slot = gl.where(slot == _SLOTS - 1, 0, slot + 1)
        grown = gl.maximum(largest, its_largest)
        old, new = gl.exp2(largest - grown), gl.exp2(its_largest - grown)
        total = gl.fma(total, old[None, :], its_total * new[None, :])
        weights = gl.fma(weights, old, gl.sum(weight, 0) * new)
        largest = grown
    element = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(1, product_layout))[:, None]
    gl.store(
        out + place + element + query_token[None, :] * 0,
        (total / weights[None, :]).to(out.dtype.element_ty),
        mask=(element < HEAD_SIZE) & (query_token == position)[None, :],
    )


@gluon.jit
def _copy(
    pages,  # the first page, from the head's first key or value on
    table,  # [PAGES], of the row
    first_token,
    position,
    ring,  # [SLOTS, CHUNK, HEAD_TILE], in shared memory
    slot,
    PAGE: gl.constexpr,  # elements from one page to the next
    STRIDE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """Begins to copy the context's keys or values of a chunk to shared memory. What the context
    does not have comes as zeros. A chunk that begins after the newest token is not copied.
    """
    CHUNK: gl.constexpr = ring.shape[1]
    HEAD_TILE: gl.constexpr = ring.shape[2]
    PIECE: gl.constexpr = min(CHUNK, PAGE_SIZE)  # tokens that lie beside each other
    PIECES: gl.constexpr = CHUNK // PIECE
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_TILE, HEAD_TILE // 8], [1, 1], [1, 0]
    )
    targets = ring._reinterpret(ring.dtype, [ring.shape[0] * PIECES, PIECE, HEAD_TILE], ring.layout)
    token = gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
    offset = gl.arange(0, HEAD_TILE, layout=gl.SliceLayout(0, layout))[None, :]
    if first_token <= position:
        numbers: gl.tuple = ()
        for piece in gl.static_range(PIECES):
            first = first_token + piece * PIECE
            page = gl.load(table + first // PAGE_SIZE, mask=first < position, other=0)
            numbers = numbers + (page,)
        for piece in gl.static_range(PIECES):
            first = first_token + piece * PIECE
            source = pages + numbers[piece].to(gl.int64) * PAGE + first % PAGE_SIZE * STRIDE
            # Past the first-level cache, which another step's token beside these may have filled.
            async_copy.async_copy_global_to_shared(
                targets.index(slot * PIECES + piece),
                source + (token[:, None] * STRIDE + offset),
                mask=(first + token < position)[:, None] & (offset < STRIDE),
                cache_modifier=".cg",
            )
    async_copy.commit_group()


def takes_pages(page_size: int) -> bool:
    """Whether `many_rows_attention` can read pages of so many tokens."""
    return page_size >= 8 and page_size & (page_size - 1) == 0


def many_rows_attention(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    limits: Tensor,
    out: Tensor,
    tiles: AttentionTiles,
) -> None:
    """Does the same as `kernels.attention.attention` for one new token of each sequence and 16-bit
    keys and values, if `takes_pages`. It launches one kernel, which needs no scratch memory.
    """
    splits, rows = qkv.shape[:2]
    _, heads, page_size, stride = key_pages.shape
    head_size = rotary.shape[1] * 2
    assert takes_pages(page_size) and rows == len(positions) and tiles.warps == 1, tiles
    assert key_pages.element_size() == 2
    assert stride == head_stride(head_size, key_pages.element_size())
    _many_rows_attention_kernel[(heads, rows)](
        qkv,
        rotary,
        key_pages,
        value_pages,
        page_table,
        positions,
        limits,
        out,
        rows,
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
