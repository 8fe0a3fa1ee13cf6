"""Lookahead: which rows of a pass take part, which tokens are kept, and what is guessed next.

A pass feeds each sequence its last true token and guesses for the positions behind it, a window in
all. With the noise of each draw fixed, a token is a function of the tokens before it. So every
token up to and including the first behind a wrong guess is the one that a pass of one token draws,
and is kept. What was drawn behind it is the next pass's guess (Jacobi iteration: Song et al. 2021,
arXiv:2002.03629; with shared noise: Teng et al. 2025, arXiv:2510.24211).

Guesses are in `codes`, at the positions that an image has not reached yet.
"""

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear import pdl_option

# What the draw says of a token: its guess held; its logits were not finite.
HELD = tl.constexpr(1)
BROKEN = tl.constexpr(2)


@triton.jit
def row_position(positions, limits, row, WINDOW: tl.constexpr):
    """The position of a row, which is new token row % WINDOW of sequence row // WINDOW; -1 if it
    takes no part.
    """
    first = tl.load(positions + row // WINDOW, cache_modifier=".cg")
    position = first + row % WINDOW
    takes_part = (first >= 0) & (position < tl.load(limits + row // WINDOW))
    return tl.where(takes_part, position, -1)


def row_positions_reference(positions: Tensor, limits: Tensor, window: int) -> Tensor:
    """Does the same as `row_position` in torch, for all rows: int32 [sequences * window]."""
    at = positions[:, None] + torch.arange(window, dtype=torch.int32, device=positions.device)
    return torch.where((positions >= 0)[:, None] & (at < limits[:, None]), at, -1).flatten()


@triton.jit
def _accept_kernel(
    verdicts,  # [images, WINDOW]
    positions,  # [sequences]
    limits,  # [sequences]
    conditional_rows,  # [images]
    unconditional_rows,  # [images]
    image_slots,  # [images]
    codes,  # [slots, TOKENS]
    lengths,  # [slots]
    failed,  # [slots]
    drafted,  # [slots]
    accepted,  # [slots]
    TOKENS: tl.constexpr,
    GRID: tl.constexpr,
    WINDOW: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    """Does `accept` for one image a program."""
    if LAUNCH_PDL:
        gdc_launch_dependents()
        gdc_wait()  # README, rule 3: verdicts and codes come after it
    image = tl.program_id(0)
    conditional = tl.load(conditional_rows + image)
    unconditional = tl.load(unconditional_rows + image)
    slot = tl.load(image_slots + image).to(tl.int64)
    sequence = tl.maximum(conditional, 0)
    position = tl.load(positions + sequence, cache_modifier=".cg")
    count = tl.minimum(WINDOW, tl.load(limits + sequence) - position)
    active = (conditional >= 0) & (position >= 0) & (count > 0)
    token = tl.arange(0, WINDOW_TILE)
    drawn = active & (token < count)
    verdict = tl.load(verdicts + image * WINDOW + token, mask=drawn, other=0)
    # The last one has no guess behind it.
    ends = (token >= count - 1) | ((verdict & HELD) == 0)
    kept = tl.min(tl.where(ends, token, WINDOW_TILE), 0) + 1
    broken = tl.max(tl.where(token < kept, verdict & BROKEN, 0), 0) > 0
    tl.store(lengths + slot, position + kept, mask=active)
    tl.store(failed + slot, 1, mask=active & broken)
    tl.store(drafted + slot, tl.load(drafted + slot, mask=active) + count - 1, mask=active)
    tl.store(accepted + slot, tl.load(accepted + slot, mask=active) + kept - 1, mask=active)
    tl.store(positions + sequence, position + kept, mask=active)
    pair = active & (unconditional >= 0)
    tl.store(positions + tl.maximum(unconditional, 0), position + kept, mask=pair)
    # First guesses: the token above, or in the first row of the image the last one drawn.
    end = position + count
    guess = end + token
    above = guess - GRID
    source = tl.where((above >= 0) & (above < end), above, end - 1)
    guesses = active & (guess < position + kept + WINDOW - 1) & (guess < TOKENS)
    line = codes + slot * TOKENS
    tl.store(line + guess, tl.load(line + source, mask=guesses, other=0), mask=guesses)


def accept(
    verdicts: Tensor,
    positions: Tensor,
    limits: Tensor,
    conditional_rows: Tensor,
    unconditional_rows: Tensor,
    image_slots: Tensor,
    codes: Tensor,
    lengths: Tensor,
    failed: Tensor,
    drafted: Tensor,
    accepted: Tensor,
    *,
    images: int,
    window: int,
    launch_pdl: bool,
) -> None:
    """Keeps, of the tokens drawn for each image, those up to and including the first behind a wrong
    guess. Moves the image on by as many, and guesses the tokens that the next window has not yet.

    Args:
        verdicts: int32 [images * window]: `HELD`, `BROKEN`, both or neither, for each token drawn.
        positions: int32 [sequences], of the first token drawn; grows by the tokens kept.
        limits: int32 [sequences]: an image at its conditional sequence's limit is left alone.
        conditional_rows, unconditional_rows, image_slots: as of `sampling_reference.draw_tokens`.
        codes: int32 [slots, tokens], with the tokens drawn; guesses are written behind them.
        lengths: int32 [slots], tokens that the image has: its position, and moved on as that.
        failed: int32 [slots]; becomes 1 where a token that is kept is broken.
        drafted, accepted: int32 [slots]; grow by the guesses that were fed, and that held.
    """
    tokens = codes.shape[1]
    _accept_kernel[(images,)](
        verdicts,
        positions,
        limits,
        conditional_rows,
        unconditional_rows,
        image_slots,
        codes,
        lengths,
        failed,
        drafted,
        accepted,
        TOKENS=tokens,
        GRID=isqrt(tokens),
        WINDOW=window,
        WINDOW_TILE=triton.next_power_of_2(window),
        LAUNCH_PDL=launch_pdl,
        num_warps=1,
        **pdl_option(launch_pdl),
    )


def accept_reference(
    verdicts: Tensor,
    positions: Tensor,
    limits: Tensor,
    conditional_rows: Tensor,
    unconditional_rows: Tensor,
    image_slots: Tensor,
    codes: Tensor,
    lengths: Tensor,
    failed: Tensor,
    drafted: Tensor,
    accepted: Tensor,
    *,
    images: int,
    window: int,
) -> None:
    """Does the same as `accept` in torch. Nothing here waits for the device."""
    tokens, grid = codes.shape[1], isqrt(codes.shape[1])
    conditional, unconditional = (
        conditional_rows[:images].long(),
        unconditional_rows[:images].long(),
    )
    slots = image_slots[:images].long()
    first = positions[conditional.clamp(min=0)].long()
    count = (limits[conditional.clamp(min=0)] - first).clamp(max=window)  # [images]
    active = (conditional >= 0) & (first >= 0) & (count > 0)
    token = torch.arange(window, device=codes.device)
    verdicts = verdicts[: images * window].view(images, window)
    held = ((verdicts & HELD.value) > 0) & (token < count[:, None] - 1)
    kept = held.int().cumprod(dim=1).sum(dim=1) + 1
    broken = (((verdicts & BROKEN.value) > 0) & (token < kept[:, None])).any(dim=1)
    # Images left alone add zeros somewhere: a mask that picks entries would wait for the device to
    # count them.
    grown = torch.where(active, kept, 0).int()
    for total, more in (
        (lengths, grown),
        (failed, (active & broken & (failed[slots] == 0)).int()),
        (drafted, torch.where(active, count - 1, 0).int()),
        (accepted, torch.where(active, kept - 1, 0).int()),
    ):
        total.index_add_(0, slots, more)
    positions.index_add_(0, conditional.clamp(min=0), grown)
    positions.index_add_(0, unconditional.clamp(min=0), torch.where(unconditional >= 0, grown, 0))
    end = (first + count)[:, None]
    guess = end + token  # [images, window]
    above = guess - grid
    source = torch.where((above >= 0) & (above < end), above, end - 1).clamp(0, tokens - 1)
    wanted = active[:, None] & (guess < (first + kept + window - 1)[:, None]) & (guess < tokens)
    line = slots[:, None].expand_as(guess)
    cells = (line, guess.clamp(0, tokens - 1))
    values = torch.where(wanted, codes[line, source] - codes[cells], 0)
    codes.index_put_(cells, values, accumulate=True)
