"""Mistakes on the scripts' command lines: each is refused in one line before any work begins."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import bench_decode
import bench_kernels
import profile_step
import pytest
import torch
import tune_kernels
from refusals import refused

from autoregressive.benchmarks import published_report, speedup
from autoregressive.benchmarks.script import (
    PAPER_MODELS,
    give_figures,
    listed,
    models_for,
    names,
    output_file,
    row_count,
    whole_number,
)
from autoregressive.benchmarks.service import authorization
from autoregressive.cli.command import OneLineParser
from autoregressive.errors import UserError
from autoregressive.models.config import GPTConfig
from kernels.attention import AttentionTiles
from kernels.tiles import TileTable

ROOT = Path(__file__).resolve().parents[2]

# Script -> where its long work begins; flags that it needs here, so that nothing but the case's own
# mistake is one.
BEGINS = {
    "bench_decode": ("measure_all", ["--models", "GPT-demo"]),
    "bench_kernels": ("measure_model", []),
    "bench_loading": ("measure", []),
    "bench_pixels": ("measure", []),
    "check_lookahead": ("check", []),
    "evaluate": ("open_samples", ["samples.npz", "reference.npz"]),
    "evaluate_demo": ("load_sprites", []),
    "quality_gate": ("compare", ["--quantization", "int8"]),
    "profile_step": ("measure", ["--gpt-model", "GPT-demo"]),
    "speedup_table": ("run_method", ["--models", "GPT-demo"]),
    "train_demo": ("load_sprites", []),
    "tune_kernels": ("tune", []),
    "verify_published": ("verify", ["--models", "GPT-demo"]),
}
# The modules that do the work of scripts which only read their flags.
WORKERS = {"speedup_table": speedup, "verify_published": published_report}
# Tests of their own have their mistakes.
WITHOUT_WORK = {
    "bench_http",
    "bench_overhead",
    "bench_serve",
    "convert_checkpoint",
    "download_models",
    "ray_data_bulk",  # an example, which needs Ray
    "vllm_peer",
}

TILES = AttentionTiles(64, 1)
NEEDS_A_GPU = {"bench_kernels", "tune_kernels"}
WRITE_FIGURES = sorted(set(BEGINS) - {"speedup_table", "train_demo"})


def run(script: str, *typed: str) -> None:
    """What the script does with a command line, on a CPU where it can."""
    device = [] if script in NEEDS_A_GPU else ["--device", "cpu"]
    importlib.import_module(script).main([*BEGINS[script][1], *device, *typed])


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work that begins is a failure of the test, not minutes of waiting; threads are as before
    afterwards.
    """

    def begin(*_: object, **__: object) -> NoReturn:
        raise AssertionError("work began")

    for script, (function, _) in BEGINS.items():
        module = WORKERS.get(script) or importlib.import_module(script)
        monkeypatch.setattr(module, function, begin)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_script_is_known() -> None:
    """Fails if a script is added whose mistakes no test refuses."""
    scripts = {
        path.stem
        for path in (ROOT / "scripts").rglob("*.py")
        if "run_command(main)" in path.read_text()
    }
    assert scripts == set(BEGINS) | WITHOUT_WORK


@pytest.mark.parametrize("script", sorted(set(BEGINS) - NEEDS_A_GPU))
def test_without_a_mistake_the_work_begins(script: str, tmp_path: Path) -> None:
    """Fails if a script refuses everything, for then it would refuse the mistakes below too."""
    folders = {"train_demo": ["--run-dir", "--output-dir"], "speedup_table": ["--output-dir"]}
    flags = folders.get(script, ["--output"])
    with pytest.raises(AssertionError, match="work began"):
        run(
            script,
            *[
                word
                for flag in flags
                for word in (flag, str(tmp_path / ("x.json" if flag == "--output" else "folder")))
            ],
        )
    assert not (tmp_path / "x.json").exists()


def test_steps_are_measured_with_one_cpu_thread() -> None:
    """Fails if threads spin beside the steps that are timed."""
    torch.set_num_threads(3)
    with pytest.raises(AssertionError, match="work began"):
        run("bench_decode")
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("script", WRITE_FIGURES)
@pytest.mark.parametrize("name", ["missing/x.json", "folder.json", "x.txt"])
def test_a_file_that_cannot_be_written_is_refused(script: str, name: str, tmp_path: Path) -> None:
    """Fails if the figures of minutes are lost because there was no place for them from
    the start.
    """
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="--output"):
        run(script, "--output", str(tmp_path / name))
    assert os.listdir(tmp_path) == ["folder.json"]


