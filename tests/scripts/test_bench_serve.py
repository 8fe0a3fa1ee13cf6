"""The load generator, the prober and what measures HTTP's cost, against a running service."""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bench_overhead
import pytest
from fake_service import Service, running_service
from PIL import Image

from autoregressive.benchmarks.service import percentiles, saturate, steady_rate
from autoregressive.cli.command import flag_of
from autoregressive.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(
        tmp_path_factory.mktemp("service"), "--max-num-seqs", "8", "--max-queue-size", "4"
    ) as service:
        service.faults.set("step_seconds", "0.001")
        yield service


def bench(*flags: str, script: str = "bench_serve") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_rates_are_measured_and_drawn(service: Service, tmp_path: Path) -> None:
    """Fails if requests, images or refusals are miscounted, or a file is not what was printed."""
    plot, output = tmp_path / "plot.png", tmp_path / "figures.json"
    before = service.gauges().get("images_total", 0)
    flags = (
        "--rates",
        "5,200",
        "--seconds",
        "1.5",
        "--n",
        "2",
        "--plot",
        str(plot),
        "--output",
        str(output),
    )
    done = bench("--url", service.url, *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(output.read_text()) == figures
    assert Image.open(plot).width == 900
    gentle, harsh = figures["results"]
    assert gentle["failures"] == {}
    assert gentle["images"] == 2 * gentle["requests"]
    assert harsh["failures"]["429"] > 0
    assert harsh["images"] == 2 * (harsh["requests"] - harsh["failures"]["429"])
    assert gentle["images"] + harsh["images"] == service.gauges()["images_total"] - before
    for result in (gentle, harsh):
        assert (
            0
            < result["image_seconds"]["p50"]
            <= result["image_seconds"]["p90"]
            <= result["image_seconds"]["p99"]
        )


def test_arrivals_are_the_same_for_one_seed(service: Service) -> None:
    """Fails if runs cannot be compared."""
    counts = []
    for seed in ("1", "1", "2"):
        done = bench("--url", service.url, "--rates", "20", "--seconds", "1", "--seed", seed)
        counts.append(json.loads(done.stdout.splitlines()[-1])["results"][0]["requests"])
    assert counts[0] == counts[1] != counts[2]


def test_a_saturated_service_is_counted_without_its_first_wave(service: Service) -> None:
    """Fails if the start, in which nothing can have ended yet, is part of the rate."""
    begun = time.monotonic()
    flags = ("--saturate", "4", "--n", "2", "--seconds", "3", "--previews", "0", "--moments")
    result = json.loads(bench("--url", service.url, *flags).stdout.splitlines()[-1])["results"][0]
    moments, until = result["moments"], result["until"]
    assert result["first_preview_seconds"] is None
    assert len(moments) == 2 * result["requests"]
    assert begun < until - 3 < min(moments) < until < max(moments) < time.monotonic()
    images, seconds, pace = steady_rate(moments, 4 * 2, until - 3, until)
    assert images > 0
    assert result["images"] == pytest.approx(images, abs=2)  # moments are rounded
    assert result["seconds"] == pytest.approx(seconds, abs=0.01)
    assert result["images_per_second"] == pytest.approx(pace, rel=0.01)


BEGUN = 1000.0  # by the clock


@pytest.mark.parametrize(
    ("until", "close"),
    [(20.0, 2e-3), (20.2, 2e-3), (20.5, 2e-3), (20.9, 2e-3), (10.1, 0.01), (9.1, 0.02)],
)
def test_the_pace_of_waves_is_theirs_whenever_they_are_cut_off(until: float, close: float) -> None:
    """Fails if it depends on when the clock is stopped, or on how the images of a wave follow each
    other.
    """
    for spread in (0.0, 0.4, 1.0):  # of a wave, in its second
        moments = [
            BEGUN + wave + spread * image / 100 for wave in range(1, 41) for image in range(100)
        ]
        images, seconds, pace = steady_rate(reversed(moments), 200, BEGUN, BEGUN + until)
        assert images == sum(BEGUN + 3 <= moment <= BEGUN + until for moment in moments)
        assert until - 4 < seconds < until - 2.99
        assert pace == pytest.approx(100, rel=close)


def test_images_after_the_last_question_do_not_count() -> None:
    """Fails if the end, where ever fewer requests are under way, makes a service seem slower."""
    moments = [BEGUN + 0.1 * index for index in range(100)]
    only = steady_rate(moments, 10, BEGUN, BEGUN + 9.95)
    assert only[2] == pytest.approx(10)
    assert steady_rate([BEGUN - 1, *moments, BEGUN + 100], 10, BEGUN, BEGUN + 9.95) == only


@pytest.mark.parametrize(
    "moments",
    [
        [],
        [1.0],
        [1.0, 2.0, 2.0, 2.0],
        [1.0, 2.0, 2.0001, 2.0002],
        [1.0, 2.0, 9.0],
        [1.7, 2.0, 3.0, 4.0, 5.0],  # a long start
        [0.5, 0.7, 0.9, 1.1, 1.3, 1.5],  # and nothing since
    ],
)
def test_a_wave_or_two_have_no_pace(moments: list[float]) -> None:
    """Fails if a few images that ended together pass for a rate."""
    assert steady_rate((BEGUN + moment for moment in moments), 1, BEGUN, BEGUN + 5) == (0, 0.0, 0.0)
    assert steady_rate((BEGUN + moment for moment in (1.6, 2, 3, 4, 5)), 1, BEGUN, BEGUN + 5)[
        2
    ] == pytest.approx(1)


def test_clients_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one of them does not count, or a time in which not all of them ask."""
    mine = [BEGUN + 0.1 * index for index in range(1, 120)]
    told = [
        {"moments": [BEGUN - 0.5, *mine], "until": BEGUN + 10, "failures": {"429": 1}},
        {"moments": [moment + 0.05 for moment in mine], "until": BEGUN + 11, "failures": {}},
    ]
    commands: list[list[str]] = []

    def ended_in(command: list[str]) -> dict[str, object]:
        commands.append(command)
        if "--probe" in command:
            return {"results": "as they were"}
        return {"results": [told[int(command[command.index("--seed") + 1])]]}

    monkeypatch.setattr("autoregressive.benchmarks.service.last_json", ended_in)
    asked: list[tuple[int, float, float]] = []

    def noted(
        moments: list[float], first: int, begun: float, until: float
    ) -> tuple[int, float, float]:
        asked.append((first, begun, until))
        return steady_rate(moments, first, begun, until)

    monkeypatch.setattr("autoregressive.benchmarks.service.steady_rate", noted)
    result = saturate(["python", "bench_serve.py"], "http://a", 20, 10, 2)
    assert asked == [(20, BEGUN + 1, BEGUN + 10)]
    assert result == {
        "images_per_second": pytest.approx(20),
        "failures": [{"429": 1}, {}],
        "probes": "as they were",
    }
    assert all(
        command[command.index("--saturate") + 1] == "10"
        for command in commands
        if "--saturate" in command
    )
    with pytest.raises(UserError, match="more than a third"):
        saturate(["python", "bench_serve.py"], "http://a", 200, 10, 2)


def test_a_run_lasts_for_enough_waves() -> None:
    """Fails if the script works for minutes and then finds that too few waves came."""
    assert bench_overhead.seconds_of_load(None, 5.65) == 85
    assert bench_overhead.seconds_of_load(None, 0.1) == 10
    assert bench_overhead.seconds_of_load(85, 5.65) == 85
    with pytest.raises(UserError, match="15 waves of images take 85 s"):
        bench_overhead.seconds_of_load(84, 5.65)


def test_a_run_too_short_to_count_is_no_result(service: Service) -> None:
    """Fails if a service is said to give no images because nobody waited for them."""
    done = bench("--url", service.url, "--saturate", "4", "--seconds", "0.001")
    assert done.returncode == 2
    assert "give more seconds" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_probes_are_counted_and_timed(service: Service) -> None:
    """Fails if a path is not asked about twenty times a second with the other, or what is printed
    is not what is in the JSON.
    """
    done = bench("--url", service.url, "--seconds", "2", "--probe")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    results = json.loads(last)["results"]
    assert [line.split(":")[0] for line in lines] == list(results) == ["/health", "/metrics"]
    for line, result in zip(lines, results.values(), strict=True):
        assert 5 <= result["answers"] <= 21
        assert 0 < result["seconds"]["p50"] <= result["seconds"]["p99"] < 2
        assert f"{result['answers']} answers" in line
        assert f"{result['seconds']['p99']:.4f} s" in line


@pytest.mark.timing
def test_http_alone_is_measured() -> None:
    """Fails if images are lost, or come sooner than such engines can give them, or a process is
    left out.
    """
    flags = (
        "--data-parallel-size",
        "2",
        "--places",
        "4",
        "--seconds-per-image",
        "0.2",
        "--seconds",
        "6",
    )
    done = bench(*flags, script="bench_http")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["result"]["failures"] == [{}, {}]
    assert 0.6 * 2 * 4 / 0.2 < figures["result"]["images_per_second"] < 1.1 * 2 * 4 / 0.2
    assert list(figures["costs"]) == ["service", "engine 0", "engine 1", "front 0", "front 1"]
    for cost in figures["costs"].values():
        assert cost["milliseconds"] > 0
        assert cost["switches"] > 0


@pytest.mark.parametrize(
    ("script", "flags", "word"),
    [
        (
            "bench_serve",
            ("--probe", "--url", "http://127.0.0.1:1"),
            "start autoregressive/serve/api_server.py first",
        ),
        ("bench_serve", ("--probe", "--url", "nonsense"), "no service answers there"),
        ("bench_serve", ("--seconds", "0"), "above 0"),
        ("bench_serve", ("--output-format", "bmp"), "choose from"),
        ("bench_serve", ("--rates", "0"), "above 0"),
        ("bench_serve", ("--n", "11"), "1 to 10"),
        ("bench_serve", ("--previews", "4"), "0 to 3"),
        ("bench_serve", ("--plot", "plot.jpg"), "must end in .png"),
        ("bench_http", ("--places", "0"), "1 or more"),
        ("bench_http", ("--seconds-per-image", "-1"), "above 0"),
        ("bench_http", ("--seconds-per-image", "4"), "15 times"),
        ("bench_http", ("--api-server-count", "many"), "whole number"),
        ("bench_overhead", ("--rows", "2"), "4 or more"),
        ("bench_overhead", ("--gpt-model", "GPT-5"), "there is no GPT-5"),
        ("bench_overhead", ("--data-parallel-size", "0"), "1 or more"),
        ("bench_overhead", ("--image-size", "big"), "whole number"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], script: str, flags: tuple[str, ...], word: str
) -> None:
    """Fails if a script begins its work in spite of a mistake, or does not say which it is."""
    with pytest.raises((UserError, SystemExit)) as caught:
        importlib.import_module(script).main(list(flags))
    error = caught.value
    assert getattr(error, "code", 2) == 2
    told = error.spelled(flag_of) if isinstance(error, UserError) else capsys.readouterr().err
    assert word in told
    assert len(told.splitlines()) == 1


def test_percentiles_are_of_nearest_rank() -> None:
    """Fails if a percentile is interpolated or off by one."""
    assert percentiles([float(value) for value in range(1, 101)]) == {
        "p50": 50.0,
        "p90": 90.0,
        "p99": 99.0,
    }
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert percentiles([]) is None
