"""How Hopper's products are cut up: the measured table, the rules beside it, and the file that
holds the table.
"""

from pathlib import Path

import pytest
import torch
from tune_kernels import stages_of, write_table

from autoregressive.benchmarks.script import PAPER_MODELS
from autoregressive.models.config import GPT_SHAPES, GPTConfig
from kernels import tiles as tile_tables
from kernels.attention import AttentionTiles
from kernels.hopper.products import SQUARES_BLOCK, FusedTiles, project_exchange
from kernels.hopper.quantized_products import stage_count
from kernels.linear import LinearTiles, SwigluTiles, row_tile
from kernels.operations import MANY_ROWS
from kernels.quantization import PAIRED_INPUTS
from kernels.tiles import (
    ATTENTION,
    FUSED_LINEAR,
    FUSED_PROJECT,
    QUANTIZED_LINEAR,
    QUANTIZED_PROJECT,
    QUANTIZED_SWIGLU,
    SECTIONS,
    TileTable,
    read_table,
    tile_table,
)

MEASURED = Path(tile_tables.__file__).parent / "tiles_sm90.json"
PROGRAM_BYTES = 227 * 1024  # shared memory of a program on compute capability 9.0
CLUSTERS = (1, 2, 4)
FUSED_SECTIONS = ("fused_linear", "fused_project", "fused_swiglu", "fused_head")


def config_of(model: str) -> GPTConfig:
    shape = GPT_SHAPES[model]
    return GPTConfig(dim=shape.dim, n_layer=shape.n_layer, n_head=shape.n_head)


def asked(table: TileTable, config: GPTConfig) -> dict[tuple[str, int, int], FusedTiles]:
    """What a step of a model asks a table for, by section, outputs and inputs."""
    width, ffn, vocabulary = config.dim, config.ffn_dim, config.vocab_size
    keys = [
        ("fused_linear", 3 * width, width),
        ("fused_project", width, width),
        ("fused_project", width, ffn),
        ("fused_swiglu", ffn, width),
        ("fused_head", vocabulary, width),
    ]
    return {
        (section, outputs, inputs): table.find(SECTIONS[section], outputs, inputs)
        for section, outputs, inputs in keys
    }


def check_runs(section: str, inputs: int, tiles: FusedTiles) -> None:
    """Guards what the kernels take for granted, with the most rows that a program has."""
    rows = row_tile(MANY_ROWS)
    outputs = 2 * tiles.outputs if section == "fused_swiglu" else tiles.outputs
    cluster = tiles.splits if section == "fused_project" else 1
    held = tiles.held(inputs, outputs, rows, cluster)
    assert held >= 1, "not one tile fits"
    exchanged = project_exchange(outputs, rows, cluster)
    assert held * (outputs + rows) * tiles.inputs * 2 + exchanged < PROGRAM_BYTES
    assert tiles.tiles(inputs) * tiles.inputs * tiles.splits >= inputs, "inputs are left out"
    assert outputs >= 16 * tiles.warps, "a warp of the matrix product has no outputs"
    if section == "fused_project":
        assert tiles.splits in CLUSTERS
        assert tiles.outputs % SQUARES_BLOCK == 0
    elif section != "fused_linear":
        assert tiles.splits == 1, "what reads the result adds no partial sums"


def test_every_measured_setting_runs() -> None:
    """Fails if an entry of the table does not fit the kernel that it is for, at 64 rows: the tuner
    tries 2 and 16.
    """
    table, seen = read_table(MEASURED), 0
    for section in FUSED_SECTIONS:
        for (_, inputs), tiles in table.measured[section].items():
            check_runs(section, inputs, tiles)
            seen += 1
    assert seen >= 5 * len(PAPER_MODELS)


@pytest.mark.parametrize("model", GPT_SHAPES)
def test_the_rules_settings_run(model: str) -> None:
    """Fails if a model that was not measured asks for more than a program has."""
    for (section, _, inputs), tiles in asked(TileTable(), config_of(model)).items():
        check_runs(section, inputs, tiles)


@pytest.mark.parametrize("model", GPT_SHAPES)
def test_products_of_paired_weights_fit(model: str) -> None:
    """Fails if one tile does not fit beside the cluster's sums, or inputs are left out."""
    table, config = tile_table((9, 0), torch.bfloat16), config_of(model)
    width, ffn = config.dim, config.ffn_dim
    for section, outputs, inputs in (
        (QUANTIZED_LINEAR, 3 * width, width),
        (QUANTIZED_PROJECT, width, width),
        (QUANTIZED_PROJECT, width, ffn),
        (QUANTIZED_SWIGLU, ffn, width),
    ):
        tiles = table.find(section, outputs, inputs)
        assert tiles.inputs == PAIRED_INPUTS
        assert tiles.tiles(inputs) * tiles.inputs * tiles.splits >= inputs
        clusters = CLUSTERS if section is QUANTIZED_PROJECT else (1,)
        assert tiles.splits in (range(1, 8) if section is QUANTIZED_LINEAR else clusters)
        exchanged = project_exchange(tiles.outputs, MANY_ROWS, max(clusters))
        halves = 2 if section is QUANTIZED_SWIGLU else 1
        assert stage_count(tiles, tiles.tiles(inputs), MANY_ROWS, exchanged, halves) >= 1


