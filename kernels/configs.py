"""How each product is cut up: settings measured per operation, shape and architecture, and rules for shapes not measured.

The tables (`tiles_sm90.json`, ...) are written by scripts/tune_kernels.py. Nothing is tuned at run time: tiles that depend on
timing would change the last bits from run to run, and slow the start. Settings do not depend on the number of rows, so neither does
the order of a sum.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from kernels.attention import AttentionTiles
from kernels.linear import LinearTiles
from kernels.swiglu import SwigluTiles

_FOLDER = Path(__file__).parent
_LITTLE_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))  # 8.7 has more, and does with this


@dataclass(frozen=True)
class TileTable:
    """The settings for one architecture and dtype."""

    linear: dict[tuple[int, int], LinearTiles]  # (outputs, inputs), partial sums allowed
    whole_linear: dict[tuple[int, int], LinearTiles]  # the same in one piece
    swiglu: dict[tuple[int, int], SwigluTiles]  # (hidden, inputs)
    attention: dict[int, AttentionTiles]  # head size
    shared_memory: int = 163 * 1024  # bytes that a program may have; the rules keep to it

    def linear_tiles(self, outputs: int, inputs: int, itemsize: int) -> LinearTiles:
        """For a product whose consumer adds up partial sums."""
        return self.linear.get((outputs, inputs)) or default_linear_tiles(inputs, itemsize)

    def whole_linear_tiles(self, outputs: int, inputs: int, itemsize: int) -> LinearTiles:
        """For a product whose consumer wants it in one piece."""
        return self.whole_linear.get((outputs, inputs)) or default_whole_linear_tiles(inputs, itemsize, self.shared_memory)

    def swiglu_tiles(self, hidden: int, inputs: int, itemsize: int) -> SwigluTiles:
        """For the gated product."""
        return self.swiglu.get((hidden, inputs)) or default_swiglu_tiles(inputs, itemsize, self.shared_memory)

    def attention_tiles(self, head_size: int, itemsize: int) -> AttentionTiles:
        """For a head size."""
        return self.attention.get(head_size) or default_attention_tiles(head_size, itemsize)


@cache
def tile_table(capability: tuple[int, int], dtype: torch.dtype) -> TileTable:
    """The table for an architecture and dtype: empty where none was measured, so that the rules below hold.

    Only 16-bit weights are measured; the tables hold for bf16 and fp16 alike.
    """
    path = _FOLDER / f"tiles_sm{capability[0]}{capability[1]}.json"
    # 8.6, 8.9 and 12.0 have 99 KiB a program; 8.0 has 163 and 9.0 and 10.0 have 227, of which the rules need 160.
    shared_memory = (99 if capability in _LITTLE_SHARED_MEMORY else 163) * 1024
    if dtype.itemsize != 2 or not path.exists():
        return TileTable({}, {}, {}, {}, shared_memory)
    return read_table(path)


def read_table(path: Path) -> TileTable:
    """The table in a file that scripts/tune_kernels.py wrote."""
    stored = json.loads(path.read_text())

    def shape(entry: dict) -> tuple[int, int]:
        return entry["outputs"], entry["inputs"]

    return TileTable(
        linear={shape(entry): LinearTiles(**entry["tiles"]) for entry in stored["linear"]},
        whole_linear={shape(entry): LinearTiles(**entry["tiles"]) for entry in stored["whole_linear"]},
        swiglu={shape(entry): SwigluTiles(**entry["tiles"]) for entry in stored["swiglu"]},
        attention={entry["head_size"]: AttentionTiles(**entry["tiles"]) for entry in stored["attention"]},
    )


def _tile_of(inputs: int, itemsize: int, shared_memory: int) -> int:
    """Inputs of a tile: 512 bytes of a 16-bit weight's row; fewer for narrow models, little memory, and without a matrix unit."""
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
    return LinearTiles(outputs=64, inputs=tile, tiles=-(-inputs // tile), early=1, stages=3, warps=4)


def default_swiglu_tiles(inputs: int, itemsize: int, shared_memory: int) -> SwigluTiles:
    """Thirty-two outputs of each half, a tile early, the rest through a pipeline of three."""
    return SwigluTiles(outputs=32, inputs=_tile_of(inputs, itemsize, shared_memory), early=1, stages=3, warps=4)


def default_attention_tiles(head_size: int, itemsize: int) -> AttentionTiles:
    """A chunk of 16 KiB of keys and values a warp: many small programs, none of which waits for another warp."""
    return AttentionTiles(chunk=32 if head_size * itemsize <= 256 else 16, warps=1)
