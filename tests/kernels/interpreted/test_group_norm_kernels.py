"""Group norm's kernels against their references in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from test_group_norm import EPS, GROUPS, drawn

from kernels.group_norm import (
    add_with_statistics,
    add_with_statistics_reference,
    normalize,
    normalize_reference,
)


@pytest.mark.parametrize("channels", [32, 128])
# several chunks with a remainder; less than one
@pytest.mark.parametrize("size", [(24, 40), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_equal_the_references(
    channels: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Fails if a chunk's remainder, a group's border, the residual or the stored rounding is
    treated otherwise.
    """
    height, width = size
    x, residual = (
        drawn(2, height, width, channels).to(dtype),
        drawn(2, height, width, channels, seed=4).to(dtype),
    )
    bias, norm_weight, norm_bias = (
        drawn(channels, seed=1),
        drawn(channels, seed=2),
        drawn(channels, seed=3),
    )
    for added, stored in ((residual, dtype), (None, None), (residual.float(), torch.float32)):
        total, statistics = add_with_statistics(x, bias, added, GROUPS, stored)
        expected_total, expected_statistics = add_with_statistics_reference(
            x, bias, added, GROUPS, stored
        )
        if stored is not None:
            assert total is not None
            assert expected_total is not None
            assert total.dtype == stored
            assert torch.equal(total, expected_total)
        source, folded = (x, bias) if total is None else (total, None)
        for silu in (True, False):
            found = normalize(
                source,
                statistics,
                norm_weight,
                norm_bias,
                EPS,
                bias=folded,
                silu=silu,
                out_dtype=dtype,
            )
            expected = normalize_reference(
                source,
                expected_statistics,
                norm_weight,
                norm_bias,
                EPS,
                bias=folded,
                silu=silu,
                out_dtype=dtype,
            )
            assert found.dtype == dtype
            tolerance = 2e-5 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_interleaving_kernel_equals_the_reference() -> None:
    """Fails if the kernel reads another phase, another pixel or another image."""
    x, bias = drawn(3, 9, 6, 4 * 64), drawn(64, seed=1)
    total, statistics = add_with_statistics(x, bias, None, GROUPS, torch.float32, interleaved=True)
    expected, expected_statistics = add_with_statistics_reference(
        x, bias, None, GROUPS, torch.float32, interleaved=True
    )
    assert total is not None
    assert expected is not None
    assert total.shape == (3, 16, 10, 64)
    assert torch.equal(total, expected)
    ones = torch.ones(64)
    found = normalize(total, statistics, ones, bias, EPS, out_dtype=torch.float32)
    torch.testing.assert_close(
        found,
        normalize_reference(
            expected, expected_statistics, ones, bias, EPS, out_dtype=torch.float32
        ),
    )


def test_the_kernels_keep_a_variance_beside_a_large_mean() -> None:
    """Fails if the variance is a difference of large sums: at a mean of 1,000 and a deviation of
    0.1 nothing is left of it.
    """
    x, zero, one = drawn(1, 24, 24, 32, scale=0.1, offset=1000.0), torch.zeros(32), torch.ones(32)
    _, statistics = add_with_statistics(x, zero, None, GROUPS, None)
    found = normalize(x, statistics, one, zero, EPS, silu=False, out_dtype=torch.float32)
    exact = F.group_norm(x.double().permute(0, 3, 1, 2), GROUPS, eps=EPS).permute(0, 2, 3, 1)
    torch.testing.assert_close(found.double(), exact, atol=0.01, rtol=0)
