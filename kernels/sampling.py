"""The last kernel of a step: guidance, temperature, top-k, top-p, the draw, the hand-over to the
next step; no sort.

One program draws one token of one image with the whole vocabulary in registers. Drawing from the
kept tokens by Gumbel-max is the same as trying all tokens in order of their perturbed scores until
one is in the kept set; whether one is, a count and a mass tell. If it is not, neither is any token
ranked after it, so a round rules out many, and one to three rounds are usual.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.lookahead import BROKEN, HELD, accept, row_position

# Values a thread holds of each tile. A vocabulary of 16,384 then takes 16 warps, each thread up to
# 128 registers: no spills (32 warps leave 64 registers a thread, and spill a dozen).
_VALUES_PER_THREAD = 32
_MOST_WARPS = 32
_LARGEST_VOCABULARY = 2**16
MOST_LOGITS = 2**31 - 1  # of a draw: offsets are int32


@triton.jit
def _log(x, FAST: tl.constexpr):
    """log(x), within 2^-22 in (1/2, 2) and relatively elsewhere. The accurate function takes ten
    times as many instructions.
    """
    if FAST:
        return libdevice.fast_logf(x)
    else:
        return tl.log(x)


@triton.jit
def _gumbel(bits, FAST: tl.constexpr):
    """Returns -log(-log(u)) for u = (top 24 bits + 1/2) / 2^24."""
    whole = (bits >> 8).to(tl.int32)
    uniform = (whole.to(tl.float32) + 0.5) * (2.0**-24)
    # Near 1, where float32 is too coarse for u (and rounds the last one to 1), 1 - u is exact, and
    # the series of -log(1 - x) is within a relative 1e-7.
    below_one = ((0xFFFFFF - whole).to(tl.float32) + 0.5) * (2.0**-24)
    series = tl.full(below_one.shape, 1.0 / 7.0, tl.float32)
    for power in tl.static_range(6, 0, -1):
        series = tl.fma(series, below_one, 1.0 / power)
    exponential = tl.where(below_one < 0.125, below_one * series, -_log(uniform, FAST))
    return -_log(exponential, FAST)


@triton.jit
def _gumbel_noise(seed, position, image_index, BLOCK: tl.constexpr, FAST: tl.constexpr):
    """Noise of tokens 0 .. BLOCK - 1 in four parts: token t has element t // 4 of part t % 4.

    It is made of word t % 4 of Philox4x32-10 of (t // 4, position, image index, 0).
    """
    quads = tl.arange(0, BLOCK // 4)
    word0, word1, word2, word3 = tl.philox(seed, quads, position, image_index, 0)
    return _gumbel(word0, FAST), _gumbel(word1, FAST), _gumbel(word2, FAST), _gumbel(word3, FAST)


@triton.jit
def _computed_here(x0, x1, x2, x3):
    """Returns the four tensors, computed by this point. The assembler would move arithmetic past
    the wait, to where it is used; it does not move a trap.

    The trap is on NaN, which noise never is.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred nan;
            .reg .f32 sum;
            add.f32 sum, $4, $5;
            add.f32 sum, sum, $6;
            add.f32 sum, sum, $7;
            setp.nan.f32 nan, sum, sum;
            @nan trap;
            mov.b32 $0, $4;
            mov.b32 $1, $5;
            mov.b32 $2, $6;
            mov.b32 $3, $7;
        }
        """,
        "=f,=f,=f,=f,f,f,f,f",
        [x0, x1, x2, x3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _scaled_logits(
    logits_ptr,
    row,
    unconditional_row,
    guidance_scale,
    inverse_temperature,
    tokens,
    VOCAB: tl.constexpr,
):
    """Guided logits over the temperature, -inf beyond the vocabulary. It gives equal bits for all
    tokens at once and for one.
    """
    real = tokens < VOCAB
    guided = unconditional_row >= 0
    conditional = tl.load(logits_ptr + (row * VOCAB + tokens), mask=real, other=0.0)
    unconditional = tl.load(
        logits_ptr + (unconditional_row * VOCAB + tokens), mask=real & guided, other=0.0
    )
    guided_logits = tl.where(
        guided, unconditional + (conditional - unconditional) * guidance_scale, conditional
    )
    return tl.where(real, guided_logits * inverse_temperature, float("-inf"))


@triton.jit
def _float_of(key):
    """The float32 that an order-preserving int32 stands for."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _key_of(value):
    """The inverse of `_float_of`; zeros of either sign have the key 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _top_k_threshold(scaled, highest, top_k):
    """A value that exactly the tokens kept by top-k reach, found by bisection over float32's order
    in at most 32 counts.
    """
    low = _key_of(tl.full((), float("-inf"), tl.float32))
    high = _key_of(highest) + 1
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        reaching = tl.sum((scaled >= _float_of(middle)).to(tl.int32), axis=0)
        low = tl.where(reaching >= top_k, middle, low)
        # When exactly k tokens reach the middle, it separates them from the rest and the search
        # ends.
        high = tl.where(reaching > top_k, high, tl.where(reaching == top_k, middle + 1, middle))
    return _float_of(low)


@triton.jit
def _draw_kernel(
    logits_ptr,  # float32 [rows, VOCAB]
    positions_ptr,  # int32 [sequences]
    limits_ptr,  # int32 [sequences]
    conditional_rows_ptr,  # int32 [images], as all up to image_indices
    unconditional_rows_ptr,
    guided_steps_ptr,
    image_slots_ptr,
    guidance_scales_ptr,  # float32
    temperatures_ptr,  # float32
    top_ks_ptr,
    top_ps_ptr,  # float32
    seeds_ptr,  # int64
    image_indices_ptr,
    codes_ptr,  # int32 [slots, TOKENS]
    lengths_ptr,  # int32 [slots]
    failed_ptr,  # int32 [slots]
    verdicts_ptr,  # int32 [images, WINDOW]
    WINDOW: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    FAST: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
    EARLY_POSITIONS: tl.constexpr,
):
    """Does `draw_tokens` for one token of one image a program, up to `accept`."""
    if LAUNCH_PDL:
        gdc_launch_dependents()
        if not EARLY_POSITIONS:
            gdc_wait()  # README, rule 3: positions may be of the kernel before
    image, index = tl.program_id(0) // WINDOW, tl.program_id(0) % WINDOW
    conditional_row = tl.load(conditional_rows_ptr + image)
    sequence = tl.maximum(conditional_row, 0)
    row = sequence * WINDOW + index
    # Past the L1 cache, which a kernel before may have filled on this multiprocessor when positions
    # were read early.
    position = row_position(positions_ptr, limits_ptr, row, WINDOW)
    seed = tl.load(seeds_ptr + image)
    image_index = tl.load(image_indices_ptr + image)
    noise0, noise1, noise2, noise3 = _gumbel_noise(
        seed, position, image_index, BLOCK=BLOCK, FAST=FAST
    )
    if LAUNCH_PDL and EARLY_POSITIONS:
        noise0, noise1, noise2, noise3 = _computed_here(noise0, noise1, noise2, noise3)
        gdc_wait()  # README, rules 2 and 3: positions come before it, logits after it

    # An image that is left alone goes through with no round and no store. It waits like the rest:
    # the next kernel relies on it.
    active = (conditional_row >= 0) & (position >= 0) & (position < TOKENS)
    pair = tl.load(unconditional_rows_ptr + image)
    guided = (pair >= 0) & (position < tl.load(guided_steps_ptr + image))
    unconditional_row = tl.where(guided, pair * WINDOW + index, -1)
    guidance_scale = tl.load(guidance_scales_ptr + image)
    temperature = tl.load(temperatures_ptr + image)
    top_k = tl.load(top_ks_ptr + image)
    top_p = tl.load(top_ps_ptr + image)
    inverse_temperature = tl.where(
        temperature == 0.0, 1.0, tl.div_rn(1.0, tl.maximum(temperature, 1e-5))
    )

    tokens = tl.arange(0, BLOCK)
    scaled = _scaled_logits(
        logits_ptr, row, unconditional_row, guidance_scale, inverse_temperature, tokens, VOCAB
    )
    noise = tl.interleave(tl.interleave(noise0, noise2), tl.interleave(noise1, noise3))
    noise = tl.where(temperature == 0.0, 0.0, noise)
    # NaN and +inf win the first round, so its winner shows that there are some. They need no
    # reduction.
    perturbed = tl.where(scaled < float("inf"), scaled + noise, float("inf"))

    best, token = _first_kept(
        scaled,
        perturbed,
        tokens,
        active,
        logits_ptr,
        row,
        unconditional_row,
        guidance_scale,
        inverse_temperature,
        top_k,
        top_p,
        VOCAB,
        BLOCK,
    )
    broken = (best == float("inf")) | (best == float("-inf"))
    slot = tl.load(image_slots_ptr + image)
    token = tl.where(broken, 0, tl.minimum(token, VOCAB - 1))
    cell = codes_ptr + slot.to(tl.int64) * TOKENS + position
    if WINDOW == 1:
        tl.store(failed_ptr + slot, 1, mask=active & broken)
        tl.store(lengths_ptr + slot, position + 1, mask=active)
        tl.store(positions_ptr + row, position + 1, mask=active)
        tl.store(positions_ptr + pair, position + 1, mask=active & (pair >= 0))
    else:
        guess = tl.load(cell, mask=active, other=0)
        verdict = tl.where(guess == token, HELD, 0) + tl.where(broken, BROKEN, 0)
        tl.store(verdicts_ptr + tl.program_id(0), verdict, mask=active)
    tl.store(cell, token, mask=active)


@triton.jit
def _first_kept(
    scaled,  # [BLOCK]
    perturbed,  # [BLOCK]
    tokens,  # [BLOCK]
    active,
    logits_ptr,
    row,
    unconditional_row,
    guidance_scale,
    inverse_temperature,
    top_k,
    top_p,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tries tokens in the order of their perturbed scores until one is kept, or has a score that is
    not finite. Returns its score and its number.
    """
    highest, largest_mass = _mass_before_kept(scaled, top_k, top_p)
    token = 0
    best = 0.0
    # tokens ranked at or after (limit, limit_token) are ruled out; at first none
    limit = float("-inf")
    limit_token = BLOCK
    searching = active
    while searching:
        ruled_out = (scaled < limit) | ((scaled == limit) & (tokens >= limit_token))
        best, token = tl.max(
            tl.where(ruled_out, float("-inf"), perturbed), axis=0, return_indices=True
        )
        value = _scaled_logits(
            logits_ptr,
            row,
            unconditional_row,
            guidance_scale,
            inverse_temperature,
            token,
            VOCAB,
        )
        in_top_k, crossed_before = _kept(scaled, tokens, token, value, top_k, highest, largest_mass)
        finite = (best < float("inf")) & (best > float("-inf"))
        searching = finite & ((in_top_k == 0) | crossed_before)
        limit = value
        # tokens that tie are kept or ruled out by top-k together
        limit_token = tl.where(in_top_k, token, 0)
    return best, token


