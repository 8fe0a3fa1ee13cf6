"""The kernels of windows, statement by statement, against their torch references."""

import pytest
import torch
from sampling_cases import mixed_case
from window_cases import accept_case

from kernels.lookahead import accept, accept_reference
from kernels.sampling import draw_tokens


@pytest.mark.parametrize("window", [2, 4, 9])
def test_accept_equals_the_reference(window: int) -> None:
    case = accept_case(40, window, seed=100 + window)
    got, expected = case.tensors(), case.tensors()
    accept(**got, images=40, window=window, launch_pdl=False)
    accept_reference(**expected, images=40, window=window)
    for name, values in expected.items():
        assert torch.equal(got[name], values), name


def test_each_token_of_a_window_is_drawn_as_alone() -> None:
    """Fails if a token takes another position's logits or noise, or guidance ends elsewhere."""
    window = 3
    case = mixed_case(20, 50, seed=window, window=window)
    together = case.drawn_by(draw_tokens).codes
    compared = 0
    for index in range(window):
        alone = case.at(index).drawn_by(draw_tokens).codes
        drawn = alone != case.codes
        assert torch.equal(together[drawn], alone[drawn]), index
        compared += int(drawn.sum())
    assert compared > 40
