"""What tune_kernels.py tries: for each product and for the attention, the ways to cut it up that
may pay.
"""

from collections.abc import Iterator, Sequence
from itertools import product

from kernels.attention import AttentionTiles
from kernels.hopper.products import FusedTiles
from kernels.linear import LinearTiles, SwigluTiles
from kernels.quantization import PAIRED_INPUTS

_SHARED_MEMORY = 220 * 1024  # bytes of a multiprocessor that programs may hold weights in
_ROWS = 16  # of a program, where shared memory is reckoned
_BLOCKS = ((64, 4), (128, 4), (128, 8))  # outputs of a fused program, and its warps


def attention_candidates(head_size: int, hopper: bool) -> Iterator[AttentionTiles]:
    """Candidates for the attention, in chunks of 16 to 128 tokens."""
    for chunk, warps in (
        (64, 1),
        (32, 1),
        (64, 2),
        (128, 2),
        (128, 4),
        (128, 1) if hopper else (16, 1),
    ):
        if hopper or chunk * head_size <= 64 * 128 * warps:
            yield AttentionTiles(chunk, warps)
            if warps == 1 and not hopper:
                yield AttentionTiles(chunk, warps, registers=128)


def fused_candidates(outputs: int, inputs: int, most_splits: int) -> Iterator[FusedTiles]:
    """Splits that give each multiprocessor a third of a program to three, and 32 to 170 KiB a
    program on their way.
    """
    splits_tried = (1, 2, 4) if most_splits == 4 else range(1, most_splits + 1)
    for (tile_outputs, warps), tile, splits in product(_BLOCKS, (64, 128, 256), splits_tried):
        tiles = -(-inputs // (tile * splits))
        programs = outputs // tile_outputs * splits
        if 20 <= programs <= 420 and tiles * tile * splits <= 1.25 * inputs:
            for stages in _stages(tiles, (tile_outputs + _ROWS) * tile * 2):
                yield FusedTiles(tile_outputs, tile, splits, stages, warps)


def fused_whole_candidates(
    outputs: int, inputs: int, tiles: Sequence[int], matrices: int
) -> Iterator[FusedTiles]:
    """Candidates for a fused product without splits, which are for any number of outputs.

    Args:
        tiles: numbers of inputs of a tile.
        matrices: 2 for the gated product, whose tile has as many outputs of each of its halves.
    """
    for (tile_outputs, warps), tile in product(_BLOCKS, tiles):
        for stages in _stages(-(-inputs // tile), (tile_outputs + _ROWS) * tile * 2):
            yield FusedTiles(tile_outputs // matrices, tile, 1, stages, warps)


def _stages(tiles: int, tile_bytes: int) -> list[int]:
    """How many tiles may be on their way at once."""
    return sorted(
        {min(tiles, size * 1024 // tile_bytes) for size in (48, 64, 80, 100, 130, 170)} - {0}
    )


def quantized_candidates(
    outputs: int, inputs: int, splits: Sequence[int], matrices: int = 1
) -> Iterator[FusedTiles]:
    """Candidates for a product by weights of a byte, as of `fused_candidates`.

    Args:
        splits: programs along the inputs.
        matrices: as of `fused_whole_candidates`.
    """
    for (tile_outputs, warps), parts in product(_BLOCKS, splits):
        tiles = -(-inputs // (PAIRED_INPUTS * parts))
        programs = outputs * matrices // tile_outputs * parts
        if (programs <= 420 or parts == 1) and tiles * parts * PAIRED_INPUTS <= 1.25 * inputs:
            tile_bytes = (tile_outputs + 2 * _ROWS) * PAIRED_INPUTS
            for stages in _stages(tiles, tile_bytes):
                yield FusedTiles(tile_outputs // matrices, PAIRED_INPUTS, parts, stages, warps)


def linear_candidates(outputs: int, inputs: int) -> Iterator[LinearTiles]:
    """Splits that give each multiprocessor one to six programs; all weights early, or a few and a
    pipeline.
    """
    for tile, tiles, warps in (
        (256, 1, 4),
        (256, 2, 4),
        (512, 1, 8),
        (128, 2, 4),
        (128, 3, 4),
        (128, 5, 4),
    ):
        if 24 <= outputs / 64 * -(-inputs // (tile * tiles)) <= 1200:
            yield LinearTiles(64, tile, tiles, early=tiles, stages=1, warps=warps)
    for tile, tiles, warps in ((256, 1, 8), (256, 1, 4), (128, 2, 8), (128, 3, 8), (256, 2, 8)):
        if 24 <= outputs / 128 * -(-inputs // (tile * tiles)) <= 600 and outputs % 128 == 0:
            yield LinearTiles(128, tile, tiles, early=tiles, stages=1, warps=warps)
    pipelines = ((64, 2, 5), (64, 4, 4), (128, 2, 3), (128, 1, 3), (64, 0, 6), (128, 3, 3))
    for splits, (tile, early, stages) in product((1, 2, 3, 4, 5, 7), pipelines):
        tiles = -(-inputs // (tile * splits))
        if 48 <= outputs / 64 * splits <= 400 and tiles > early + 1:
            yield LinearTiles(64, tile, tiles, early, stages, warps=4)


def swiglu_candidates(hidden: int, inputs: int) -> Iterator[SwigluTiles]:
    """Candidates for the gated product, with few or many tiles early."""
    for tile in (256, 128, 64):
        whole = -(-inputs // tile)
        for early, stages in (
            (whole, 1),
            (4, 3),
            (6, 3),
            (2, 5),
            (3, 4),
            (0, 3),
            (0, 5),
            (1, 4),
            (8, 3),
        ):
            held = 64 * tile * 2 * (early + (stages if early < whole else 0))
            if (
                early <= whole
                and held <= _SHARED_MEMORY * 0.8
                and not (0 < whole - early < stages - 1)
            ):
                yield SwigluTiles(32, tile, early, stages, warps=4)


def whole_candidates(vocabulary: int, inputs: int) -> Iterator[LinearTiles]:
    """Candidates for the head, whose inputs are not split; they use a pipeline."""
    for tile, early, stages in (
        (256, 1, 3),
        (128, 2, 4),
        (128, 0, 5),
        (64, 4, 5),
        (64, 0, 8),
        (128, 4, 3),
        (64, 2, 5),
    ):
        tiles = -(-inputs // tile)
        if tiles > early:
            yield LinearTiles(64, tile, tiles, early, stages, warps=4)