MISTAKES = [
    ("bench_decode", ["--image-size", "100"], "must be 128 for GPT-demo"),
    (
        "bench_decode",
        ["--models", "GPT-demo,GPT-B", "--image-size", "128"],
        "must be 256, 384 or 512 for GPT-B",
    ),
    ("bench_decode", ["--image-size", "0"], "--image-size 0"),
    ("bench_decode", ["--rows", "2,4", "--images", "8"], "one number of --rows"),
    ("bench_decode", ["--lookahead", "4", "--pixels"], "--pixels: does not go with --lookahead"),
    ("bench_decode", ["--lookahead", "4", "--images", "2"], "--images: does not go with"),
    ("bench_pixels", ["--image-size", "128", "100"], "--image-size 100: must be a multiple of 8"),
    (
        "bench_pixels",
        ["--vq-model", "VQ-16", "--image-size", "8"],
        "--image-size 8: must be a multiple of 16",
    ),
    ("bench_pixels", ["--image-size", "0"], "--image-size 0"),
    ("bench_loading", ["--folder", "/there/is/none"], "--folder: there is no folder"),
    ("bench_loading", ["--device", "gpu"], "--device gpu"),
    ("evaluate_demo", ["--grid", "/there/is/none/x.png"], "--grid: there is no folder"),
    ("evaluate_demo", ["--cfg-scale", "2", "-1"], "--cfg-scale -1.0: must be 0 to 1000"),
    ("evaluate_demo", ["--cfg-scale", "nan"], "--cfg-scale nan"),
    ("speedup_table", ["--output-dir", "/there/is/none"], "--output-dir: there is no folder"),
    ("train_demo", ["--minutes", "nan"], "--minutes nan"),
    ("train_demo", ["--gpt-batch", "0"], "--gpt-batch 0: must be 1 or more"),
    ("train_demo", ["--ema-decay", "1"], "--ema-decay 1.0: must be 0 or more and below 1"),
    ("train_demo", ["--gpt-rate", "nan"], "--gpt-rate nan: must be a finite number"),
    ("train_demo", ["--seed", "-1"], "--seed -1: must be 0 to"),
]


