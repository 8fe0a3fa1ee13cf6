"""How each product is cut up: settings measured per operation, shape and architecture, and rules
for shapes not measured.

The tables (`tiles_sm90.json`, ...) are written by scripts/benchmarks/tune_kernels.py. Nothing is
tuned at run time: tiles that depend on timing would change the last bits from run to run, and slow
the start. Settings do not depend on the number of rows, so neither does the order of a sum.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from kernels.attention import AttentionTiles
from kernels.hopper.products import MULTIPROCESSORS, FusedTiles
from kernels.linear import LinearTiles, SwigluTiles
from kernels.quantization import PAIRED_INPUTS, Weights

# 8.7 has more, and does with this
_LITTLE_SHARED_MEMORY = (
    (8, 6),
    (8, 7),
    (8, 9),
    (12, 0),
    (12, 1),
)
Tiles = TypeVar("Tiles")


@dataclass(frozen=True)
class Section(Generic[Tiles]):
    """One kind of setting in a table."""

    name: str
    tiles: type[Tiles]
    rule: Callable[[int, int, "TileTable"], Tiles]  # of both keys, for what was not measured
    keys: tuple[str, str] = ("outputs", "inputs")  # what a setting is found by
    # A setting of the nearest first key serves, too, if the second one is the same.
    nearest: bool = False
    halves: int = 1  # of the weights, one above the other; the key has the outputs of one


def _input_tile(inputs: int, itemsize: int, shared_memory: int) -> int:
    """Inputs of a tile: 512 bytes of a 16-bit weight's row. Narrow models, little memory and
    weights without a matrix unit get fewer.
    """
    largest = 64 if itemsize != 2 else 256 if shared_memory >= 160 * 1024 else 128
    while largest > 32 and largest > inputs:
        largest //= 2
    return largest


def linear_rule(outputs: int, inputs: int, table: "TileTable") -> LinearTiles:
    """Gives a program one tile of weights: 32 KiB of 64 outputs. Each tile is a split."""
    # every GPU has the 64 KiB that this takes with the most rows
    tile = _input_tile(inputs, table.itemsize, shared_memory=160 * 1024)
    return LinearTiles(outputs=64, inputs=tile, tiles=1, early=1, stages=1, warps=4)


def whole_linear_rule(outputs: int, inputs: int, table: "TileTable") -> LinearTiles:
    """Loads one tile early, and the rest through a pipeline of three."""
    tile = _input_tile(inputs, table.itemsize, table.shared_memory)
    tiles = -(-inputs // tile)
    return LinearTiles(outputs=64, inputs=tile, tiles=tiles, early=1, stages=3, warps=4)


def swiglu_rule(hidden: int, inputs: int, table: "TileTable") -> SwigluTiles:
    """Gives a program thirty-two outputs of each half. Loads one tile early, and the rest through a
    pipeline of three.
    """
    tile = _input_tile(inputs, table.itemsize, table.shared_memory)
    return SwigluTiles(outputs=32, inputs=tile, early=1, stages=3, warps=4)


def attention_rule(heads: int, head_size: int, table: "TileTable") -> AttentionTiles:
    """Gives a warp a chunk of 16 KiB of keys and values. There are many small programs, none of
    which waits for another warp.
    """
    return AttentionTiles(chunk=32 if head_size * table.itemsize <= 256 else 16, warps=1)


def fused_rule(outputs: int, inputs: int, table: "TileTable") -> FusedTiles:
    """Gives a program sixty-four outputs, and splits the inputs until there is a program for every
    multiprocessor, as long as each has 128 of them. A tile has 128 inputs where each program has
    two such tiles, else 64.
    """
    splits = 1
    while splits < 4 and outputs // 64 * splits < MULTIPROCESSORS and inputs >= 256 * splits:
        splits *= 2
    tile_inputs, stages = (128, 5) if inputs >= 256 * splits else (64, 8)
    return FusedTiles(outputs=64, inputs=tile_inputs, splits=splits, stages=stages, warps=4)


def _unsplit(outputs: int) -> Callable[[int, int, "TileTable"], FusedTiles]:
    """The rule of products whose result nothing adds up."""
    return lambda *_: FusedTiles(outputs, inputs=128, splits=1, stages=4, warps=4)


def quantized_rule(outputs: int, inputs: int, table: "TileTable") -> FusedTiles:
    """As `fused_rule`, by tiles of a block of paired inputs."""
    splits, least = 1, 4 * PAIRED_INPUTS
    while splits < 4 and outputs // 64 * splits < MULTIPROCESSORS and inputs >= least * splits:
        splits *= 2
    return FusedTiles(outputs=64, inputs=PAIRED_INPUTS, splits=splits, stages=8, warps=4)


def quantized_swiglu_rule(hidden: int, inputs: int, table: "TileTable") -> FusedTiles:
    """Gives a program thirty-two outputs of each half, over all inputs."""
    return FusedTiles(outputs=32, inputs=PAIRED_INPUTS, splits=1, stages=8, warps=4)


LINEAR = Section("linear", LinearTiles, linear_rule)  # its consumer adds up partial sums
WHOLE_LINEAR = Section("whole_linear", LinearTiles, whole_linear_rule)  # in one piece
SWIGLU = Section("swiglu", SwigluTiles, swiglu_rule, halves=2)
ATTENTION = Section(
    "attention", AttentionTiles, attention_rule, keys=("heads", "head_size"), nearest=True
)
# Of Hopper's products (kernels/hopper/products.py), as above.
FUSED_LINEAR = Section("fused_linear", FusedTiles, fused_rule)
FUSED_PROJECT = Section("fused_project", FusedTiles, fused_rule)
FUSED_SWIGLU = Section("fused_swiglu", FusedTiles, _unsplit(32), halves=2)
FUSED_HEAD = Section("fused_head", FusedTiles, _unsplit(64))
# Of those by weights of a byte (kernels/hopper/quantized_products.py).
QUANTIZED_LINEAR = Section("quantized_linear", FusedTiles, quantized_rule)
QUANTIZED_PROJECT = Section("quantized_project", FusedTiles, quantized_rule)
QUANTIZED_SWIGLU = Section("quantized_swiglu", FusedTiles, quantized_swiglu_rule, halves=2)
SECTIONS: dict[str, Section[Any]] = {
    section.name: section
    for section in (
        LINEAR,
        WHOLE_LINEAR,
        SWIGLU,
        ATTENTION,
        FUSED_LINEAR,
        FUSED_PROJECT,
        FUSED_SWIGLU,
        FUSED_HEAD,
        QUANTIZED_LINEAR,
        QUANTIZED_PROJECT,
        QUANTIZED_SWIGLU,
    )
}


@dataclass(frozen=True)
class TileTable:
    """The settings for one architecture and dtype."""

    # by a section's name, then by the two keys of the section
    measured: Mapping[str, Mapping[tuple[int, int], Any]] = field(default_factory=dict)
    itemsize: int = 2  # bytes of a weight, and of a key
    shared_memory: int = 163 * 1024  # bytes that a program of kernels for all GPUs may have

    def find(self, section: Section[Tiles], first: int, second: int) -> Tiles:
        """The setting for the two keys of a section: the measured one, else what its rule says."""
        measured = self.measured.get(section.name, {})
        known = [key for key in measured if key == (first, second)]
        if section.nearest:  # how many heads there are decides how many programs there are
            known = [key for key in measured if key[1] == second]
        if not known:
            return section.rule(first, second, self)
        return measured[min(known, key=lambda key: (abs(key[0] - first), key))]

    def of_weight(self, section: Section[Tiles], weight: Weights) -> Tiles:
        """The setting for a product by weights [outputs, inputs]."""
        outputs, inputs = weight.shape
        return self.find(section, outputs // section.halves, inputs)

    def with_setting(self, section: str, key: tuple[int, int], tiles: object) -> "TileTable":
        """The table with one setting changed."""
        changed = {**self.measured.get(section, {}), key: tiles}
        return replace(self, measured={**self.measured, section: changed})


@cache
def tile_table(capability: tuple[int, int], dtype: torch.dtype) -> TileTable:
    """The table for an architecture and dtype. It is empty where none was measured; the rules hold
    then.

    Only 16-bit weights are measured; the tables hold for bf16 and fp16 alike.
    """
    path = Path(__file__).parent / f"tiles_sm{capability[0]}{capability[1]}.json"
    # 8.6, 8.9 and 12.0 have 99 KiB a program; 8.0 has 163 and 9.0 and 10.0 have 227: the rules'
    # tiles of these are the same.
    shared_memory = (99 if capability in _LITTLE_SHARED_MEMORY else 163) * 1024
    measured = {} if dtype.itemsize != 2 or not path.exists() else read_table(path).measured
    return TileTable(measured, dtype.itemsize, shared_memory)


def read_table(path: Path) -> TileTable:
    """The table in a file that scripts/benchmarks/tune_kernels.py wrote."""
    stored = json.loads(path.read_text())
    return TileTable(
        {
            name: {
                (entry[section.keys[0]], entry[section.keys[1]]): section.tiles(**entry["tiles"])
                for entry in stored[name]
            }
            for name, section in SECTIONS.items()
            if name in stored
        }
    )
