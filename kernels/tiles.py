"""How each product is cut up: settings measured per operation, shape and architecture, and rules
for shapes not measured.

The tables (`tiles_sm90.json`, ...) are written by scripts/benchmarks/tune_kernels.py. Nothing is
tuned at run time: tiles that depend on timing would change the last bits from run to run, and slow
the start. Settings do not depend on the number of rows, so neither does the order of a sum.
"""

import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.attention import AttentionTiles
from kernels.hopper.products import FusedTiles
from kernels.linear import LinearTiles
from kernels.swiglu import SwigluTiles

_FOLDER = Path(__file__).parent
# 8.7 has more, and does with this
_LITTLE_SHARED_MEMORY = (
    (8, 6),
    (8, 7),
    (8, 9),
    (12, 0),
    (12, 1),
)


@dataclass(frozen=True)
class TileTable:
    """The settings for one architecture and dtype."""

    # (outputs, inputs), partial sums allowed
    linear: dict[tuple[int, int], LinearTiles] = field(default_factory=dict)
    # the same in one piece
    whole_linear: dict[tuple[int, int], LinearTiles] = field(default_factory=dict)
    swiglu: dict[tuple[int, int], SwigluTiles] = field(default_factory=dict)  # (hidden, inputs)
    # (heads, head size)
    attention: dict[tuple[int, int], AttentionTiles] = field(default_factory=dict)
    # Of Hopper's products (kernels/hopper/products.py), as above.
    fused_linear: dict[tuple[int, int], FusedTiles] = field(default_factory=dict)
    fused_project: dict[tuple[int, int], FusedTiles] = field(default_factory=dict)
    fused_swiglu: dict[tuple[int, int], FusedTiles] = field(default_factory=dict)
    fused_head: dict[tuple[int, int], FusedTiles] = field(default_factory=dict)
    shared_memory: int = 163 * 1024  # bytes that a program may have; the rules keep to it

    def linear_tiles(self, outputs: int, inputs: int, itemsize: int) -> LinearTiles:
        """For a product whose consumer adds up partial sums."""
        return self.linear.get((outputs, inputs)) or default_linear_tiles(inputs, itemsize)

    def whole_linear_tiles(self, outputs: int, inputs: int, itemsize: int) -> LinearTiles:
        """For a product whose consumer wants it in one piece."""
        return self.whole_linear.get((outputs, inputs)) or default_whole_linear_tiles(
            inputs, itemsize, self.shared_memory
        )

    def swiglu_tiles(self, hidden: int, inputs: int, itemsize: int) -> SwigluTiles:
        """For the gated product."""
        return self.swiglu.get((hidden, inputs)) or default_swiglu_tiles(
            inputs, itemsize, self.shared_memory
        )

    def attention_tiles(self, heads: int, head_size: int, itemsize: int) -> AttentionTiles:
        """For a model's heads: of those measured of this size, the nearest in number, which decides
        how many programs there are.
        """
        measured = [known for known in self.attention if known[1] == head_size]
        if not measured:
            return default_attention_tiles(head_size, itemsize)
        return self.attention[min(measured, key=lambda known: (abs(known[0] - heads), known))]

    def fused_linear_tiles(self, outputs: int, inputs: int) -> FusedTiles:
        """For a product whose consumer adds up partial sums."""
        return self.fused_linear.get((outputs, inputs)) or default_fused_tiles(outputs, inputs)

    def fused_project_tiles(self, outputs: int, inputs: int) -> FusedTiles:
        """For a product that adds itself to the residual stream."""
        return self.fused_project.get((outputs, inputs)) or default_fused_tiles(outputs, inputs)

    def fused_swiglu_tiles(self, hidden: int, inputs: int) -> FusedTiles:
        """For the gated product."""
        return self.fused_swiglu.get((hidden, inputs)) or FusedTiles(
            outputs=32, inputs=64, splits=1, stages=8, warps=4
        )

    def fused_head_tiles(self, outputs: int, inputs: int) -> FusedTiles:
        """For the last product, in one piece."""
        return self.fused_head.get((outputs, inputs)) or FusedTiles(
            outputs=64, inputs=64, splits=1, stages=8, warps=4
        )


