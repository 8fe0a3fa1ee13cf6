"""The speed-up table: its rows, its chart, that it resumes, and that one failure does not cost the
rest.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import speedup_table
from PIL import Image

from autoregressive.benchmarks import speedup
from autoregressive.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HEADER = (
    "| Method | params | baseline(s) | compile(s) | paged(s) | speed-up | over compile | "
    "floor(s) | share |"
)


def timings(**seconds: float) -> dict[str, speedup.Outcome]:
    return {method: {"timing": {"seconds": taken}} for method, taken in seconds.items()}


FULL = timings(naive=23.7, compile=1.53, paged=0.48)
FAILED = timings(naive=15.76) | {
    "compile": {"error": "RuntimeError: a | b\nc"},
    "paged": {"error": "no\nmemory"},
}


def test_the_tables_rows() -> None:
    """Fails if a ratio is inverted, a failure hides its reason, or a reason breaks the table."""
    full = speedup.cells("GPT-XL", 775_000_000, FULL, 0.32)
    failed = speedup.cells("GPT-3B", 3_100_000_000, FAILED, None)
    assert full == ["GPT-XL", "775M", "23.70", "1.53", "0.480", "49.4x", "3.2x", "0.320", "67%"]
    reasons = ["failed: RuntimeError: a / b c", "failed: no memory"]
    assert failed == ["GPT-3B", "3.1B", "15.76", *reasons, "-", "-", "-", "-"]


def test_the_chart_shows_every_bar() -> None:
    """Fails if a bar is left out, or nothing measured ends in an error."""
    floors = {"GPT-XL": 0.32, "GPT-3B": None}
    picture = speedup.chart({"GPT-XL": FULL, "GPT-3B": FAILED}, floors, "a device")
    colours = {colour for _, colour in picture.getcolors(1 << 20) or []}
    assert {(150, 150, 150), (90, 140, 200), (220, 110, 40), (70, 70, 70)} <= colours
    empty = speedup.chart({"GPT-B": {"naive": {"error": "x"}}}, {"GPT-B": None}, "a device")
    assert empty.width == picture.width
    assert empty.height < picture.height


# Stands in for the worker, which is called with --worker and pairs of flags and values: methods
# succeed, fail, or end the process.
WORKER = """
import json, os, sys
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
for method in words["--methods"].split(","):
    if words["--models"] == "GPT-L" and method == "compile":
        print("a last word", file=sys.stderr)
        sys.exit(3)
    if words["--models"] == "GPT-L" and method == "naive":
        print(json.dumps({"error": "ValueError: why"}))
        sys.exit(1)
    timing = {"seconds": 2.0, "repeats": [2.0], "floor_seconds": 1.0 if method == "paged" else None}
    timing["caches"] = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    timing["quantized"] = [words.get("--quantization"), words.get("--kv-cache-dtype")]
    timing["tokens_a_pass"] = 2.5 if method == "lookahead" else 1.0
    timing["read_bytes_per_second"] = 4e12 if words["--models"] == "GPT-L" else 3e12
    print(json.dumps({"timing": timing}))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script's output folder; its workers only pretend."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(speedup_table, "__file__", str(script))
    return tmp_path / "out"


