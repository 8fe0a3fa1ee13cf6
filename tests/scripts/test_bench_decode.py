"""The benchmark of passes by their window, as far as a machine without a GPU can tell: what is
timed, and what the table says of it.
"""

import json
from dataclasses import replace
from pathlib import Path

import bench_decode
import pytest
from fake_runner import tiny_gpt

from autoregressive.benchmarks.guessing import GuessingRunner
from autoregressive.benchmarks.window_times import guess_ms, time_window
from autoregressive.errors import UserError
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine, RunnerFactory
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.floor import Floor, JobFloor, job_floor
from autoregressive.serve.worker.rank_processes import ModelRanks
from autoregressive.weights.finding import ModelSettings

PARAMS = SamplingParams(cfg_scale=2.0, top_k=0)


@pytest.mark.parametrize(("window", "speeds"), [(2, [2.0]), (4, [2.0, 3.0])])
def test_jobs_keep_the_tokens_that_they_are_to_keep(window: int, speeds: list[float]) -> None:
    """Fails if a pass is timed that keeps guesses, or a job at 2x takes other than half the
    passes.
    """
    engine = Engine(tiny_gpt(144), None, EngineConfig(8, lookahead=window), GuessingRunner)
    times = time_window(engine, [1, 2, 3], PARAMS, repeats=2)
    assert times.no_guess_holds.tokens_a_pass == 1
    assert list(times.fewer) == speeds
    for tokens, timing in times.fewer.items():
        assert timing.tokens_a_pass == pytest.approx(tokens, rel=0.02)
        assert len(timing.repeats) == 2
        assert timing.seconds > 0
    assert guess_ms(engine) is None  # without a GPU


def test_auto_is_offered_what_suits_its_largest_window() -> None:
    """Fails if "auto" cannot be timed."""
    engine = Engine(tiny_gpt(64), None, EngineConfig(4, lookahead="auto"), GuessingRunner)
    times = time_window(engine, [1], PARAMS, repeats=1)
    assert times.no_guess_holds.tokens_a_pass == 1
    assert list(times.fewer) == [2.0, 3.0]


def test_without_lookahead_there_is_one_time() -> None:
    """Fails if the baseline counts the time of offering guesses."""
    config = EngineConfig(4, lookahead="off")
    times = time_window(Engine(tiny_gpt(16), None, config), [1], PARAMS, repeats=1)
    assert times.no_guess_holds.tokens_a_pass == 1
    assert times.fewer == {}


def test_the_tables_lines() -> None:
    """Fails if a ratio is inverted, or a job is held against one of other rows."""
    timing = {"tokens_a_pass": 2.01, "seconds": 0.3}
    alone = {"model": "GPT-B", "rows": 2, "lookahead": "off", "pass_ms": 1.0, "fewer": {}}
    alone["no_guess_holds"] = {"seconds": 0.6}
    ahead = alone | {"lookahead": 2, "pass_ms": 1.25, "fewer": {2.0: timing}}
    ahead["no_guess_holds"] = {"seconds": 0.75}
    nothing = [None] * 3
    first = bench_decode.lookahead_row(alone, alone)
    assert first == ["GPT-B", 2, "off", 1.0, None, 0.6, *nothing, *nothing]
    second = bench_decode.lookahead_row(ahead, alone)
    assert second == ["GPT-B", 2, 2, 1.25, 1.25, 0.75, 2.01, 0.3, 2.0, *nothing]


def test_it_runs_as_typed_on_a_small_model(
    small_demo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if windows cannot be timed on a machine without a GPU, or a number of rows or a setting
    is left out.
    """
    words = ["--models", "GPT-demo", "--rows", "2,4", "--lookahead", "2", "--repeats", "1"]
    bench_decode.main([*words, "--device", "cpu", "--output", str(tmp_path / "x.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["model", "rows", "lookahead", "ms/pass", "pays"]
    sizes = [("off", 2), ("off", 4), (2, 2), (2, 4)]
    assert [line.split()[:3] for line in lines[2:-1]] == [
        ["GPT-demo", str(rows), str(setting)] for setting, rows in sizes
    ]
    figures = json.loads(lines[-1])
    assert figures == json.loads((tmp_path / "x.json").read_text())
    results = figures["models"][0]["results"]
    assert [(each["lookahead"], each["rows"]) for each in results] == sizes
    for each in results:
        assert each["images"] == each["rows"] // 2
        seconds = each["no_guess_holds"]["seconds"]
        assert each["pass_ms"] == pytest.approx(seconds / 256 * 1e3)


def test_quantised_weights_and_pages_are_timed(
    small_demo: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a flag does not reach the engine, or the floor is that of 16 bits."""
    built: list[EngineConfig] = []
    floors: list[Floor] = []

    def engine(gpt: Transformer, vq: None, config: EngineConfig, runner: RunnerFactory) -> Engine:
        built.append(config)
        return Engine(gpt, vq, config, runner)

    def counted(floor: Floor, *job: object) -> JobFloor:
        floors.append(floor)
        return job_floor(floor, *job)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_decode, "Engine", engine)
    monkeypatch.setattr(bench_decode, "job_floor", counted)
    words = ["--models", "GPT-demo", "--rows", "2", "--repeats", "1", "--device", "cpu"]
    bench_decode.main([*words, "--quantization", "int8", "--kv-cache-dtype", "fp8"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "error" not in figures["models"][0]
    for each in (built[0], floors[0]):
        assert (each.quantization, each.kv_cache_dtype) == ("int8", "fp8")
    options = figures["options"]
    assert (options["quantization"], options["kv_cache_dtype"]) == ("int8", "fp8")


def test_the_flag_for_ranks_starts_and_ends_them(
    small_demo: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the flag does not reach the ranks, or they outlive the figures."""
    asked: list[int] = []
    stopped: list[str] = []

    class Ranks(ModelRanks):
        def stop(self) -> None:
            stopped.append("stopped")

    def start(model: ModelSettings, path: None, config: EngineConfig) -> ModelRanks:
        asked.append(config.tensor_parallel_size)
        return Ranks(replace(config, tensor_parallel_size=1))

    monkeypatch.setattr(bench_decode, "start_ranks", start)
    words = ["--models", "GPT-demo", "--rows", "2", "--repeats", "1", "--device", "cpu"]
    bench_decode.main([*words, "--tensor-parallel-size", "2"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "error" not in figures["models"][0]
    assert (asked, stopped) == ([2], ["stopped"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "GPT-B,GPT-L"], "goes with one of --models"),
        (["--lookahead", "2"], "does not go with --tensor-parallel-size"),
    ],
)
def test_what_ranks_do_not_go_with(words: list[str], message: str) -> None:
    """Fails if figures are told that were not measured as it was asked for."""
    with pytest.raises(UserError, match=message):
        bench_decode.main([*words, "--device", "cpu", "--tensor-parallel-size", "2"])
