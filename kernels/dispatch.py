"""Which implementation carries out each operation of a step, and of the pixel decoder: Triton where
it can, else torch. One place.

Every operation takes the same tensors in both. Triton needs compute capability 8.0; its attention
the head sizes in `HEAD_SIZES`; programmatic dependent launch 9.0. On 9.0 (Hopper) 16-bit weights
have products and an attention of their own. With TRITON_INTERPRET=1 the Triton kernels run on a
CPU, slowly; Hopper's do not.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kernels import BACKENDS
from kernels.attention import HEAD_SIZES, attention
from kernels.attention_reference import attention_reference
from kernels.group_norm import (
    add_with_statistics,
    add_with_statistics_reference,
    normalize,
    normalize_reference,
    supports,
)
from kernels.hopper.attention import hopper_attention
from kernels.hopper.products import (
    HEADROOM,
    fused_linear,
    fused_project,
    fused_swiglu,
)
from kernels.linear import linear, linear_reference
from kernels.norm import add_norm, add_norm_reference, embed, embed_reference
from kernels.operations import FusedProducts, GroupNormOperations, Operations
from kernels.sampling import draw_tokens
from kernels.sampling_reference import draw_tokens as draw_tokens_reference
from kernels.swiglu import gate, gate_reference, swiglu, swiglu_reference
from kernels.tiles import (
    ATTENTION,
    FUSED_HEAD,
    FUSED_LINEAR,
    FUSED_PROJECT,
    FUSED_SWIGLU,
    LINEAR,
    SWIGLU,
    WHOLE_LINEAR,
    TileTable,
    tile_table,
)

MANY_ROWS = 64  # above, a library's matrix product is faster; below, reading the weights decides


def select_group_norm(
    device: torch.device,
    widths: Sequence[int],
    groups: int,
    backend: str,
    *,
    tell: Callable[[str], None],
) -> GroupNormOperations:
    """The pixel decoder's operations. A GPU runs Triton for widths that its kernels take, unless
    torch is asked for.

    Args:
        widths: channels of every norm.
        backend: "auto", "triton" or "torch".
        tell: called with one line for the user where something falls back.
    """
    assert backend in BACKENDS
    if device.type == "cuda" and triton_runs_on(device) and backend != "torch":
        if all(supports(width, groups) for width in widths):
            return GroupNormOperations(add_with_statistics, normalize)
        tell(
            f"a tokenizer of {', '.join(map(str, widths))} channels has no Triton group norm: "
            "torch's takes its place"
        )
    return GroupNormOperations(add_with_statistics_reference, normalize_reference)


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on the device: on a GPU of compute capability 8.0 and above, or
    in the interpreter.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


def select_operations(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    head_size: int,
    backend: str,
    *,
    tell: Callable[[str], None],
) -> Operations:
    """The operations for a model's shape on a device.

    Args:
        backend: "auto", "triton" or "torch".
        tell: called with one line for the user where something falls back.

    Raises:
        ValueError: Triton was asked for where it does not run.
    """
    assert backend in BACKENDS
    runs = triton_runs_on(device)
    if backend == "triton" and not runs:
        raise ValueError(
            f"attention_backend triton: {device} is no GPU of compute capability 8.0 or above; use "
            "auto or torch"
        )
    if backend == "torch" or not runs:
        if backend == "auto" and device.type == "cuda":
            tell(
                "this GPU's compute capability is below 8.0: torch's operations take the place of "
                "the Triton kernels"
            )
        return torch_operations()
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    hopper = capability == (9, 0) and dtype.itemsize == 2
    table = tile_table(capability, dtype)
    operations = triton_operations(
        table, heads, head_size, launch_pdl=capability >= (9, 0), hopper=hopper
    )
    if head_size in HEAD_SIZES:
        return operations
    tell(
        f"head size {head_size} has no Triton attention ({', '.join(map(str, HEAD_SIZES))} have): "
        "torch's takes its place"
    )
    return replace(
        operations,
        attention=attention_reference,
        attention_chunks=torch_operations().attention_chunks,
    )


def torch_operations() -> Operations:
    """The torch references, for every device and dtype. Nothing is fused."""
    return Operations(
        embed=embed_reference,
        linear=linear_reference,
        linear_splits=lambda outputs, inputs: 1,
        whole_linear=lambda x, weight, out: linear_reference(x, weight, out[None]),
        swiglu=swiglu_reference,
        gate=gate_reference,
        attention=attention_reference,
        attention_chunks=lambda tokens: 1,
        add_norm=add_norm_reference,
        draw_tokens=draw_tokens_reference,
    )


def triton_operations(
    table: TileTable, heads: int, head_size: int, *, launch_pdl: bool, hopper: bool = False
) -> Operations:
    """The Triton kernels, cut up as the table says.

    Args:
        hopper: with those that only compute capability 9.0 runs, for 16-bit weights.
    """

    def split_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
        linear(x, weight, out, table.find(LINEAR, *_shape(weight)), launch_pdl=launch_pdl)

    def whole_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
        tiles = table.find(WHOLE_LINEAR, *_shape(weight))
        linear(x, weight, out[None], tiles, launch_pdl=launch_pdl)

    def gated(x: Tensor, weight: Tensor, out: Tensor) -> None:
        tiles = table.find(SWIGLU, *_half_shape(weight))
        swiglu(x, weight, out, tiles, launch_pdl=launch_pdl)

    attention_tiles = table.find(ATTENTION, heads, head_size)
    return Operations(
        embed=partial(embed, launch_pdl=launch_pdl),
        linear=split_linear,
        linear_splits=lambda outputs, inputs: table.find(LINEAR, outputs, inputs).splits(inputs),
        whole_linear=whole_linear,
        swiglu=gated,
        gate=partial(gate, launch_pdl=launch_pdl),
        attention=(
            partial(hopper_attention, tiles=attention_tiles)
            if hopper
            else partial(attention, tiles=attention_tiles, launch_pdl=launch_pdl)
        ),
        attention_chunks=attention_tiles.chunks,
        add_norm=partial(add_norm, launch_pdl=launch_pdl),
        # Positions are of an earlier step: every step starts after the one before it has ended (see
        # `embed`).
        draw_tokens=partial(draw_tokens, early_positions=True),
        fused=fused_products(table) if hopper else None,
    )


def fused_products(table: TileTable) -> FusedProducts:
    """Hopper's products, cut up as the table says."""

    def linear(x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
        fused_linear(x, squares, weight, out, table.find(FUSED_LINEAR, *_shape(weight)), eps=eps)

    def project(
        x: Tensor,
        weight: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        normed: Tensor,
        squares: Tensor,
    ) -> None:
        tiles = table.find(FUSED_PROJECT, *_shape(weight))
        fused_project(x, weight, residual, norm_weight, normed, squares, tiles)

    def swiglu(x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
        tiles = table.find(FUSED_SWIGLU, *_half_shape(weight))
        fused_swiglu(x, squares, weight, out, tiles, eps=eps)

    def head(x: Tensor, squares: Tensor, weight: Tensor, out: Tensor, *, eps: float) -> None:
        tiles = table.find(FUSED_HEAD, *_shape(weight))
        fused_linear(x, squares, weight, out[None], tiles, eps=eps)

    def project_blocks(outputs: int, inputs: int) -> int:
        return -(-outputs // table.find(FUSED_PROJECT, outputs, inputs).outputs)

    return FusedProducts(
        linear=linear,
        linear_splits=lambda outputs, inputs: table.find(FUSED_LINEAR, outputs, inputs).splits,
        project=project,
        project_blocks=project_blocks,
        swiglu=swiglu,
        head=head,
        headroom=HEADROOM,
    )


def _shape(weight: Tensor) -> tuple[int, int]:
    """Outputs and inputs."""
    return weight.shape[0], weight.shape[1]


def _half_shape(weight: Tensor) -> tuple[int, int]:
    """Outputs of each half, and inputs."""
    return weight.shape[0] // 2, weight.shape[1]
