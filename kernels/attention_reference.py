"""The paged decode attention of `kernels.attention` in torch, for any head size and device."""

import torch
from torch import Tensor


def combine_reference(
    chunk_out: Tensor, chunk_stats: Tensor, positions: Tensor, out: Tensor, chunk: int
) -> None:
    """Does the same as `combine` in torch, for chunks of so many tokens. Chunks beyond a row's
    position may hold anything.
    """
    begins = torch.arange(chunk_out.shape[2], device=out.device) * chunk
    mask = (begins <= positions[:, None])[:, None]  # [rows, 1, chunks]
    largest, total = chunk_stats.unbind(-1)  # [rows, heads, chunks]
    largest = largest.masked_fill(~mask, -torch.inf)
    weight = (largest - largest.amax(dim=-1, keepdim=True)).exp2().masked_fill(~mask, 0)
    # [rows, heads, head_size]
    joined = (chunk_out.masked_fill(~mask[..., None], 0) * weight[..., None]).sum(dim=2)
    weights = (
        (total.masked_fill(~mask, 0) * weight).sum(dim=-1).masked_fill(positions[:, None] < 0, 1)
    )
    out.copy_((joined / weights[..., None]).flatten(1))


def attention_reference(
    qkv: Tensor,
    rotary: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    positions: Tensor,
    chunk_out: Tensor,
    chunk_stats: Tensor,
    out: Tensor,
) -> None:
    """Does the same as `attention` in torch, for any head size. It does not use `chunk_out` and
    `chunk_stats`.
    """
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
    """Attends on a CPU. To look at the positions costs nothing there, and to copy the context would
    cost more than all else, so no copy is made.
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
    attn_out = _attn_out_in_place(
        query, key_pages[..., :head_size], value_pages[..., :head_size], table, at
    )
    out[rows] = attn_out.flatten(1).to(out.dtype)


def _attn_out_in_place(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, at: Tensor
) -> Tensor:
    """The attention's output for queries [rows, heads, head_size] of rows that are no padding:
    float32, of the queries' shape.

    Queries and weights are copied to the pages, instead of pages to the rows. The products of a
    page that no row has are not used.
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
    # Behind the newest token its page may hold anything, and 0 times NaN or infinity is not 0.
    if not parts.sum().isfinite():
        unseen_of_page = unseen[row_of_page, :, column_of_page]  # [pages, 1, page_size]
        parts = (weights_of_page @ values.masked_fill(unseen_of_page[..., None], 0))[place, :, 0]
    return torch.zeros_like(query).index_add_(0, row, parts)


def _extent(pages: Tensor) -> tuple[slice | Tensor, Tensor]:
    """Which part of a cache to read for these pages [n], and where in it each of them is.

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
    """Attends without a look at the positions, for which the host would have to wait. Every page of
    every row is copied and masked.
    """
    rows = len(positions)
    _, heads, page_size, stride = key_pages.shape
    head_size = rotary.shape[1] * 2
    in_use = positions >= 0
    at = positions.clamp(min=0).long()
    query, key, value = qkv.view(rows, 3, heads, head_size).unbind(1)  # [rows, heads, head_size]
    angles = rotary[at]  # [rows, head_size / 2, 2]
    query = _rotated(query, angles)
    # Padding rows repeat the write of a row that is none: if they wrote elsewhere, two rows
    # could write one place differently.
    row = torch.arange(rows, device=out.device)
    source = torch.where(in_use, row, in_use.int().argmax())
    pages, offsets = page_table.long()[row, at // page_size][source], (at % page_size)[source]
    for cache, new in ((key_pages, _rotated(key, angles)), (value_pages, value.float())):
        filled = torch.nn.functional.pad(new, (0, stride - head_size)).to(cache.dtype)[source]
        cache[pages, :, offsets] = torch.where(in_use.any(), filled, cache[pages, :, offsets])
    token = torch.arange(page_table.shape[1] * page_size, device=out.device)
    seen = (token[None, :] <= positions[:, None]) & in_use[:, None]  # [rows, tokens]
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
    """Rotates vectors [rows, heads, head_size] by angles [rows, head_size / 2, 2], in float32."""
    first, second = vectors.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles[:, None].unbind(-1)  # [rows, 1, head_size / 2]
    return torch.stack(
        [first * cosine - second * sine, second * cosine + first * sine], dim=-1
    ).flatten(-2)
