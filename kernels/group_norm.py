"""Group norm with SiLU for images whose channels lie together (channels last), in two memory-bound
passes.

`add_with_statistics` makes the tensor that is to be normalised (convolution + its bias + shortcut)
and measures it on the way; `normalize` applies norm and SiLU. torch's own group norm first copies
channels-last images into the other layout. Statistics are float32 means and squared deviations of
small chunks, merged by Chan's formula around a pivot near the mean, so that a large mean does not
swallow the variance. The order of every sum depends on the shape alone. Each function stands beside
a torch reference of the same signature, which any device runs.

Images are [images, height, width, channels] here, contiguous. Statistics are float32 [2, images,
chunks, groups]: the mean of each group, and its sum of squared deviations, by chunks of positions.
The last chunk may be shorter than the others.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_TILE_ELEMENTS = 16384  # of one program: 64 a thread, in registers for both passes over them
_WARPS = 8
_GROUPS_AT_ONCE = 8  # of one program of the merging kernel
_CHUNKS_AT_ONCE = 128


def supports(channels: int, groups: int) -> bool:
    """Whether the Triton kernels take this shape: powers of two, at least 8 groups."""
    power_of_two = channels & (channels - 1) == 0 and groups & (groups - 1) == 0
    return power_of_two and _GROUPS_AT_ONCE <= groups <= channels <= _TILE_ELEMENTS


def chunk_positions_for(channels: int, positions: int) -> int:
    """Positions of a chunk: a power of two, 16,384 elements or fewer."""
    return min(_TILE_ELEMENTS // channels, triton.next_power_of_2(positions))


def add_with_statistics_reference(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    out_dtype: torch.dtype | None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """See `add_with_statistics`."""
    total = (interleave(x) if interleaved else x).float() + bias
    if residual is not None:
        total = total + residual.float()
    out = None if out_dtype is None else total.to(out_dtype)
    images, height, width, channels = total.shape
    positions = height * width
    values = (total if out is None else out.float()).reshape(
        images, 1, positions, groups, channels // groups
    )
    means = values.mean(dim=(2, 4))
    squares = (values - means[:, :, None, :, None]).square().sum(dim=(2, 4))
    return out, torch.stack([means, squares])


def normalize_reference(
    x: Tensor,
    statistics: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    silu: bool = True,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See `normalize`."""
    means, squares = statistics  # [images, chunks, groups]
    _, height, width, channels = x.shape
    positions, (chunks, groups) = height * width, means.shape[1:]
    chunk_positions = positions if chunks == 1 else chunk_positions_for(channels, positions)
    starts = torch.arange(chunks, device=x.device) * chunk_positions
    lengths = (positions - starts).clamp(max=chunk_positions).float()[:, None]  # [chunks, 1]
    group_size = channels // groups
    mean = (means * lengths).sum(dim=1, keepdim=True) / positions  # [images, 1, groups]
    total = (squares + group_size * lengths * (means - mean).square()).sum(dim=1)
    deviation = torch.rsqrt(total / (positions * group_size) + eps)  # [images, groups]
    scale = deviation.repeat_interleave(group_size, dim=1) * norm_weight  # [images, channels]
    shift = norm_bias - mean[:, 0].repeat_interleave(group_size, dim=1) * scale
    if bias is not None:
        shift = shift + bias * scale
    y = x.float() * scale[:, None, None] + shift[:, None, None]
    return (F.silu(y) if silu else y).to(out_dtype)


def interleave(x: Tensor) -> Tensor:
    """Four phases side by side -> an image of twice the size.

    Args:
        x: [images, height + 1, width + 1, 4 * channels]: the channels of phase (0, 0), (0, 1), (1,
            0) and (1, 1).

    Returns:
        [images, 2 * height, 2 * width, channels]: pixel (2 i + a, 2 j + b) is phase (a, b) at (i +
        a, j + b).
    """
    images, height, width, channels = x.shape[0], x.shape[1] - 1, x.shape[2] - 1, x.shape[3] // 4
    out = x.new_empty(images, height, 2, width, 2, channels)
    for a in (0, 1):
        for b in (0, 1):
            phase = 2 * a + b
            out[:, :, a, :, b] = x[
                :, a : a + height, b : b + width, phase * channels : (phase + 1) * channels
            ]
    return out.view(images, 2 * height, 2 * width, channels)


