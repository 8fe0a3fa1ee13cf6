"""What a decode step and the pixel decoder are made of: the operations and the arguments that each
of them takes. The torch reference beside each kernel says what they mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.group_norm import GroupStatistics


class Embed(Protocol):
    """Starts the residual stream; see `kernels.norm.embed`."""

    def __call__(
        self,
        codes: Tensor,
        row_slots: Tensor,
        positions: Tensor,
        labels: Tensor,
        token_embedding: Tensor,
        class_embedding: Tensor,
        norm_weight: Tensor,
        residual: Tensor,
        normed: Tensor,
        squares: Tensor | None = None,
        *,
        eps: float,
        headroom: float = 1.0,
    ) -> None:
        """Writes residual, normed and, where given, squares."""


class MatrixProduct(Protocol):
    """A matrix product; see `kernels.linear.linear` and `kernels.swiglu.swiglu`."""

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Writes out."""


class PagedAttention(Protocol):
    """Attends from the newest token of each row; see `kernels.attention.attention`."""

    def __call__(
        self,
        qkv: Tensor,
        rotary: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        page_table: Tensor,
        positions: Tensor,
        chunk_out: Tensor,
        chunk_stats: Tensor,
        out: Tensor,
    ) -> None:
        """Writes the newest keys and values, and out."""


class AddNorm(Protocol):
    """Adds partial sums to the residual stream and norms it; see `kernels.norm.add_norm`."""

    def __call__(
        self, residual: Tensor, partials: Tensor, norm_weight: Tensor, normed: Tensor, *, eps: float
    ) -> None:
        """Writes residual and normed."""


class DrawTokens(Protocol):
    """Draws a token for each image; see `kernels.sampling_reference.draw_tokens`."""

    def __call__(
        self,
        logits: Tensor,
        positions: Tensor,
        conditional_rows: Tensor,
        unconditional_rows: Tensor,
        image_slots: Tensor,
        guidance_scales: Tensor,
        temperatures: Tensor,
        top_ks: Tensor,
        top_ps: Tensor,
        seeds: Tensor,
        image_indices: Tensor,
        codes: Tensor,
        failed: Tensor,
        *,
        images: int,
    ) -> None:
        """Writes codes, failed and positions."""


@dataclass(frozen=True)
class Operations:
    """What a decode step is made of."""

    embed: Embed
    linear: MatrixProduct  # leaves partial sums
    linear_splits: Callable[[int, int], int]  # outputs, inputs -> partial sums of `linear`
    whole_linear: MatrixProduct  # out: [rows, outputs]
    swiglu: MatrixProduct
    gate: Callable[[Tensor, Tensor], None]  # products, out
    attention: PagedAttention
    attention_chunks: Callable[[int], int]  # tokens -> chunks of its scratch tensors
    add_norm: AddNorm
    draw_tokens: DrawTokens
    # take the place of `linear`, `swiglu` and `add_norm` for few rows
    fused: "FusedProducts | None" = None


class NormingProduct(Protocol):
    """A product that norms its input; see `kernels.hopper.products.fused_linear`."""

    def __call__(
        self, x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float
    ) -> None:
        """Writes out."""


class Project(Protocol):
    """A product that adds itself to the residual stream; see
    `kernels.hopper.products.fused_project`.
    """

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        normed: Tensor,
        squares: Tensor,
    ) -> None:
        """Writes residual, normed and squares."""


@dataclass(frozen=True)
class FusedProducts:
    """A layer's products where each norms its own input and adds itself to the residual stream; see
    kernels/hopper/products.py.
    """

    linear: NormingProduct  # leaves partial sums
    linear_splits: Callable[[int, int], int]  # outputs, inputs -> partial sums of `linear`
    project: Project
    # outputs, inputs -> blocks of squares that `project` writes
    project_blocks: Callable[[int, int], int]
    swiglu: NormingProduct
    head: NormingProduct  # out: logits [rows, outputs]
    headroom: float  # factor of every x


class AddWithStatistics(Protocol):
    """Adds and measures; see `kernels.group_norm.add_with_statistics`."""

    def __call__(
        self,
        x: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        groups: int,
        out_dtype: torch.dtype | None,
        *,
        interleaved: bool = False,
    ) -> tuple[Tensor | None, GroupStatistics]:
        """Returns the sum, if an `out_dtype` is given, and its statistics."""


class Normalize(Protocol):
    """Applies a group norm and SiLU; see `kernels.group_norm.normalize`."""

    def __call__(
        self,
        x: Tensor,
        statistics: GroupStatistics,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        *,
        bias: Tensor | None = None,
        silu: bool = True,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Returns a tensor of x's shape."""


@dataclass(frozen=True)
class GroupNormOperations:
    """The pixel decoder's two fused operations."""

    add: AddWithStatistics
    normalize: Normalize
