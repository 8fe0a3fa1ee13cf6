"""Quantised weights of matrix products: how they lie in memory, how they come from floating-point
ones, and back.

`fp8` (e4m3) and `int8` have a byte an element and a float32 scale an output. `int4` has half a byte
an element and a float32 scale for each group of inputs of an output. A weight is its value times
its scale. Activations stay what they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
INT4_GROUP = 32  # inputs that share a scale
PAIRED_INPUTS = 128  # inputs of a block in which bytes are paired
LARGEST = {FP8: 448.0, torch.int8: 127.0}
BYTE_DTYPES = {"fp8": FP8, "int8": torch.int8}  # of weights, and of keys and values
_DTYPES = BYTE_DTYPES | {"int4": torch.uint8}
_LARGEST = {"fp8": LARGEST[FP8], "int8": LARGEST[torch.int8], "int4": 7.0}
# of the scale that the largest weight of a group asks for: clipping it can leave smaller errors
_INT4_SHARES = tuple(share / 100 for share in range(100, 58, -2))
_BLOCK_ELEMENTS = 2**18  # quantised at a time, so that intermediate results stay small


@dataclass(frozen=True)
class QuantizedMatrix:
    """The weights of a product, [outputs, inputs].

    Attributes:
        values: contiguous [outputs, inputs], float8_e4m3fn or int8. Of int4 uint8 [outputs,
            inputs / 2]: element 2 j of a row is in the low four bits of byte j, element 2 j + 1 in
            the high ones, and each has 8 added to it.
        scales: contiguous float32 [outputs]; of int4 [outputs, groups].
        paired: whether values are in the order of `pair`.
    """

    values: Tensor
    scales: Tensor
    paired: bool = False

    @property
    def scheme(self) -> str:
        """How it is quantised: fp8, int8 or int4."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.values.dtype)

    @property
    def shape(self) -> torch.Size:
        """[outputs, inputs]."""
        outputs, columns = self.values.shape
        return torch.Size((outputs, columns * 2 if self.scheme == "int4" else columns))

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights as [outputs, inputs] of a dtype: products in float32, rounded once."""
        if self.scheme != "int4":
            values = _in_order(self.values) if self.paired else self.values
            weights = values.float().mul_(self.scales[:, None])
        else:
            digits = torch.stack([self.values & 15, self.values >> 4], dim=-1).flatten(1)
            in_groups = (digits.float() - 8).view(*self.scales.shape, -1)
            weights = in_groups.mul_(self.scales[..., None]).flatten(1)
        return weights.to(dtype)

    def fill(self, weights: Tensor) -> None:
        """Quantises weights [outputs, inputs] of any floating-point dtype into this matrix.

        A weight that is not finite makes the scale NaN that it shares, and so all weights there.
        """
        assert weights.shape == self.shape and not self.paired
        outputs, inputs = self.shape
        for rows in _blocks(outputs, inputs):
            block = weights[rows].float()
            if self.scheme == "int4":
                self._fill_int4(rows, block)
                continue
            scales = _scales(block.abs().amax(dim=1), self.scheme)
            scaled = (block / scales[:, None]).nan_to_num_()
            self.values[rows] = scaled.to(FP8) if self.scheme == "fp8" else scaled.round_().char()
            self.scales[rows] = scales

    def pair(self) -> "QuantizedMatrix":
        """The same weights in the order that `kernels.hopper.quantized_products` reads, in the same
        memory. Of each block of `PAIRED_INPUTS` inputs, an element of the first half has beside it
        the one of the second half.
        """
        if self.paired:
            return self
        assert self.can_be_paired
        outputs, inputs = self.shape
        for rows in _blocks(outputs, inputs):
            values = self.values[rows]
            halves = values.view(len(values), -1, 2, PAIRED_INPUTS // 2)
            values.copy_(halves.transpose(2, 3).flatten(1))
        return replace(self, paired=True)

    @property
    def can_be_paired(self) -> bool:
        """Whether there are whole blocks of bytes."""
        return self.scheme != "int4" and self.shape[1] % PAIRED_INPUTS == 0

    def _fill_int4(self, rows: slice, block: Tensor) -> None:
        """Takes for each group the scale that leaves the least square error."""
        weights = block.view(len(block), self.scales.shape[1], -1)
        full = _scales(weights.abs().amax(dim=2), "int4")
        best, least = full, torch.full_like(full, torch.inf, dtype=torch.float64)
        for share in _INT4_SHARES:
            scales = full * share
            rounded = _int4_digits(weights, scales) * scales[..., None]
            # In float64 the order of the sum does not decide which scale is taken.
            error = (rounded - weights).double().square_().sum(dim=2)
            best = torch.where(error < least, scales, best)
            least = torch.minimum(error, least)
        digits = (_int4_digits(weights, best) + 8).byte().flatten(1)
        self.values[rows] = digits[:, ::2] | digits[:, 1::2] << 4
        self.scales[rows] = best


def empty_matrix(
    scheme: str, shape: Sequence[int], device: torch.device, groups: int | None = None
) -> QuantizedMatrix:
    """A matrix of any values.

    Args:
        shape: [outputs, inputs]
        groups: of an output's inputs, for int4 alone; None: of `INT4_GROUP` inputs each.
    """
    outputs, inputs = shape
    columns = inputs
    scales: tuple[int, ...] = (outputs,)
    if scheme == "int4":
        groups = groups or inputs // INT4_GROUP
        assert inputs % (2 * groups) == 0
        columns, scales = inputs // 2, (outputs, groups)
    return QuantizedMatrix(
        torch.empty(outputs, columns, dtype=_DTYPES[scheme], device=device),
        torch.empty(scales, dtype=torch.float32, device=device),
    )


Weights = Tensor | QuantizedMatrix  # of a product, [outputs, inputs]


def in_dtype(weights: Weights, dtype: torch.dtype) -> Tensor:
    """Weights that products of a dtype take: the same, or dequantised."""
    return weights if isinstance(weights, Tensor) else weights.dequantized(dtype)


def quantize(weights: Tensor, scheme: str) -> QuantizedMatrix:
    """Quantises weights [outputs, inputs]."""
    matrix = empty_matrix(scheme, weights.shape, weights.device)
    matrix.fill(weights)
    return matrix


def joined(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices of the same inputs, one above the other. All are paired, or none is."""
    return replace(
        matrices[0],
        values=torch.cat([matrix.values for matrix in matrices]),
        scales=torch.cat([matrix.scales for matrix in matrices]),
    )


def _in_order(values: Tensor) -> Tensor:
    """Paired values in the order of their inputs."""
    return values.view(len(values), -1, PAIRED_INPUTS // 2, 2).transpose(2, 3).flatten(1)


def _blocks(outputs: int, inputs: int) -> Iterator[slice]:
    rows = max(1, _BLOCK_ELEMENTS // inputs)
    return (slice(first, first + rows) for first in range(0, outputs, rows))


def _scales(largest: Tensor, scheme: str) -> Tensor:
    """What makes the largest weights the largest values. Of nothing but zeros it is 1."""
    scales = largest / _LARGEST[scheme]
    return torch.where(scales == 0, 1.0, torch.where(scales.isinf(), torch.nan, scales))


def _int4_digits(weights: Tensor, scales: Tensor) -> Tensor:
    """Float32 -8 .. 7."""
    return (weights / scales[..., None]).nan_to_num_().round_().clamp_(-8, 7)