@triton.jit
def _mass_before_kept(scaled, top_k, top_p):
    """Returns the largest logit, and the mass that the tokens ranked before a kept one may have, in
    units of the first one's.
    """
    highest = 0.0
    largest_mass = float("inf")
    if top_p < 1.0:
        highest = tl.max(scaled, axis=0)
        threshold = float("-inf")
        if top_k > 0:
            threshold = _top_k_threshold(scaled, highest, top_k)
        largest_mass = top_p * tl.sum(
            tl.where(scaled >= threshold, tl.exp(scaled - highest), 0.0), axis=0
        )
    return highest, largest_mass


@triton.jit
def _kept(scaled, tokens, token, value, top_k, highest, largest_mass):
    """Returns whether top-k keeps a token, whose logit is `value`, and whether the tokens ranked
    before it have more mass than top-p allows.
    """
    larger = tl.sum((scaled > value).to(tl.int32), axis=0)
    in_top_k = (top_k <= 0) | (larger < top_k)
    crossed_before = False
    if largest_mass < float("inf"):
        before = (scaled > value) | ((scaled == value) & (tokens < token))
        mass = tl.sum(tl.where(before, tl.exp(scaled - highest), 0.0), axis=0)
        crossed_before = mass > largest_mass
    return in_top_k, crossed_before