@pytest.mark.parametrize(
    ("script", "typed", "told"),
    MISTAKES,
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_value_that_cannot_be_used_is_refused(script: str, typed: list[str], told: str) -> None:
    """Fails if a picture that no model draws, or a number that nothing can be done with, is found
    out halfway or not at all.
    """
    with refused(re.escape(told)):
        run(script, *typed)


COUNTS = [
    ("bench_decode", "--repeats", 1),
    ("bench_decode", "--images", 1),
    ("bench_pixels", "--repeats", 1),
    ("check_lookahead", "--pictures", 1),
    ("check_lookahead", "--max-num-seqs", 4),
    ("bench_pixels", "--images", 1),
    ("evaluate", "--batch-size", 1),
    ("evaluate_demo", "--samples", 2),
    ("evaluate_demo", "--batch", 1),
    ("evaluate_demo", "--classifier-steps", 1),
    ("evaluate_demo", "--classifier-batch", 8),
    ("speedup_table", "--repeats", 1),
    ("speedup_table", "--naive-repeats", 1),
    ("speedup_table", "--images", 1),
    ("train_demo", "--save-every", 1),
    ("train_demo", "--stop-after", 1),
    ("verify_published", "--images", 1),
    ("verify_published", "--repeats", 1),
    ("verify_published", "--fid", 2),
]


@pytest.mark.parametrize(("script", "flag", "least"), COUNTS)
def test_a_count_that_is_too_small_is_refused(
    script: str, flag: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if nothing is measured, or a division by zero ends the run."""
    with pytest.raises(SystemExit, match="2"):
        run(script, flag, str(least - 1))
    told = capsys.readouterr().err
    assert f"argument {flag}: {least - 1}: must be a whole number, {least} or more" in told
    assert told.count("\n") == 1


def test_a_seed_that_is_too_large_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a generator overflows halfway."""
    with pytest.raises(SystemExit, match="2"):
        run("evaluate_demo", "--seed", str(2**31))
    assert "--seed: 2147483648: must be a whole number, 0 to 2147483647" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script",
    ["bench_decode", "bench_kernels", "speedup_table", "tune_kernels", "verify_published"],
)
@pytest.mark.parametrize("typed", ["GPT-C", "GPT-B,GPT-C", ","])
def test_a_model_that_is_not_is_refused(
    script: str, typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a slip of the keyboard costs the models before it."""
    with pytest.raises(SystemExit, match="2"):
        run(script, "--models", typed)
    assert "choose from GPT-B, " in capsys.readouterr().err


def test_speedups_images_are_at_most_the_labels(tmp_path: Path) -> None:
    """Fails if nine images are asked for, eight are timed, and the table is kept as that
    of nine.
    """
    with pytest.raises(UserError, match="--images 9: must be 1 to 8, the labels of GPT-demo"):
        run("speedup_table", "--images", "9", "--output-dir", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_speedups_files_are_looked_at_before_the_work(tmp_path: Path) -> None:
    """Fails if an hour's table finds its place taken."""
    (tmp_path / "speedup.md").mkdir()
    with pytest.raises(UserError, match=r"speedup\.md: this is a folder"):
        run("speedup_table", "--output-dir", str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
@pytest.mark.parametrize("flag", ["--run-dir", "--output-dir"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(
    flag: str, tmp_path: Path
) -> None:
    """Fails if a training's weights are lost at its end."""
    (tmp_path / "locked").mkdir(mode=0o555)
    folders = {"--run-dir": tmp_path / "run", "--output-dir": tmp_path / "out"} | {
        flag: tmp_path / "locked"
    }
    with pytest.raises(UserError, match=f"{flag}: cannot write"):
        run("train_demo", *[word for pair in folders.items() for word in map(str, pair)])


def test_the_tuner_does_not_write_over_what_is_no_table(tmp_path: Path) -> None:
    """Fails if another benchmark's figures are taken for an empty table, and replaced."""
    path = tmp_path / "x.json"
    assert tune_kernels.table_so_far(path) == tune_kernels.TileTable()
    for content in (
        "",
        "[]",
        '{"benchmark": "decode"}',
        '{"measured_on": "a GPU", "linear": [{}]}',
    ):
        path.write_text(content)
        with pytest.raises(UserError, match="no table"):
            tune_kernels.table_so_far(path)


@pytest.mark.parametrize("script", sorted({*BEGINS, *WITHOUT_WORK}))
def test_help_tells_of_every_flag(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a flag does not say what it is for, what its value is, or what it is by default."""

    def end(parser: argparse.ArgumentParser, _: object = None) -> NoReturn:
        parser.format_help()  # raises where a text has a stray percent sign
        raise StopIteration(parser)

    monkeypatch.setattr(OneLineParser, "parse_args", end)
    with pytest.raises(StopIteration) as ended:
        importlib.import_module(script).main()
    for action in ended.value.value._actions:
        if action.help == argparse.SUPPRESS:
            continue
        assert action.help, action
        assert action.nargs == 0 or action.metavar or action.choices, action
        assert action.nargs == 0 or action.default in (None, []) or "(default: " in action.help, (
            action
        )


def test_defaults_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --device cpu beside a GPU begins with hours of models that a CPU is not
    meant for.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = bench_decode.parse_arguments(["--device", "cpu"])
    assert (options.models, options.rows) == (["GPT-demo"], [2])
    assert profile_step.parse_arguments(["--device", "cpu"]).gpt_model == "GPT-demo"
    assert models_for(None, on_gpu=False) == ["GPT-demo"]
    assert models_for(None, on_gpu=True) == list(PAPER_MODELS)
    assert models_for(["GPT-1B"], on_gpu=True) == ["GPT-1B"]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as it is asked for what it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")


@pytest.mark.usefixtures("hopper")
def test_what_needs_a_gpu_writes_where_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the scripts that only a GPU runs lose their way between the flags and the file,
    where no other test would see.
    """
    path = tmp_path / "table.json"

    def tune(config: GPTConfig, table: TileTable, *_: object) -> TileTable:
        return table.with_setting("attention", (config.n_head, config.head_size), TILES)

    monkeypatch.setattr(tune_kernels, "tune", tune)
    for model in ("GPT-B", "GPT-3B"):
        run("tune_kernels", "--models", model, "--output", str(path))
    kept = tune_kernels.table_so_far(path).measured["attention"]
    assert kept == {(12, 64): TILES, (32, 100): TILES}, (
        "the second run starts from the first one's table"
    )
    monkeypatch.setattr(bench_kernels, "measure_model", lambda model, typed, table: [])
    run(
        "bench_kernels",
        "--models",
        "GPT-B",
        "--rows",
        "2",
        "--output",
        str(tmp_path / "kernels.json"),
    )
    assert json.loads((tmp_path / "kernels.json").read_text())["benchmark"] == "kernels"


@pytest.mark.usefixtures("hopper")
def test_the_tuners_own_table_must_be_writable_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the default place is looked at only once the tuning is done."""
    monkeypatch.setattr(
        tune_kernels.tile_tables, "__file__", str(tmp_path / "missing" / "tiles.py")
    )
    with pytest.raises(UserError, match="--output: there is no folder"):
        run("tune_kernels")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_tuner_says_so() -> None:
    """Fails if the script ends in a traceback."""
    with pytest.raises(UserError, match="a GPU of compute capability"):
        run("tune_kernels")


def test_as_typed_it_is_one_line_and_status_2(tmp_path: Path) -> None:
    """Fails if what the tests above see as an exception is a traceback, or another status, on the
    command line.
    """
    words = [
        "--models",
        "GPT-demo",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "missing" / "x.json"),
    ]
    command = [sys.executable, "scripts/benchmarks/bench_decode.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f"bench_decode.py: error: --output: there is no folder {tmp_path / 'missing'}; make it "
        "first, or choose another\n"
    )


@pytest.mark.parametrize("typed", ["", "2,", "3", "0", "2,x", "-2", "2 4"])
def test_rows_are_pairs(typed: str) -> None:
    """Fails if half a pair, or nothing, is measured."""
    with pytest.raises(argparse.ArgumentTypeError, match="an even number"):
        listed(row_count)(typed)


def test_what_is_typed_is_what_is_meant() -> None:
    """Fails if a list loses an element or its order."""
    assert listed(row_count)("512,2,16") == [512, 2, 16]
    assert names(["a", "b", "c"])("c,a") == ["c", "a"]
    assert whole_number(2)("10") == 10
    assert whole_number(2, 10)("10") == 10


@pytest.mark.parametrize(
    ("keys", "sent"), [("old, new", "old"), ("only", "only"), (None, None), ("", None)]
)
def test_of_several_keys_a_script_sends_one(
    keys: str | None, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the variable that gives the service its keys is sent whole, which the service would
    refuse.
    """
    monkeypatch.delenv("LLAMAGEN_API_KEY", raising=False)
    if keys is not None:
        monkeypatch.setenv("LLAMAGEN_API_KEY", keys)
    assert authorization() == ({} if sent is None else {"Authorization": f"Bearer {sent}"})


def test_the_figures_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the last line is no JSON, or the file says anything else."""
    figures, path = {"benchmark": "x", "results": [1.5, None]}, tmp_path / "x.json"
    assert output_file("--output", ".json")(str(path)) == path
    give_figures(figures, path)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert json.loads(path.read_text()) == figures
    give_figures(figures, None)
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.usefixtures("hopper")
def test_the_tuner_tunes_the_sections_that_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a section's settings cannot be measured alone, or one that this GPU never reads is
    tuned.
    """
    asked: list[list[str]] = []

    def tune(
        config: GPTConfig, table: TileTable, kernels: object, name: str, sections: list[str]
    ) -> TileTable:
        asked.append(sections)
        return table

    monkeypatch.setattr(tune_kernels, "tune", tune)
    words = ["--models", "GPT-L", "--output", str(tmp_path / "table.json")]
    run("tune_kernels", *words, "--sections", "attention")
    run("tune_kernels", *words)
    config = GPTConfig(dim=1024, n_layer=1, n_head=16)
    stages = tune_kernels.stages_of(config, hopper=True)
    assert asked[0] == ["attention"]
    assert set(asked[1]) == {stage.section for stage in stages}
    with pytest.raises(UserError, match="--sections linear: this GPU uses attention, fused_linear"):
        run("tune_kernels", *words, "--sections", "attention,linear")
    ranks = "--tensor-parallel-size"
    run("tune_kernels", *words, ranks, "2")
    of_ranks = tune_kernels.stages_of(replace(config, ranks=2), hopper=True)
    assert {(stage.section, stage.key) for stage in of_ranks if stage.section in asked[2]} == {
        ("fused_linear", (1536, 1024)),
        ("fused_project", (1024, 512)),
        ("fused_project", (1024, 1408)),
        ("fused_swiglu", (1408, 1024)),
    }
    with pytest.raises(UserError, match="--sections fused_head: ranks tune fused_linear"):
        run("tune_kernels", *words, "--sections", "fused_head", ranks, "2")
    with pytest.raises(UserError, match=f"{ranks} 3: GPT-L takes 1, 2, 4 or 8"):
        run("tune_kernels", *words, ranks, "3")


def test_a_model_that_cannot_be_timed_costs_neither_the_others_nor_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a compiler's error, which is of no common kind, ends the run, or a run with a
    failure passes for a whole one.
    """
    monkeypatch.undo()  # the work is to begin

    def measure(model: str, *_: object) -> dict[str, object]:
        if model == "GPT-B":
            raise Exception("out of resource: shared memory\nmore words")
        return {"model": model}

    monkeypatch.setattr(bench_decode, "measure", measure)
    with pytest.raises(SystemExit, match="1"):
        bench_decode.main(
            ["--models", "GPT-B,GPT-L", "--device", "cpu", "--output", str(tmp_path / "x.json")]
        )
    assert "failed: out of resource: shared memory\n" in capsys.readouterr().out
    kept = json.loads((tmp_path / "x.json").read_text())["models"]
    assert kept == [
        {"model": "GPT-B", "error": "out of resource: shared memory"},
        {"model": "GPT-L"},
    ]