def test_a_failure_shows_why_and_the_rest_go_on(
    stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an error, or a process that dies, costs another method or model, or is not told."""
    with pytest.raises(SystemExit, match="1"):
        speedup_table.main(
            ["--models", "GPT-L,GPT-B", "--device", "cpu", "--output-dir", str(stand_in)]
        )
    out = capsys.readouterr().out
    table = (stand_in / "speedup.md").read_text().splitlines()
    assert table[0] == HEADER
    reason = "failed: the process ended with status 3: a last word"
    assert (
        table[2]
        == f"| GPT-L | 343M | failed: ValueError: why | {reason} | 2.00 | - | - | 1.000 | 50% |"
    )
    # At GPT-L's bandwidth, the higher: a GPU that measures less for being hot must not flatter what
    # is held against it.
    assert table[3] == "| GPT-B | 111M | 2.00 | 2.00 | 2.00 | 1.0x | 1.0x | 0.750 | 38% |"
    with Image.open(stand_in / "speedup.png") as picture:
        assert picture.width == 900
    report = json.loads(out.splitlines()[-1])
    assert report == json.loads((stand_in / "speedup.json").read_text())
    assert report["results"]["GPT-B"]["paged"]["timing"]["seconds"] == 2.0


def test_lookahead_has_columns_of_its_own(stand_in: Path) -> None:
    """Fails if lookahead changes a column that is there without it, or its own cells fail with
    it.
    """
    words = ["--models", "GPT-B", "--device", "cpu", "--output-dir", str(stand_in)]
    speedup_table.main(words)
    without = (stand_in / "speedup.md").read_text().splitlines()
    speedup_table.main([*words, "--methods", "naive,compile,paged,lookahead"])
    table = (stand_in / "speedup.md").read_text().splitlines()
    assert table[0] == f"{without[0]} lookahead(s) | tokens a pass |"
    assert table[2] == f"{without[2]} 2.00 | 2.50 |"
    assert speedup.lookahead_cells({"error": "no\nmemory"}) == ["failed: no memory", "-"]


def test_the_chart_has_a_bar_of_lookahead_where_it_was_timed() -> None:
    """Fails if the headline's chart has a legend for what it does not show."""
    colour = (240, 180, 60)
    for outcomes, there in ((FULL, False), (FULL | timings(lookahead=0.3), True)):
        picture = speedup.chart({"GPT-XL": outcomes}, {"GPT-XL": 0.32}, "a device")
        assert (colour in {found for _, found in picture.getcolors(1 << 20) or []}) == there


def test_what_the_compiler_chose_before_is_not_taken_over(stand_in: Path) -> None:
    """Fails if kernels that were timed while something else used the GPU can make the compiled loop
    slow, for every run to come.
    """
    speedup_table.main(
        [
            "--models",
            "GPT-B,GPT-XL",
            "--methods",
            "compile",
            "--device",
            "cpu",
            "--output-dir",
            str(stand_in),
        ]
    )
    results = json.loads((stand_in / "speedup.json").read_text())["results"]
    caches = [Path(results[model]["compile"]["timing"]["caches"]) for model in ("GPT-B", "GPT-XL")]
    assert caches[0] != caches[1]
    assert not any(folder.exists() for folder in caches)


def test_a_run_resumes(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if finished results are measured again, failed ones are not, or those of another job
    are taken for this one's.
    """
    words = ["--models", "GPT-L,GPT-B", "--device", "cpu", "--output-dir", str(stand_in)]
    with pytest.raises(SystemExit, match="1"):
        speedup_table.main(words)
    asked: list[tuple[str, str]] = []

    def run_method(script: str, model: str, method: str, _: object) -> speedup.Outcome:
        asked.append((model, method))
        return {"timing": {"seconds": 5.0}}

    monkeypatch.setattr(speedup, "run_method", run_method)
    speedup_table.main(words)
    assert asked == [("GPT-L", "naive"), ("GPT-L", "compile")]
    assert f"GPT-L, paged: kept from {stand_in / 'speedup.json'}" in capsys.readouterr().out
    assert (
        "| GPT-L | 343M | 5.00 | 5.00 | 2.00 | 2.5x | 2.5x |"
        in (stand_in / "speedup.md").read_text()
    )
    with pytest.raises(UserError, match="another job"):
        speedup_table.main([*words, "--image-size", "256"])
    version = speedup.code_version()
    monkeypatch.setattr(speedup, "code_version", lambda: f"changed since {version}")
    with pytest.raises(UserError, match="another job"):
        speedup_table.main(words)
    for foreign in ("{}", '{"job": {}, "results": [1]}'):
        (stand_in / "speedup.json").write_text(foreign)
        with pytest.raises(UserError, match="choose another --output-dir"):
            speedup_table.main(words)


def test_repeats_belong_to_the_job(stand_in: Path) -> None:
    """Fails if a run with other repeats takes over kept medians, or the table does not say what its
    figures are medians of.
    """
    words = ["--models", "GPT-B", "--device", "cpu", "--output-dir", str(stand_in)]
    speedup_table.main([*words, "--repeats", "2", "--naive-repeats", "1"])
    assert (
        "median of 2 after one warm-up (the plain loop: of 1)"
        in (stand_in / "speedup.md").read_text()
    )
    with pytest.raises(UserError, match="another job"):
        speedup_table.main([*words, "--repeats", "3"])


def test_quantisation_belongs_to_the_job(stand_in: Path) -> None:
    """Fails if the flags do not reach the worker, the table does not tell of them, or figures of
    other weights are taken over.
    """
    words = ["--models", "GPT-B", "--device", "cpu", "--output-dir", str(stand_in)]
    quantized = ["--quantization", "int8", "--kv-cache-dtype", "fp8"]
    speedup_table.main([*words, *quantized])
    told = "The engine alone has weights in int8 and keys and values in fp8."
    assert told in (stand_in / "speedup.md").read_text()
    outcomes = json.loads((stand_in / "speedup.json").read_text())["results"]["GPT-B"]
    assert outcomes["paged"]["timing"]["quantized"] == ["int8", "fp8"]
    with pytest.raises(UserError, match="another job"):
        speedup_table.main(words)


def test_without_a_gpu_the_demo_model_is_drawn_at_its_own_size(
    stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the command of the README is an error on a machine without a GPU."""
    speedup_table.main(["--image-size", "384", "--device", "cpu", "--output-dir", str(stand_in)])
    assert "--image-size 384 is left out" in capsys.readouterr().err
    assert "| GPT-demo | 7M | 2.00 |" in (stand_in / "speedup.md").read_text()


def test_an_image_size_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """Fails if a mistake becomes a table of failures, with status 0."""
    with pytest.raises(UserError, match="image_size 100"):
        speedup_table.main(
            [
                "--models",
                "GPT-B",
                "--device",
                "cpu",
                "--image-size",
                "100",
                "--output-dir",
                str(tmp_path / "new"),
            ]
        )
    assert not (tmp_path / "new").exists()


def test_it_runs_as_typed_on_the_demo_model(tmp_path: Path) -> None:
    """Fails if the worker, the plain loop or the engine cannot be timed on a machine
    without a GPU.
    """
    words = [
        "--models",
        "GPT-demo",
        "--methods",
        "naive,paged,lookahead",
        "--images",
        "1",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "scripts/speedup_table.py", *words, "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]["GPT-demo"]
    assert set(results) == {"naive", "paged", "lookahead"}
    for outcome in results.values():
        assert outcome["timing"]["seconds"] > 0, outcome
    table = (tmp_path / "speedup.md").read_text().splitlines()
    assert table[2].startswith("| GPT-demo | 7M | ")
    *_, compile_ratio, floor, share, seconds, kept, _ = table[2].split("|")
    assert {compile_ratio, floor, share} == {" - "}
    assert float(seconds) > 0
    assert float(kept) >= 1
    assert results["paged"]["timing"]["tokens_a_pass"] == 1