@pytest.mark.parametrize("model", PAPER_MODELS)
def test_measured_settings_are_found(model: str) -> None:
    """Fails if a step asks by another key than the tuner writes: it would run by the rules, and
    nothing would say so.
    """
    table, config = tile_table((9, 0), torch.bfloat16), config_of(model)
    found = asked(table, config)
    for (section, outputs, inputs), tiles in found.items():
        assert tiles is table.measured[section][outputs, inputs]
    stages = stages_of(config, hopper=True)
    assert {
        (stage.section, *stage.key) for stage in stages if stage.section in FUSED_SECTIONS
    } == set(found)


@pytest.mark.parametrize("outputs", [64, 200, 768, 1280, 3200, 9600, 16384])
@pytest.mark.parametrize("inputs", [64, 200, 256, 512, 768, 1336, 3200, 8704])
def test_the_rule_splits_no_further_than_pays(outputs: int, inputs: int) -> None:
    """Fails if no cluster has such a size, or inputs are split below two tiles a program or though
    every multiprocessor has a program.
    """
    tiles = TileTable().find(FUSED_PROJECT, outputs, inputs)
    check_runs("fused_project", inputs, tiles)
    if tiles.splits > 1:
        assert tiles.tiles(inputs) >= 2
        assert outputs // tiles.outputs * (tiles.splits // 2) < 132


@pytest.mark.parametrize(
    ("outputs", "inputs", "tiles"),
    [
        (3200, 4352, FusedTiles(outputs=64, inputs=128, splits=4, stages=5, warps=4)),
        (9600, 3200, FusedTiles(outputs=64, inputs=128, splits=1, stages=5, warps=4)),
        (768, 384, FusedTiles(outputs=64, inputs=64, splits=2, stages=8, warps=4)),
    ],
)
def test_the_rule_fills_the_multiprocessors(outputs: int, inputs: int, tiles: FusedTiles) -> None:
    """Fails if a model that was not measured runs by fewer programs or narrower tiles than it
    could: GPT-3B took 1.8 times as long by them.
    """
    assert TileTable().find(FUSED_PROJECT, outputs, inputs) == tiles


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Fails if a section is written and not read, or read and not written, or a setting ends up
    under another shape.
    """
    table = TileTable(
        {
            "linear": {(96, 32): LinearTiles(64, 32, 1, early=1, stages=1, warps=4)},
            "whole_linear": {(100, 32): LinearTiles(64, 32, 1, early=1, stages=1, warps=8)},
            "swiglu": {(64, 32): SwigluTiles(32, 64, early=1, stages=3, warps=4)},
            "attention": {
                (12, 64): AttentionTiles(64, 1),
                (32, 100): AttentionTiles(32, 1, registers=128),
            },
            "fused_linear": {
                (96, 32): FusedTiles(64, 64, 3, 2, 4),
                (32, 96): FusedTiles(64, 64, 5, 2, 4),
            },
            "fused_project": {
                (32, 32): FusedTiles(64, 128, 4, 3, 4),
                (32, 64): FusedTiles(128, 64, 8, 1, 8),
            },
            "fused_swiglu": {(64, 32): FusedTiles(32, 64, 1, 8, 4)},
            "fused_head": {(100, 32): FusedTiles(64, 64, 1, 7, 4)},
            "quantized_linear": {(96, 128): FusedTiles(64, 128, 2, 6, 4)},
            "quantized_project": {(32, 128): FusedTiles(64, 128, 4, 6, 4)},
            "quantized_swiglu": {(64, 128): FusedTiles(32, 128, 1, 6, 4)},
        }
    )
    assert set(table.measured) == set(SECTIONS), "a section is not written here"
    write_table(table, tmp_path / "table.json", "a GPU")
    assert read_table(tmp_path / "table.json") == table


def test_a_tuning_run_keeps_what_it_does_not_tune(tmp_path: Path) -> None:
    """Fails if the shipped table comes back changed when another model's settings are
    added to it.
    """
    write_table(read_table(MEASURED), tmp_path / "table.json", "a GPU")
    written, shipped = (
        path.read_text().splitlines() for path in (tmp_path / "table.json", MEASURED)
    )
    assert [line for line in written if "measured_on" not in line] == [
        line for line in shipped if "measured_on" not in line
    ]


def test_a_table_without_fused_products_leaves_them_to_the_rules(tmp_path: Path) -> None:
    """Fails if the table of another architecture, which has no such section, cannot be read."""
    old = TileTable({"linear": {(96, 32): LinearTiles(64, 32, 1, early=1, stages=1, warps=4)}})
    write_table(old, tmp_path / "table.json", "a GPU")
    read = read_table(tmp_path / "table.json")
    assert read == old
    assert read.find(FUSED_LINEAR, 96, 32) == TileTable().find(FUSED_LINEAR, 96, 32)


def test_tables_are_of_16_bit_weights() -> None:
    """Fails if float32 weights, twice as large, are cut up as measured for others."""
    assert tile_table((9, 0), torch.float32).measured == {}
    assert (
        tile_table((9, 0), torch.float16)
        == tile_table((9, 0), torch.bfloat16)
        == read_table(MEASURED)
    )


def test_attention_is_cut_up_as_with_the_nearest_number_of_heads() -> None:
    """Fails if a model that was not measured, of a head size that was, gets the rule's tiles, or
    those of the farther model.
    """
    few, many = AttentionTiles(64, 1), AttentionTiles(128, 2)
    table = TileTable(
        {"attention": {(12, 64): few, (24, 64): many, (32, 100): AttentionTiles(32, 1)}}
    )
    assert [table.find(ATTENTION, heads, 64) for heads in (3, 12, 18, 19, 40)] == [
        few,
        few,
        few,
        many,
        many,
    ]
    assert table.find(ATTENTION, 12, 128) == TileTable().find(ATTENTION, 12, 128)
