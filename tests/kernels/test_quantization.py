"""Quantised matrices: what is lost, how they lie in memory, and what damaged weights do."""

import pytest
import torch

from kernels import QUANTIZATIONS
from kernels.quantization import FP8, INT4_GROUP, QuantizedMatrix, joined, quantize

OUTPUTS, INPUTS = 48, 96


def drawn(seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.linspace(-4, 2, OUTPUTS)
    return torch.randn(OUTPUTS, INPUTS, generator=generator) * sizes[:, None]


# Half a step of e4m3 (three bits behind the first) or of the largest of a row or a group.
@pytest.mark.parametrize(("scheme", "mean"), [("fp8", 0.027), ("int8", 0.009), ("int4", 0.11)])
def test_each_output_keeps_its_relative_error(scheme: str, mean: float) -> None:
    """Fails if an output gets another's scale, or values are cut off instead of rounded."""
    weights = drawn()
    matrix = quantize(weights, scheme)
    assert (matrix.scheme, matrix.shape) == (scheme, weights.shape)
    error = (matrix.dequantized(torch.float32) - weights).norm(dim=1) / weights.norm(dim=1)
    assert error.mean() < mean
    assert error.max() < 1.5 * mean


def test_the_scales_and_values_are_those_of_the_largest_weight() -> None:
    """Fails if the range of a dtype is not used, or exceeded."""
    weights = drawn()
    for scheme, largest in (("fp8", 448), ("int8", 127)):
        matrix = quantize(weights, scheme)
        torch.testing.assert_close(matrix.scales, weights.abs().amax(dim=1) / largest)
        assert (matrix.values.float().abs().amax(dim=1) == largest).all()


def test_int4_digits_lie_two_in_a_byte() -> None:
    """Fails if the digits of a byte are swapped, or groups are not inputs that are neighbours."""
    digits = torch.arange(INPUTS).remainder(15).sub(7).repeat(2, 1).float()
    matrix = quantize(digits * torch.tensor([[0.5], [4.0]]), "int4")
    assert matrix.scales.tolist() == [[0.5] * 3, [4.0] * 3]
    assert matrix.scales.shape[1] == INPUTS // INT4_GROUP
    low, high = matrix.values & 15, matrix.values >> 4
    assert torch.equal(low.float() - 8, digits[:, ::2])
    assert torch.equal(high.float() - 8, digits[:, 1::2])


def test_int4_takes_a_smaller_scale_where_that_leaves_less_error() -> None:
    """Fails if a single large weight decides how all of its group are rounded."""
    weights = torch.full((1, INT4_GROUP), 0.6)
    weights[0, 0] = 7
    plain = (weights.round() - weights).square().sum()
    assert (quantize(weights, "int4").dequantized(torch.float32) - weights).square().sum() < plain


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_stays_so(scheme: str, bad: float) -> None:
    """Fails if damaged weights become numbers, which would draw noise instead of an error."""
    weights = drawn()
    weights[3, 5] = bad
    weights[9] = 0
    rebuilt = quantize(weights, scheme).dequantized(torch.float32)
    assert rebuilt[3, : INT4_GROUP if scheme == "int4" else INPUTS].isnan().all()
    assert not rebuilt[9].any()
    assert rebuilt[[row for row in range(OUTPUTS) if row != 3]].isfinite().all()


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_dtypes_blocks_and_joins_change_nothing(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if what a matrix becomes depends on how much is quantised at a time or on a dtype that
    holds the same numbers.
    """
    weights = drawn().bfloat16()
    whole = quantize(weights.float(), scheme)
    monkeypatch.setattr("kernels.quantization._BLOCK_ELEMENTS", 5 * INPUTS)
    in_blocks = quantize(weights, scheme)
    halves = joined([quantize(half, scheme) for half in weights.chunk(2)])
    for other in (in_blocks, halves):
        assert torch.equal(bits(other), bits(whole))
        assert torch.equal(other.scales, whole.scales)


def bits(matrix: QuantizedMatrix) -> torch.Tensor:
    assert matrix.values.is_contiguous()
    return matrix.values.view(torch.uint8)


def test_values_are_exact_in_16_bits() -> None:
    """Fails if a kernel that multiplies values in 16 bits and scales the sum would round."""
    every = torch.arange(256, dtype=torch.uint8)
    for values in (every.view(FP8), every.view(torch.int8)):
        exact = values.float()[values.float().isfinite()]
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(exact.to(dtype).float(), exact)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_paired_matrix_is_the_same_one(scheme: str) -> None:
    """Fails if pairing loses or exchanges weights, takes other memory, or changes what is paired
    already.
    """
    matrix = quantize(torch.randn(70, 384, generator=torch.Generator().manual_seed(1)), scheme)
    weights, values = matrix.dequantized(torch.float32), matrix.values.clone()
    paired = matrix.pair()
    assert paired.values is matrix.values
    assert paired.pair() is paired
    assert torch.equal(paired.dequantized(torch.float32), weights)
    block = paired.values[:, 128:256].view(torch.uint8).view(70, 64, 2)
    assert torch.equal(block[..., 0], values[:, 128:192].view(torch.uint8))
    assert torch.equal(block[..., 1], values[:, 192:256].view(torch.uint8))


@pytest.mark.parametrize(("scheme", "inputs"), [("int4", 256), ("fp8", 192)])
def test_what_has_no_whole_blocks_of_bytes_is_not_paired(scheme: str, inputs: int) -> None:
    assert not quantize(torch.ones(4, inputs), scheme).can_be_paired