def warps_for(block: int) -> int:
    """Warps of a program that holds `block` tokens."""
    return max(1, min(_MOST_WARPS, block // (32 * _VALUES_PER_THREAD)))


def draw_tokens(
    logits: Tensor,
    positions: Tensor,
    limits: Tensor,
    conditional_rows: Tensor,
    unconditional_rows: Tensor,
    guided_steps: Tensor,
    image_slots: Tensor,
    guidance_scales: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    seeds: Tensor,
    image_indices: Tensor,
    codes: Tensor,
    lengths: Tensor,
    failed: Tensor,
    drafted: Tensor,
    accepted: Tensor,
    verdicts: Tensor,
    *,
    images: int,
    early_positions: bool = False,
    num_warps: int | None = None,
) -> None:
    """Draws the tokens of a window for each of the first `images` images, and keeps those that
    `kernels.lookahead.accept` says. Arguments and result are those of
    `sampling_reference.draw_tokens`. For windows of more than one token it launches two kernels.

    The random bits are the reference's; the noise may differ from its in the last bits, so that
    another token can win only where two perturbed scores are within 1e-5, or a token's mass is at
    top-p to float32's rounding.

    Args:
        early_positions: positions, limits and `conditional_rows` may be read, and the noise made,
            before the kernels before this one have ended. True only if it is certain that the
            previous draw has ended by then, as in the engine's steps (`kernels.operations`).
        num_warps: of a program; None takes what keeps the vocabulary in registers.

    Raises:
        ValueError: the vocabulary or the logits are larger than a program holds or addresses, or a
            tensor is not contiguous.
    """
    if images == 0:
        return
    vocab_size, window = logits.shape[1], logits.shape[0] // len(positions)
    _check_sizes(logits, codes)
    block = max(16, triton.next_power_of_2(vocab_size))
    launch_pdl = logits.is_cuda and torch.cuda.get_device_capability(logits.device) >= (9, 0)
    _draw_kernel[(images * window,)](
        logits,
        positions,
        limits,
        conditional_rows,
        unconditional_rows,
        guided_steps,
        image_slots,
        guidance_scales,
        temperatures,
        top_ks,
        top_ps,
        seeds,
        image_indices,
        codes,
        lengths,
        failed,
        verdicts,
        WINDOW=window,
        VOCAB=vocab_size,
        BLOCK=block,
        TOKENS=codes.shape[1],
        FAST=logits.is_cuda,
        LAUNCH_PDL=launch_pdl,
        EARLY_POSITIONS=early_positions,
        num_warps=num_warps or warps_for(block),
        launch_pdl=launch_pdl,
        # A fused multiply-add would round guided logits otherwise than torch does, and break or
        # make ties.
        enable_fp_fusion=False,
    )
    if window > 1:
        accept(
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
            images=images,
            window=window,
            launch_pdl=launch_pdl,
        )


def _check_sizes(logits: Tensor, codes: Tensor) -> None:
    vocab_size = logits.shape[1]
    if vocab_size > _LARGEST_VOCABULARY:
        raise ValueError(
            f"the Triton draw holds at most {_LARGEST_VOCABULARY} tokens, not {vocab_size}: use "
            "the torch reference"
        )
    if logits.numel() > MOST_LOGITS:
        raise ValueError(
            f"{logits.shape[0]} rows of {vocab_size} logits are more than the Triton draw "
            "addresses: use fewer rows"
        )
    if not (logits.is_contiguous() and codes.is_contiguous()):
        raise ValueError(
            "the Triton draw takes logits and codes whose rows follow each other in memory: make "
            "them contiguous"
        )
