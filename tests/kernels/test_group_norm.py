"""Group norm with SiLU: the references against torch. The kernels against the references:
tests/interpreted.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.group_norm import add_with_statistics_reference, interleave, normalize_reference

GROUPS, EPS = 8, 1e-6


def drawn(*shape: int, seed: int = 0, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + offset


@pytest.mark.parametrize("silu", [True, False])
def test_the_references_are_torchs_group_norm(silu: bool) -> None:
    """Fails if bias, norm_weight, norm_bias, groups or SiLU are applied in another order than the
    tokenizer's.
    """
    x, bias, norm_weight, norm_bias = (
        drawn(2, 6, 6, 32),
        drawn(32, seed=1),
        drawn(32, seed=2),
        drawn(32, seed=3),
    )
    expected = F.group_norm(
        (x + bias).permute(0, 3, 1, 2), GROUPS, norm_weight, norm_bias, EPS
    ).permute(0, 2, 3, 1)
    expected = F.silu(expected) if silu else expected
    nothing, statistics = add_with_statistics_reference(x, bias, None, GROUPS, None)
    assert nothing is None
    found = normalize_reference(
        x, statistics, norm_weight, norm_bias, EPS, bias=bias, silu=silu, out_dtype=torch.float32
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_interleaved_phases_are_an_upsampled_convolution() -> None:
    """Fails if a phase lands on another pixel's place."""
    phases = drawn(2, 4, 3, 4 * 5)
    image = interleave(phases)
    assert image.shape == (2, 6, 4, 5)
    for row, column in ((0, 0), (0, 3), (3, 0), (5, 2), (4, 1)):
        a, b = row % 2, column % 2
        phase = (2 * a + b) * 5
        assert torch.equal(
            image[:, row, column], phases[:, row // 2 + a, column // 2 + b, phase : phase + 5]
        )
