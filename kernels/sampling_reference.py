"""The last operation of a step, in torch: guidance, temperature, top-k, top-p, the draw, the
hand-over to the next step.

Draws are keyed, not sequential: a token depends on its logits and on (seed, index of the image
within its request, position), so an image is the same wherever it stands in a batch. Nothing here
waits for the device.
"""

import torch
from torch import Tensor

from kernels.lookahead import BROKEN, HELD, accept_reference, row_positions_reference

# Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), and their Random123
# library.
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
_WORD = 0xFFFFFFFF
_COLDEST = 1e-5


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words for each counter and key.

    Args:
        counter: four words, each int64 holding 0 .. 2^32 - 1; shapes broadcast, with the key's too.
        key: two words, likewise.

    Returns:
        Four int64 tensors holding 0 .. 2^32 - 1.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_PHILOX_ROUNDS):
        # The products wrap around in int64; their 64 bits are right all the same. Bits above 32 are
        # cleared before they matter.
        even = word0 * _PHILOX_MULTIPLIERS[0]
        odd = word2 * _PHILOX_MULTIPLIERS[1]
        word0 = ((odd >> 32) ^ word1 ^ key0) & _WORD
        word2 = ((even >> 32) ^ word3 ^ key1) & _WORD
        word1, word3 = odd, even
        key0, key1 = key0 + _PHILOX_KEY_STEPS[0], key1 + _PHILOX_KEY_STEPS[1]
    return word0, word1 & _WORD, word2, word3 & _WORD


def gumbel(words: Tensor) -> Tensor:
    """-log(-log(u)) as float32, u = (top 24 bits of a 32-bit word + 1/2) / 2^24, which is neither 0
    nor 1.
    """
    # 2^24 - 1/2 is no float32, and u must not round to 1: hence float64.
    uniform = (words >> 8).double().add_(0.5).mul_(2.0**-24)
    return uniform.log_().neg_().log_().neg_().float()