def add_with_statistics(
    x: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    groups: int,
    out_dtype: torch.dtype | None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """x + bias (+ residual), and what a group norm of it needs to know.

    Args:
        x: [images, height, width, channels]; with `interleaved`, the four phases that `interleave`
            takes.
        bias: float32 [channels]
        residual: of the sum's shape and any dtype, or None.
        groups: of the norm.
        out_dtype: of the sum, which is measured after rounding; None: it is measured (unrounded)
            but not stored.

    Returns:
        The sum [images, height, width, channels] or None, and its statistics.
    """
    images, height, width, channels = x.shape
    if interleaved:
        height, width, channels = 2 * (height - 1), 2 * (width - 1), channels // 4
    positions = height * width
    assert supports(channels, groups)
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    chunk_positions = chunk_positions_for(channels, positions)
    chunks = triton.cdiv(positions, chunk_positions)
    statistics = x.new_empty(2, images, chunks, groups, dtype=torch.float32)
    out = (
        None if out_dtype is None else x.new_empty(images, height, width, channels, dtype=out_dtype)
    )
    _add_with_statistics_kernel[(chunks, images)](
        x,
        bias,
        x if residual is None else residual,
        x if out is None else out,
        *statistics,
        positions,
        width,
        CHANNELS=channels,
        GROUPS=groups,
        CHUNK=chunk_positions,
        HAS_RESIDUAL=residual is not None,
        STORES=out is not None,
        INTERLEAVED=interleaved,
        num_warps=_WARPS,
    )
    return out, statistics


def normalize(
    x: Tensor,
    statistics: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    silu: bool = True,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """SiLU(group norm of x), from statistics that `add_with_statistics` took.

    Args:
        x: [images, height, width, channels]
        statistics: of x, or of x + bias.
        norm_weight: float32 [channels], the norm's weight.
        norm_bias: float32 [channels], the norm's bias.
        eps: added to the variance.
        bias: float32 [channels], added to x first: the bias of a convolution whose sum was not
            stored.
        silu: False leaves it at the norm.
        out_dtype: of the result, which has x's shape.
    """
    images, height, width, channels = x.shape
    positions, (_, _, chunks, groups) = height * width, statistics.shape
    chunk_positions = chunk_positions_for(channels, positions)
    assert chunks == triton.cdiv(positions, chunk_positions)
    assert x.is_contiguous()
    scale = x.new_empty(images, channels, dtype=torch.float32)
    shift = torch.empty_like(scale)
    _merge_statistics_kernel[(groups // _GROUPS_AT_ONCE, images)](
        *statistics,
        norm_weight,
        norm_bias,
        norm_weight if bias is None else bias,
        scale,
        shift,
        chunks,
        positions,
        chunk_positions,
        eps,
        GROUPS=groups,
        GROUPS_AT_ONCE=_GROUPS_AT_ONCE,
        GROUP_SIZE=channels // groups,
        CHUNKS_AT_ONCE=_CHUNKS_AT_ONCE,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
    out = torch.empty_like(x, dtype=out_dtype)
    tile_positions = max(chunk_positions // 2, 1)
    _apply_kernel[(triton.cdiv(positions, tile_positions), images)](
        x,
        scale,
        shift,
        out,
        positions,
        CHANNELS=channels,
        TILE=tile_positions,
        SILU=silu,
        num_warps=_WARPS,
    )
    return out


@triton.jit
def _add_with_statistics_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    means_ptr,
    squares_ptr,
    positions,
    width,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STORES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    chunk, image = tl.program_id(0), tl.program_id(1)
    group_size: tl.constexpr = CHANNELS // GROUPS
    channel = tl.arange(0, CHANNELS)
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = (position < positions)[:, None]
    # 64 bits: sixteen images of 1024 x 1024 with 128 channels have 2**31 elements.
    # [CHUNK, CHANNELS]
    place = (image.to(tl.int64) * positions + position)[:, None] * CHANNELS + channel[None, :]
    source = place
    if INTERLEAVED:
        row, column = position // width, position % width
        phase = (row % 2) * 2 + column % 2
        low_row, low_column = row // 2 + row % 2, column // 2 + column % 2
        low_width = width // 2 + 1
        low_positions = (positions // width // 2 + 1) * low_width
        low = image.to(tl.int64) * low_positions + low_row * low_width + low_column
        source = (low * 4 + phase)[:, None] * CHANNELS + channel[None, :]
    total = (
        tl.load(x_ptr + source, mask=mask, other=0.0).to(tl.float32)
        + tl.load(bias_ptr + channel)[None, :]
    )
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if STORES:
        rounded = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, rounded, mask=mask)
        total = rounded.to(tl.float32)

    count = tl.minimum(positions - chunk * CHUNK, CHUNK).to(tl.float32)
    channel_means = tl.sum(tl.where(mask, total, 0.0), axis=0) / count  # [CHANNELS]
    deviations = tl.where(mask, total - channel_means[None, :], 0.0)
    channel_squares = tl.sum(deviations * deviations, axis=0)  # [CHANNELS]
    by_group = tl.reshape(channel_means, (GROUPS, group_size))
    group_means = tl.sum(by_group, axis=1) / group_size  # [GROUPS]
    between = by_group - group_means[:, None]
    within = tl.reshape(channel_squares, (GROUPS, group_size))
    group_squares = tl.sum(within + count * between * between, axis=1)
    slot = (image * tl.num_programs(0) + chunk) * GROUPS + tl.arange(0, GROUPS)
    tl.store(means_ptr + slot, group_means)
    tl.store(squares_ptr + slot, group_squares)


@triton.jit
def _merge_statistics_kernel(
    means_ptr,
    squares_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    chunks,
    positions,
    chunk_positions,
    eps,
    GROUPS: tl.constexpr,
    GROUPS_AT_ONCE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    CHUNKS_AT_ONCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    first_group, image = tl.program_id(0) * GROUPS_AT_ONCE, tl.program_id(1)
    group = first_group + tl.arange(0, GROUPS_AT_ONCE)
    # near the mean, so that the sums below stay small
    pivot = tl.load(means_ptr + image * chunks * GROUPS + group)
    # Sums of each lane of chunks, reduced once at the end: [CHUNKS_AT_ONCE, GROUPS_AT_ONCE].
    weighted = tl.zeros((CHUNKS_AT_ONCE, GROUPS_AT_ONCE), tl.float32)
    spread = tl.zeros((CHUNKS_AT_ONCE, GROUPS_AT_ONCE), tl.float32)
    for start in range(0, chunks, CHUNKS_AT_ONCE):
        chunk = start + tl.arange(0, CHUNKS_AT_ONCE)
        mask = (chunk < chunks)[:, None]
        slot = (image * chunks + chunk)[:, None] * GROUPS + group[None, :]
        count = (
            tl.minimum(positions - chunk * chunk_positions, chunk_positions).to(tl.float32)[:, None]
            * GROUP_SIZE
        )
        distance = tl.where(
            mask, tl.load(means_ptr + slot, mask=mask, other=0.0) - pivot[None, :], 0.0
        )
        weighted += count * distance
        spread += tl.load(squares_ptr + slot, mask=mask, other=0.0) + count * distance * distance
    total = (positions * GROUP_SIZE).to(tl.float32)
    shifted = tl.sum(weighted, axis=0) / total
    mean = pivot + shifted  # [GROUPS_AT_ONCE]
    variance = tl.maximum(tl.sum(spread, axis=0) / total - shifted * shifted, 0.0)
    deviation = tl.rsqrt(variance + eps)

    # [GROUPS_AT_ONCE, GROUP_SIZE]
    channel = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    scale = deviation[:, None] * tl.load(norm_weight_ptr + channel)
    shift = tl.load(norm_bias_ptr + channel) - mean[:, None] * scale
    if HAS_BIAS:
        shift += tl.load(bias_ptr + channel) * scale
    place = image * GROUPS * GROUP_SIZE + channel
    tl.store(scale_ptr + place, scale)
    tl.store(shift_ptr + place, shift)


@triton.jit
def _apply_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    positions,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    SILU: tl.constexpr,
):
    tile, image = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    position = tile * TILE + tl.arange(0, TILE)
    mask = (position < positions)[:, None]
    # [TILE, CHANNELS]
    place = (image.to(tl.int64) * positions + position)[:, None] * CHANNELS + channel[None, :]
    scale = tl.load(scale_ptr + image * CHANNELS + channel)[None, :]
    shift = tl.load(shift_ptr + image * CHANNELS + channel)[None, :]
    y = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) * scale + shift
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)
