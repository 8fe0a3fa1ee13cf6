"""Rotary position embedding over the two axes of the token grid, as LlamaGen defines it.

The first half of a head's frequency pairs turns with the row, the second half with the column; a
pair is two adjacent elements (2i, 2i + 1). The class token's entry is all zeros, cosine included,
so its query and key become zero: a trait of the published models that must be kept.
"""

import torch
from torch import Tensor


def rotary_table_2d(
    grid: int, head_size: int, base: float = 10000.0, cls_token_num: int = 1
) -> Tensor:
    """Cosine and sine of every position's angles.

    Returns:
        float32 [cls_token_num + grid * grid, head_size // 2, 2] on the CPU, whatever the default
        device: (cosine, sine) last.
    """
    half = head_size // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device="cpu")[: half // 2] / half
    frequencies = 1.0 / base**exponents  # [half // 2]
    angles = torch.outer(torch.arange(grid, device="cpu"), frequencies)  # [grid, half // 2]
    by_row = angles[:, None, :].expand(-1, grid, -1)
    by_column = angles[None, :, :].expand(grid, -1, -1)
    image = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # [grid * grid, half]
    table = torch.stack([image.cos(), image.sin()], dim=-1)
    return torch.cat([torch.zeros(cls_token_num, half, 2, device="cpu"), table])


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Turns each adjacent pair of elements by its position's angle, in float32.

    Args:
        x: [batch, tokens, heads, head_size]
        table: [tokens, head_size // 2, 2]

    Returns:
        A tensor of x's shape and dtype.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # [batch, tokens, heads, head_size // 2, 2]
    cosine, sine = table[None, :, None].unbind(-1)  # [1, tokens, 1, head_size // 2]
    first, second = pairs.unbind(-1)
    turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.flatten(-2).type_as(x)