def gumbel_noise(
    seeds: Tensor, image_indices: Tensor, positions: Tensor, vocab_size: int
) -> Tensor:
    """Standard Gumbel noise of every token.

    Token t takes word t % 4 of counter (t // 4, position, image index, 0) under the seed as key
    (low word first).

    Args:
        seeds: int64 [images], all 64 bits count
        image_indices: integers [images], index of the image within its request
        positions: integers [images], the step

    Returns:
        float32 [images, vocab_size]
    """
    quads = torch.arange((vocab_size + 3) // 4, device=seeds.device)
    seeds, image_indices, positions = (
        words.long()[:, None] for words in (seeds, image_indices, positions)
    )
    counter = (quads[None], positions & _WORD, image_indices & _WORD, torch.zeros_like(quads)[None])
    # [images, quads, 4]
    words = torch.stack(philox4x32(counter, (seeds & _WORD, (seeds >> 32) & _WORD)), dim=-1)
    return gumbel(words.flatten(1)[:, :vocab_size])


def kept_tokens(scaled: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """Which tokens top-k, then top-p leave to draw from.

    Top-k keeps a token if fewer than k logits are strictly larger (so ties stay); top-p keeps it if
    the mass, under the softmax over what top-k kept, of the tokens ranked before it is at most p
    (equal logits are ranked by lowest id).

    Args:
        scaled: float32 [images, vocab_size], logits divided by the temperature
        top_ks: integers [images], 0 keeps all
        top_ps: float32 [images], 1 keeps all

    Returns:
        bool [images, vocab_size]
    """
    if scaled.device.type == "cpu" and (top_ks <= 0).all() and (top_ps >= 1).all():
        return torch.ones_like(scaled, dtype=torch.bool)  # on a CPU, a look costs nothing
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    last = torch.where(top_ks > 0, top_ks, scaled.shape[-1]).clamp(max=scaled.shape[-1]).long() - 1
    in_top_k = scaled >= ordered.gather(-1, last[:, None])
    weights = (ordered - ordered[:, :1]).exp() * in_top_k.gather(-1, order)
    # float32 weights; summed in float64 so that the order of the sum does not show.
    mass = weights.double().cumsum(dim=-1)
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1).float()
    crossed_before = before > top_ps[:, None] * mass[:, -1:].float()
    in_top_p = (top_ps >= 1)[:, None] | ~torch.empty_like(in_top_k).scatter_(
        -1, order, crossed_before
    )
    return in_top_k & in_top_p


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
) -> None:
    """Draws the tokens of a window for each of the first `images` images, stores them, keeps those
    that `kernels.lookahead.accept` says, and moves the image's rows on by as many.

    The draw is Gumbel-max over the kept tokens (the largest of logit / temperature + noise, lowest
    id on equal), which follows their softmax; at temperature 0 the largest guided logit, lowest id
    on equal.

    Args:
        logits: float32 [rows, vocab_size]. Row r is of new token r % window of sequence
            r // window; rows of no image may hold anything.
        positions: int32 [sequences], of the first new token; grows by the tokens kept. There are
            rows / sequences new tokens, the window.
        limits: int32 [sequences]; at its conditional sequence's limit an image is left alone.
        conditional_rows: int32 [images or more], a sequence each; negative: no image here, nothing
            is read or written for it.
        unconditional_rows: int32; negative: no guidance.
        guided_steps: int32; from this position on there is no guidance.
        image_slots: int32, the image's line in what follows; no two images share one.
        guidance_scales: float32; guided = unconditional + (conditional - unconditional) * scale.
        temperatures: float32; values below 1e-5 but above 0 count as 1e-5.
        top_ks: int32, 0 keeps all
        top_ps: float32, 1 keeps all
        seeds: int64
        image_indices: int32, index of the image within its request
        codes: int32 [slots, tokens]; codes[slot, position] is written for each token drawn. At a
            position that it does not have, an image is left alone.
        lengths: int32 [slots], tokens that the image has: its position, and moved on as that.
        failed: int32 [slots]; becomes 1 where, for a token that is kept, a logit (guided, divided
            by the temperature) is NaN or +inf, or all are -inf; then the token is 0.
        drafted, accepted: int32 [slots]; grow by the guesses that were fed, and that held.
        verdicts: int32 [images * window or more], scratch.
        images: how many leading entries are in use
    """
    window = logits.shape[0] // len(positions)

    def per_token(of_images: Tensor) -> Tensor:
        return of_images[:images].repeat_interleave(window)

    index = torch.arange(window, device=logits.device).repeat(images)
    sequences, pairs = (per_token(each).long() for each in (conditional_rows, unconditional_rows))
    rows = sequences.clamp(min=0) * window + index
    steps = row_positions_reference(positions, limits, window)[rows].long()
    active = (sequences >= 0) & (steps >= 0) & (steps < codes.shape[1])
    guided = (pairs >= 0) & (steps < per_token(guided_steps))

    # [tokens drawn, vocab_size]
    conditional, unconditional = logits[rows], logits[pairs.clamp(min=0) * window + index]
    scales, temperatures = per_token(guidance_scales)[:, None], per_token(temperatures)[:, None]
    mixed = unconditional + (conditional - unconditional) * scales
    mixed = torch.where(guided[:, None], mixed, conditional)
    greedy = temperatures == 0
    scaled = torch.where(greedy, mixed, mixed * (1.0 / temperatures.clamp(min=_COLDEST)))

    noise = gumbel_noise(per_token(seeds), per_token(image_indices), steps, logits.shape[1])
    kept = kept_tokens(scaled, per_token(top_ks), per_token(top_ps))
    # argmax does not promise the lowest id on equal: the first of the largest does.
    perturbed = torch.where(kept, scaled + noise.masked_fill(greedy, 0.0), -torch.inf)
    tokens = (perturbed == perturbed.amax(dim=-1, keepdim=True)).int().argmax(dim=-1)
    broken = (scaled.isnan() | (scaled == torch.inf)).any(dim=-1) | (scaled == -torch.inf).all(
        dim=-1
    )
    tokens = tokens.masked_fill(broken, 0).clamp(0, logits.shape[1] - 1).int()

    # Tokens left alone add zeros somewhere: a mask that picks entries would wait for the device to
    # count them.
    slots = per_token(image_slots).long().clamp(0, codes.shape[0] - 1)
    cells = (slots, steps.clamp(0, codes.shape[1] - 1))
    held = tokens == codes[cells]
    verdicts[: len(held)] = held * HELD.value + broken * BROKEN.value
    codes.index_put_(cells, torch.where(active, tokens - codes[cells], 0), accumulate=True)
    accept_reference(
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
    )
