"""The torch references of paged attention, that of a CPU and that of a GPU, against plain attention
over each row's own context.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.rope import apply_rotary
from kernels import attention_reference
from kernels.attention import head_stride

HEADS, HEAD_SIZE, PAGE_SIZE, TOKENS = 3, 20, 4, 24
PAGES_PER_ROW = TOKENS // PAGE_SIZE
TABLES: dict[str, Callable[[int], Tensor]] = {
    "rows take turns": lambda rows: torch.arange(rows * PAGES_PER_ROW).view(-1, rows).T,
    "in any order": lambda rows: torch.randperm(
        rows * PAGES_PER_ROW, generator=torch.Generator().manual_seed(0)
    ).view(rows, -1),
    "far apart": lambda rows: 5 * torch.arange(rows * PAGES_PER_ROW).view(rows, -1),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "attend", [attention_reference._attend_in_place, attention_reference._attend_to_copies]
)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("positions", [[9, 9, 9], [0, 3, 4], [23, -1, 7], [-1, -1, -1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_plain_attention(
    attend: Callable[..., None], table: str, positions: list[int], dtype: torch.dtype
) -> None:
    """Fails if a page is taken for another, or anything but a row's own context is read (the rest
    is NaN) or written.
    """
    rows, stride = len(positions), head_stride(HEAD_SIZE, dtype.itemsize)
    page_table = TABLES[table](rows)
    pool = (int(page_table.max()) + 2, HEADS, PAGE_SIZE, stride)
    caches = [torch.full(pool, torch.nan, dtype=dtype) for _ in range(2)]
    contexts = [drawn(rows, TOKENS, HEADS, HEAD_SIZE, seed=seed).to(dtype) for seed in (1, 2)]
    angles = drawn(TOKENS, HEAD_SIZE // 2, seed=3)
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
    qkv = drawn(rows, 3, HEADS, HEAD_SIZE, seed=4)
    wanted, wanted_caches = torch.zeros(rows, HEADS, HEAD_SIZE), [cache.clone() for cache in caches]
    for row, position in enumerate(positions):
        if position < 0:
            continue
        query, key = (
            apply_rotary(qkv[row : row + 1, None, part], rotary[position : position + 1])[0, 0]
            for part in (0, 1)
        )
        for context, new in zip(contexts, (key, qkv[row, 2]), strict=True):
            context[row, position] = new.to(dtype)
        for token in range(position + 1):
            page, offset = page_table[row, token // PAGE_SIZE], token % PAGE_SIZE
            for cache, context in zip(wanted_caches, contexts, strict=True):
                cache[page, :, offset] = F.pad(context[row, token], (0, stride - HEAD_SIZE))
            if token < position:
                for cache, wanted_cache in zip(caches, wanted_caches, strict=True):
                    cache[page, :, offset] = wanted_cache[page, :, offset]
        # [heads, tokens, head_size]
        keys, values = (
            context[row, : position + 1].float().transpose(0, 1) for context in contexts
        )
        wanted[row] = F.scaled_dot_product_attention(query[:, None], keys, values)[:, 0]

    out = torch.full((rows, HEADS * HEAD_SIZE), torch.nan)
    attend(
        qkv.flatten(1),
        rotary,
        *caches,
        page_table.int(),
        torch.tensor(positions, dtype=torch.int32),
        out,
    )

    torch.testing.assert_close(out, wanted.flatten(1), atol=1e-5, rtol=1e-5)
    for cache, wanted_cache in zip(caches, wanted_caches, strict=True):
        torch.testing.assert_close(cache, wanted_cache, equal_nan=True)
