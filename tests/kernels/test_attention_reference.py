"""The torch references of paged attention, that of a CPU and that of a GPU, against plain attention
over each row's own context.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.rope import apply_rotary
from kernels import attention_reference
from kernels.attention import head_stride
from kernels.attention_reference import Cache
from kernels.quantization import FP8

HEADS, HEAD_SIZE, PAGE_SIZE, TOKENS = 3, 20, 4, 24
PAGES_PER_ROW = TOKENS // PAGE_SIZE
TABLES: dict[str, Callable[[int], Tensor]] = {
    "rows take turns": lambda rows: torch.arange(rows * PAGES_PER_ROW).view(-1, rows).T,
    "in any order": lambda rows: torch.randperm(
        rows * PAGES_PER_ROW, generator=torch.Generator().manual_seed(0)
    ).view(rows, -1),
    "far apart": lambda rows: 5 * torch.arange(rows * PAGES_PER_ROW).view(rows, -1),
}


def held(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors [..., size] as pages hold them, and scales [...], which are 1 in wider dtypes."""
    largest = {FP8: 448, torch.int8: 127}.get(dtype)
    if largest is None:
        return vectors.to(dtype), torch.ones(vectors.shape[:-1])
    scales = vectors.abs().amax(dim=-1) / largest
    scaled = vectors / scales[..., None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "attend", [attention_reference._attend_in_place, attention_reference._attend_to_copies]
)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("positions", [[9, 9, 9], [0, 3, 4], [23, -1, 7], [-1, -1, -1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, FP8, torch.int8])
@pytest.mark.parametrize("window", [1, 3, 6])
def test_it_is_plain_attention(
    attend: Callable[..., None],
    table: str,
    positions: list[int],
    dtype: torch.dtype,
    window: int,
) -> None:
    """Fails if a page is taken for another, or anything but a row's own context is read (the rest
    is NaN) or written. The window of each sequence ends at another limit.
    """
    sequences, stride = len(positions), head_stride(HEAD_SIZE, dtype.itemsize)
    page_table = TABLES[table](sequences)
    pool = (int(page_table.max()) + 2, HEADS, PAGE_SIZE, stride)
    caches = [
        Cache(
            torch.full(pool, torch.nan if dtype != torch.int8 else 99).to(dtype),
            torch.full(pool[:3], torch.nan) if dtype.itemsize == 1 else None,
        )
        for _ in range(2)
    ]
    contexts = [
        held(drawn(sequences, TOKENS, HEADS, HEAD_SIZE, seed=seed), dtype) for seed in (1, 2)
    ]
    angles = drawn(TOKENS, HEAD_SIZE // 2, seed=3)
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
    qkv = drawn(sequences, window, 3, HEADS, HEAD_SIZE, seed=4)
    wanted = torch.zeros(sequences, window, HEADS, HEAD_SIZE)
    wanted_caches = copy.deepcopy(caches)
    limits = [min(TOKENS, at + window - index % window) for index, at in enumerate(positions)]
    for sequence, (position, limit) in enumerate(zip(positions, limits, strict=True)):
        if position < 0:
            continue
        for index, token in enumerate(range(position, limit)):
            query, key = (
                apply_rotary(qkv[sequence : sequence + 1, index, None, part], rotary[token][None])
                for part in (0, 1)
            )
            new = (key[0, 0], qkv[sequence, index, 2])
            for context, vector in zip(contexts, new, strict=True):
                context[0][sequence, token], context[1][sequence, token] = held(vector, dtype)
            # [heads, tokens, head_size]
            keys, values = (
                (vectors.float() * scales[..., None])[sequence, : token + 1].transpose(0, 1)
                for vectors, scales in contexts
            )
            wanted[sequence, index] = F.scaled_dot_product_attention(
                query[0, 0][:, None], keys, values
            )[:, 0]
        for token in range(limit):
            page, offset = page_table[sequence, token // PAGE_SIZE], token % PAGE_SIZE
            for cache, wanted_cache, context in zip(caches, wanted_caches, contexts, strict=True):
                vectors, scales = (part[sequence, token] for part in context)
                filled = F.pad(vectors.float(), (0, stride - HEAD_SIZE)).to(dtype)
                for each in (cache, wanted_cache) if token < position else (wanted_cache,):
                    each.pages[page, :, offset] = filled
                    if each.scales is not None:
                        each.scales[page, :, offset] = scales

    out = torch.full((sequences * window, HEADS * HEAD_SIZE), torch.nan)
    attend(
        qkv.view(sequences * window, -1),
        rotary,
        *caches,
        page_table.int(),
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor(limits, dtype=torch.int32),
        out,
    )

    torch.testing.assert_close(out, wanted.view(len(out), -1), atol=1e-5, rtol=1e-5)
    for cache, wanted_cache in zip(caches, wanted_caches, strict=True):
        torch.testing.assert_close(cache.pages.float(), wanted_cache.pages.float(), equal_nan=True)
        torch.testing.assert_close(cache.scales, wanted_cache.scales, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, FP8, torch.int8])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 8, 16])
def test_a_token_of_a_window_is_as_alone(window: int, dtype: torch.dtype) -> None:
    """Fails if a token's bits depend on the window, or on a later token that is not finite."""
    sequences, position = 3, 5
    page_table = TABLES["in any order"](sequences).int()
    pool = (sequences * PAGES_PER_ROW, HEADS, PAGE_SIZE, head_stride(HEAD_SIZE, dtype.itemsize))
    caches = [
        Cache(
            drawn(*pool, seed=seed).mul(9).to(dtype),
            drawn(*pool[:3], seed=seed + 7).exp() if dtype.itemsize == 1 else None,
        )
        for seed in (1, 2)
    ]
    angles = drawn(TOKENS, HEAD_SIZE // 2, seed=3)
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
    qkv = drawn(sequences, window, 3 * HEADS * HEAD_SIZE, seed=4)
    if window > 1:
        qkv[:, -1] = torch.tensor([torch.inf, -torch.inf, torch.nan])[:, None]
    at, limits = (torch.full((sequences,), value).int() for value in (position, position + window))

    def attended(first: int, count: int) -> torch.Tensor:
        rows = qkv[:, first : first + count].reshape(sequences * count, -1)
        out = torch.empty(sequences * count, HEADS * HEAD_SIZE)
        attention_reference._attend_in_place(
            rows, rotary, caches[0], caches[1], page_table, at + first, limits, out
        )
        return out.view(sequences, count, -1)

    together = attended(0, window)
    for index in range(max(1, window - 1)):
        assert torch.equal(together[:, index], attended(index, 1)[:, 0]), index
    assert together[:, -1].isfinite().any() == (window == 1)
