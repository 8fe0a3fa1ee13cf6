"""The paged decode attention of `kernels.attention` in torch, for any head size and device."""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from kernels.lookahead import row_positions_reference
from kernels.quantization import FP8, LARGEST

_SCORES_MULTIPLE = 16


def combine_reference(
    chunk_out: Tensor,
    chunk_stats: Tensor,
    positions: Tensor,
    limits: Tensor,
    out: Tensor,
    chunk: int,
) -> None:
    """Does the same as `combine` in torch, for chunks of so many tokens. Chunks beyond a row's
    position may hold anything.
    """
    at = row_positions_reference(positions, limits, len(out) // len(positions))
    begins = torch.arange(chunk_out.shape[2], device=out.device) * chunk
    mask = (begins <= at[:, None])[:, None]  # [rows, 1, chunks]
    largest, total = chunk_stats.unbind(-1)  # [rows, heads, chunks]
    largest = largest.masked_fill(~mask, -torch.inf)
    weight = (largest - largest.amax(dim=-1, keepdim=True)).exp2().masked_fill(~mask, 0)
    # [rows, heads, head_size]
    joined = (chunk_out.masked_fill(~mask[..., None], 0) * weight[..., None]).sum(dim=2)
    weights = (total.masked_fill(~mask, 0) * weight).sum(dim=-1).masked_fill(at[:, None] < 0, 1)
    out.copy_((joined / weights[..., None]).flatten(1))


def attention_reference(
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
) -> None:
    """Does the same as `attention` in torch, for any head size. It does not use `chunk_out` and
    `chunk_stats`.
    """
    attend = _attend_in_place if out.device.type == "cpu" else _attend_to_copies
    key_scales, value_scales = (None, None) if kv_scales is None else kv_scales
    keys, values = Cache(key_pages, key_scales), Cache(value_pages, value_scales)
    attend(qkv.sum(dim=0), rotary, keys, values, page_table, positions, limits, out)


@dataclass(frozen=True)
class Cache:
    """The pages of the keys or of the values."""

    pages: Tensor  # [pages, heads, page_size, stride]
    scales: Tensor | None  # of fp8 and int8, float32 [pages, heads, page_size]

    def stored(self, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Vectors [rows, heads, head_size] as the pages hold them: [rows, heads, stride], and the
        scales [rows, heads]. A scale makes the largest element the largest number of the dtype.
        That of a vector which is not finite is NaN.
        """
        scales = None
        if self.scales is not None:
            largest = vectors.abs().amax(dim=-1)
            finite = vectors.isfinite().all(dim=-1)
            most = LARGEST[self.pages.dtype]
            scales = torch.where(largest > 0, largest / most, 1.0).masked_fill(~finite, torch.nan)
            vectors = (vectors / scales[..., None]).clamp(-most, most).nan_to_num()
            if self.pages.dtype == torch.int8:
                vectors = vectors.round()
        padding = self.pages.shape[3] - vectors.shape[2]
        return torch.nn.functional.pad(vectors, (0, padding)).to(self.pages.dtype), scales

    def read(self, pages: slice | Tensor, head_size: int) -> Tensor:
        """The vectors of some pages: float32 [pages, heads, page_size, head_size]."""
        vectors = self.pages[pages][..., :head_size].float()
        return vectors if self.scales is None else vectors.mul_(self.scales[pages][..., None])


def _attend_in_place(
    qkv: Tensor,
    rotary: Tensor,
    keys: Cache,
    values: Cache,
    page_table: Tensor,
    positions: Tensor,
    limits: Tensor,
    out: Tensor,
) -> None:
    """Attends on a CPU. To look at the positions costs nothing there, and to copy the context would
    cost more than all else, so no copy is made.
    """
    window, (_, heads, page_size, _) = len(out) // len(positions), keys.pages.shape
    head_size = rotary.shape[1] * 2
    at = row_positions_reference(positions, limits, window).long()
    out.zero_()
    rows = (at >= 0).nonzero()[:, 0]
    if len(rows) == 0:
        return
    vectors = qkv.view(len(out), 3 * heads, head_size)
    # [rows, heads, head_size]
    query, key = _rotated(vectors[:, : 2 * heads], rotary[at.clamp(min=0)]).chunk(2, dim=1)
    newest = page_table[rows // window, at[rows] // page_size].long()
    for cache, new in ((keys, key), (values, vectors[:, 2 * heads :])):
        vectors, scales = cache.stored(new[rows])
        cache.pages[newest, :, at[rows] % page_size] = vectors
        if cache.scales is not None and scales is not None:
            cache.scales[newest, :, at[rows] % page_size] = scales
    # One query of each sequence at a time: the products of several differ in their last bits.
    for index in range(window):
        rows = (at[index::window] >= 0).nonzero()[:, 0] * window + index
        if len(rows) == 0:
            break
        attn_out = _attn_out_in_place(
            query[rows], keys, values, page_table[rows // window].long(), at[rows]
        )
        out[rows] = attn_out.flatten(1).to(out.dtype)


def _harmless(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces each value that is not finite by zeros, and its key by NaN. So it hurts every token
    that sees it, and no earlier one: their weight of it is 0, and 0 times NaN would be NaN.

    Args:
        key, value: [rows, heads, head_size]
    """
    finite = value.isfinite().all(dim=-1, keepdim=True)
    return torch.where(finite, key, torch.nan), torch.where(finite, value, 0)


def _attn_out_in_place(
    query: Tensor, keys_of_all: Cache, values_of_all: Cache, table: Tensor, at: Tensor
) -> Tensor:
    """The attention's output for queries [rows, heads, head_size] of rows that are no padding:
    float32, of the queries' shape.

    Queries and weights are copied to the pages, instead of pages to the rows. The products of a
    page that no row has are not used.
    """
    rows, heads, head_size = query.shape
    page_size = keys_of_all.pages.shape[2]
    columns = int(at.max()) // page_size + 1
    # The softmax of a number of scores that is no multiple differs in its last bits from that of
    # the same scores and more that have the weight 0.
    multiple = _SCORES_MULTIPLE // gcd(_SCORES_MULTIPLE, page_size)
    columns = -(-columns // multiple) * multiple
    # of every page of a row: [n]
    row, column = (torch.arange(columns) <= (at // page_size)[:, None]).nonzero(as_tuple=True)
    extent, place = _extent(table[row, column])
    # [pages, heads, page_size, head_size]
    keys, values = (cache.read(extent, head_size) for cache in (keys_of_all, values_of_all))
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
    keys: Cache,
    values: Cache,
    page_table: Tensor,
    positions: Tensor,
    limits: Tensor,
    out: Tensor,
) -> None:
    """Attends without a look at the positions, for which the host would have to wait. Every page of
    every sequence is copied and masked.
    """
    rows, sequences, (_, heads, page_size, _) = len(out), len(positions), keys.pages.shape
    window, head_size = rows // sequences, rotary.shape[1] * 2
    at = row_positions_reference(positions, limits, window).long()
    in_use, at = at >= 0, at.clamp(min=0)
    query, key, value = qkv.view(rows, 3, heads, head_size).unbind(1)  # [rows, heads, head_size]
    query, key = _rotated(query, rotary[at]), _rotated(key, rotary[at])
    # in fp16 a number may become infinite; with a scale of its own, none does
    rounded = value if values.scales is not None else value.to(values.pages.dtype).float()
    key, value = _harmless(key, rounded)
    # Rows that take no part repeat the write of one that does: if they wrote elsewhere, two rows
    # could write one place differently.
    row = torch.arange(rows, device=out.device)
    source = torch.where(in_use, row, in_use.int().argmax())
    pages = page_table.long()[row // window, at // page_size][source]
    offsets = (at % page_size)[source]
    for cache, new in ((keys, key), (values, value)):
        vectors, scales = cache.stored(new)
        for cells, filled in ((cache.pages, vectors), (cache.scales, scales)):
            if cells is not None and filled is not None:
                old, bits = _bits(cells)[pages, :, offsets], _bits(filled)[source]
                _bits(cells)[pages, :, offsets] = torch.where(in_use.any(), bits, old)
    token = torch.arange(page_table.shape[1] * page_size, device=out.device)
    seen = (token <= at[:, None]) & in_use[:, None]  # [rows, tokens]
    seen = seen.view(sequences, window, -1)
    seen_by_any = seen.any(dim=1)  # [sequences, tokens]
    table = torch.where(seen_by_any[:, ::page_size], page_table, 0).flatten()
    whole_keys, whole_values = (
        _gathered(cache, table, sequences)[..., :head_size] for cache in (keys, values)
    )
    # [sequences, heads, window, tokens]
    query = query.view(sequences, window, heads, head_size).transpose(1, 2)
    score = query @ whole_keys.transpose(2, 3) * head_size**-0.5
    weight = score.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    weight = weight.masked_fill(~seen.any(dim=-1)[:, None, :, None], 0)
    # What is not the sequence's own may be anything, and 0 times that not 0.
    whole_values.masked_fill_(~seen_by_any[:, None, :, None], 0)
    out.copy_((weight @ whole_values).transpose(1, 2).reshape(rows, -1))


def _bits(pages: Tensor) -> Tensor:
    """Pages as what can be moved: torch indexes fp8 on some devices only."""
    return pages.view(torch.uint8) if pages.dtype == FP8 else pages


def _gathered(cache: Cache, table: Tensor, rows: int) -> Tensor:
    """The vectors of a table's pages [rows * pages of a row], as a copy: float32 [rows, heads,
    tokens, stride].
    """

    def by_head(pages: Tensor) -> Tensor:
        """Pages [pages, heads, page_size, n] as [rows, heads, tokens, n]."""
        chosen = pages.index_select(0, table).view(rows, -1, *pages.shape[1:])
        return chosen.transpose(1, 2).flatten(2, 3)

    # widened last: copies of what is stored take less memory
    vectors = by_head(_bits(cache.pages)).view(cache.pages.dtype).float()
    return vectors if cache.scales is None else vectors.mul_(by_head(cache.scales[..., None]))


def _rotated(vectors: Tensor, angles: Tensor) -> Tensor:
    """Rotates vectors [rows, heads, head_size] by angles [rows, head_size / 2, 2], in float32."""
    first, second = vectors.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles[:, None].unbind(-1)  # [rows, 1, head_size / 2]
    return torch.stack(
        [first * cosine - second * sine, second * cosine + first * sine], dim=-1
    ).flatten(-2)
