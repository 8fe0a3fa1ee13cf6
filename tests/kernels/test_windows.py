"""The torch reference of windows against rules computed by other means: which tokens are drawn,
which are kept, and what is guessed next.

tests/kernels/interpreted/test_window_kernels.py runs the Triton kernels against the reference.
"""

from math import isqrt
from typing import Any

import pytest
import torch
from sampling_cases import mixed_case
from window_cases import AcceptCase, accept_case

from kernels.lookahead import BROKEN, HELD, accept_reference
from kernels.sampling_reference import draw_tokens


@pytest.mark.parametrize("window", [2, 3, 5])
def test_each_token_of_a_window_is_drawn_as_alone(window: int) -> None:
    """Fails if a token takes another position's logits or noise, a window does not end at its
    limit, or guidance does not end where it should.
    """
    case = mixed_case(60, 50, seed=window, window=window)
    codes = case.drawn_by(draw_tokens).codes
    expected = case.codes.clone()
    for index in range(window):
        alone = case.at(index)
        drawn = alone.drawn_by(draw_tokens).codes
        expected = torch.where(drawn != case.codes, drawn, expected)
    positions = case.positions[case.conditional_rows.long()]
    lines = codes[case.image_slots.long()], expected[case.image_slots.long()]
    for image, (position, conditional) in enumerate(
        zip(positions.tolist(), case.conditional_rows.tolist(), strict=True)
    ):
        end = min(position + window, int(case.limits[conditional]))
        assert torch.equal(lines[0][image, :end], lines[1][image, :end]), image


def test_guidance_ends_at_its_step() -> None:
    """Fails if the first token without guidance is drawn with it, or the last one with it
    without.
    """
    case = mixed_case(40, 50, seed=7)
    guided = case.unconditional_rows >= 0
    at = case.positions[case.conditional_rows.long()]
    ended = case.copy(guided_steps=at)
    plain = case.copy(unconditional_rows=torch.full_like(case.unconditional_rows, -1))
    last = case.copy(guided_steps=at + 1)
    assert torch.equal(ended.drawn_by(draw_tokens).codes, plain.drawn_by(draw_tokens).codes)
    assert torch.equal(last.drawn_by(draw_tokens).codes, case.drawn_by(draw_tokens).codes)
    moved = ended.drawn_by(draw_tokens).positions - case.positions
    assert (moved[case.unconditional_rows[guided].long()] == 1).all()


def plainly_accepted(case: AcceptCase, window: int) -> dict[str, Any]:
    """What `accept` should leave behind, image by image."""
    left = {
        name: getattr(case, name).tolist()
        for name in ("positions", "lengths", "failed", "drafted", "accepted", "codes")
    }
    for image, (row, pair, slot) in enumerate(
        zip(
            case.conditional_rows.tolist(),
            case.unconditional_rows.tolist(),
            case.image_slots.tolist(),
            strict=True,
        )
    ):
        if row < 0 or not 0 <= (position := left["positions"][row]) < (
            limit := int(case.limits[row])
        ):
            continue
        verdicts = case.verdicts[image * window : (image + 1) * window].tolist()
        verdicts = verdicts[: limit - position]
        kept = 1
        while kept < len(verdicts) and verdicts[kept - 1] & HELD.value:
            kept += 1
        if any(verdict & BROKEN.value for verdict in verdicts[:kept]):
            left["failed"][slot] = 1
        left["drafted"][slot] += len(verdicts) - 1
        left["accepted"][slot] += kept - 1
        left["lengths"][slot] = position + kept
        for each in (row, pair):
            if each >= 0:
                left["positions"][each] = position + kept
        line, end = left["codes"][slot], position + len(verdicts)
        tokens = len(line)
        for guess in range(end, min(position + kept + window - 1, tokens)):
            above = guess - isqrt(tokens)
            line[guess] = line[above] if 0 <= above < end else line[end - 1]
    return left


@pytest.mark.parametrize("window", [1, 2, 4, 9])
def test_what_is_kept_and_guessed(window: int) -> None:
    """Fails if a token behind a wrong guess is kept, one before it is not, a broken one that is not
    kept fails its image, a count is off, or another guess is made than the token above.
    """
    case = accept_case(40, window, seed=window)
    tensors = case.tensors()
    expected = plainly_accepted(case, window)
    accept_reference(**tensors, images=40, window=window)
    for name, values in expected.items():
        assert tensors[name].tolist() == values, name