@cache
def tile_table(capability: tuple[int, int], dtype: torch.dtype) -> TileTable:
    """The table for an architecture and dtype: empty where none was measured, so that the rules
    below hold.

    Only 16-bit weights are measured; the tables hold for bf16 and fp16 alike.
    """
    path = _FOLDER / f"tiles_sm{capability[0]}{capability[1]}.json"
    # 8.6, 8.9 and 12.0 have 99 KiB a program; 8.0 has 163 and 9.0 and 10.0 have 227: the rules'
    # tiles of these are the same.
    shared_memory = (99 if capability in _LITTLE_SHARED_MEMORY else 163) * 1024
    if dtype.itemsize != 2 or not path.exists():
        return TileTable(shared_memory=shared_memory)
    return replace(read_table(path), shared_memory=shared_memory)


def read_table(path: Path) -> TileTable:
    """The table in a file that scripts/benchmarks/tune_kernels.py wrote."""
    stored = json.loads(path.read_text())
    sections: dict[str, Any] = {
        name: _read_settings(name, stored.get(name, [])) for name in SECTIONS
    }
    return TileTable(**sections)


# What the settings of each section of a table are made of.
SECTIONS: dict[str, type] = {
    "linear": LinearTiles,
    "whole_linear": LinearTiles,
    "swiglu": SwigluTiles,
    "attention": AttentionTiles,
    "fused_linear": FusedTiles,
    "fused_project": FusedTiles,
    "fused_swiglu": FusedTiles,
    "fused_head": FusedTiles,
}


def key_names(section: str) -> tuple[str, str]:
    """What a setting of a section is found by."""
    return ("heads", "head_size") if section == "attention" else ("outputs", "inputs")


def _read_settings(section: str, entries: list[dict]) -> dict:
    """A section's settings by (outputs, inputs), of attention by (heads, head size)."""
    first, second = key_names(section)
    return {(entry[first], entry[second]): SECTIONS[section](**entry["tiles"]) for entry in entries}


def _tile_of(inputs: int, itemsize: int, shared_memory: int) -> int:
    """Inputs of a tile: 512 bytes of a 16-bit weight's row; fewer for narrow models, little memory,
    and without a matrix unit.
    """
    largest = 64 if itemsize != 2 else 256 if shared_memory >= 160 * 1024 else 128
    while largest > 32 and largest > inputs:
        largest //= 2
    return largest


def default_linear_tiles(inputs: int, itemsize: int) -> LinearTiles:
    """One tile of weights a program, 32 KiB of 64 outputs, as many splits as that takes."""
    tile = _tile_of(inputs, itemsize, shared_memory=160 * 1024)  # 64 KiB with the most rows
    return LinearTiles(outputs=64, inputs=tile, tiles=1, early=1, stages=1, warps=4)


def default_whole_linear_tiles(inputs: int, itemsize: int, shared_memory: int) -> LinearTiles:
    """A tile early, the rest through a pipeline of three."""
    tile = _tile_of(inputs, itemsize, shared_memory)
    return LinearTiles(
        outputs=64, inputs=tile, tiles=-(-inputs // tile), early=1, stages=3, warps=4
    )


def default_swiglu_tiles(inputs: int, itemsize: int, shared_memory: int) -> SwigluTiles:
    """Thirty-two outputs of each half, a tile early, the rest through a pipeline of three."""
    return SwigluTiles(
        outputs=32, inputs=_tile_of(inputs, itemsize, shared_memory), early=1, stages=3, warps=4
    )


def default_fused_tiles(outputs: int, inputs: int) -> FusedTiles:
    """Sixty-four outputs a program, and splits enough for a hundred programs as long as each has
    two tiles.
    """
    splits = 1
    while splits < 8 and outputs // 64 * splits < 100 and inputs >= 256 * splits:
        splits *= 2
    return FusedTiles(outputs=64, inputs=64, splits=splits, stages=8, warps=4)


def default_attention_tiles(head_size: int, itemsize: int) -> AttentionTiles:
    """A chunk of 16 KiB of keys and values a warp: many small programs, none of which waits for
    another warp.
    """
    return AttentionTiles(chunk=32 if head_size * itemsize <= 256 else 16, warps=1)
