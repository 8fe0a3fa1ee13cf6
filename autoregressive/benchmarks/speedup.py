"""The work of scripts/speedup_table.py: it times each method in a fresh process, keeps what is
finished in a file, and draws the table and the chart.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import triton
from PIL import Image

from autoregressive.benchmarks.guessing import draw_all, kept_a_pass
from autoregressive.benchmarks.harness import empty_transformer, seconds_of, use_device
from autoregressive.benchmarks.script import (
    HEADLINE_METHODS,
    bar_chart,
    give_figures,
    markdown,
    models_for,
)
from autoregressive.cli.drawing import Settings, resolve_settings
from autoregressive.cli.flags import build_parser
from autoregressive.devices import limited_cpu_threads, now, set_llamagen_numerics
from autoregressive.errors import UserError, tell
from autoregressive.files import check_file, check_own_folder, write_whole
from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.output.records import device_name
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.request import Request
from autoregressive.serve.engine_flags import engine_config
from autoregressive.serve.floor import Floor, job_floor, measure_ceilings
from autoregressive.weights.finding import find_weights
from autoregressive.weights.loading import load_models
from autoregressive.weights.quantized import quantization_of

ROOT = Path(__file__).resolve().parents[2]
_EAGER_WARM_UP_TOKENS = 16
_COLUMNS = (
    "Method",
    "params",
    "baseline(s)",
    "compile(s)",
    "paged(s)",
    "speed-up",
    "over compile",
    "floor(s)",
    "share",
)
_LOOKAHEAD_COLUMNS = ("lookahead(s)", "tokens a pass")
_LONGEST_REASON = 100
_BARS = {
    "naive": ("plain loop", (150, 150, 150)),
    "compile": ("compiled", (90, 140, 200)),
    "paged": ("engine", (220, 110, 40)),
    "lookahead": ("with lookahead", (240, 180, 60)),
    "floor": ("memory floor", (70, 70, 70)),
}
Outcome = dict[str, Any]  # of a method: {"timing": its figures} or {"error": why}
Outcomes = dict[str, dict[str, Outcome]]  # by model and method


def read_outcomes(path: Path, job: Mapping[str, object]) -> Outcomes:
    """What an earlier run of the same job has finished.

    Raises:
        UserError: the file is of another job, or none of ours.
    """
    if not path.exists():
        return {}
    other = "choose another --output-dir"
    try:
        kept = json.loads(path.read_text())
        kept_job, outcomes = kept["job"], dict(kept["results"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of this script's: remove it, or {other}") from error
    if kept_job != job:
        raise UserError(f"{path} holds the results of another job ({kept_job}): {other}")
    return outcomes


def save(path: Path, job: Mapping[str, object], outcomes: Outcomes) -> dict[str, Any]:
    """Writes all results as JSON, and returns them.

    The floors are at the highest bandwidth of all models' processes: the same GPU measures less
    when it is hot. Eight images' rows are too few for arithmetic to bound a product.
    """
    paged = {model: found.get("paged", {}).get("timing", {}) for model, found in outcomes.items()}
    rates = {model: timing.get("read_bytes_per_second") for model, timing in paged.items()}
    highest = max(filter(None, rates.values()), default=None)
    report = {
        "benchmark": "speedup",
        "job": job,
        "highest_read_bytes_per_second": highest,
        "floor_seconds": {
            model: rate and paged[model]["floor_seconds"] * rate / highest
            for model, rate in rates.items()
        },
        "results": outcomes,
    }
    write_whole(path, lambda part: part.write_text(json.dumps(report, indent=1) + "\n"))
    return report


def seconds_by(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """The seconds of the methods that finished."""
    return {
        method: outcome["timing"]["seconds"]
        for method, outcome in outcomes.items()
        if "timing" in outcome
    }


def cells(
    model: str, parameters: int, outcomes: Mapping[str, Outcome], floor: float | None
) -> list[str]:
    """One line of the table. A method that failed says why in its cell, and one that was not run
    is a dash.
    """
    size = f"{parameters / 1e9:.1f}B" if parameters >= 999_500_000 else f"{parameters / 1e6:.0f}M"
    seconds, line = seconds_by(outcomes), [model, size]
    line += [seconds_cell(outcomes.get(method, {})) for method in HEADLINE_METHODS]
    paged = seconds.get("paged")
    slower = [seconds.get(method) for method in ("naive", "compile")]
    line += [f"{slow / paged:.1f}x" if slow and paged else "-" for slow in slower]
    line.append("-" if floor is None else f"{floor:.3f}")
    line.append(f"{floor / paged:.0%}" if floor and paged else "-")
    return line


def seconds_cell(outcome: Outcome) -> str:
    """The seconds of a method, or why it failed, or a dash."""
    if "timing" in outcome:
        seconds = outcome["timing"]["seconds"]
        return f"{seconds:.{2 if seconds >= 1 else 3}f}"
    reason = " ".join(outcome.get("error", "").split()).replace("|", "/")
    return f"failed: {reason[:_LONGEST_REASON]}" if reason else "-"


def lookahead_cells(outcome: Outcome) -> list[str]:
    """The cells of the engine with lookahead, behind all others."""
    kept = outcome.get("timing", {}).get("tokens_a_pass")
    return [seconds_cell(outcome), "-" if kept is None else f"{kept:.2f}"]


def chart(
    outcomes: Mapping[str, Mapping[str, Outcome]], floors: Mapping[str, float | None], device: str
) -> Image.Image:
    """A bar for each model's methods that finished, and for its floor."""
    groups = {model: seconds_by(found) for model, found in outcomes.items()}
    for model, floor in floors.items():
        if floor is not None:
            groups[model]["floor"] = floor
    shown = {kind for bars in groups.values() for kind in bars}
    kinds = {kind: bar for kind, bar in _BARS.items() if kind != "lookahead" or kind in shown}
    return bar_chart(f"The tokens of one job, {device}", groups, kinds)


def settings_for(model: str, arguments: argparse.Namespace) -> Settings:
    """The plain command's settings for this model's job."""
    unused = arguments.output_dir.parent / "unused.png"
    typed = ["--gpt-model", model, "--device", str(arguments.device), "--output", str(unused)]
    if arguments.image_size is not None:
        typed += ["--image-size", str(arguments.image_size)]
    settings = resolve_settings(build_parser("", "scripts/speedup_table.py").parse_args(typed))
    most, images = len(settings.labels), arguments.images
    if images is not None and images > most:
        raise UserError(f"--images {images}: must be 1 to {most}, the labels of {model}")
    return replace(settings, labels=settings.labels[:images])


def timed(
    run: Callable[[], object], warm_up: Callable[[], object], repeats: int, device: torch.device
) -> dict[str, Any]:
    """The figures of a method."""
    warm_up_seconds = seconds_of(warm_up, device)
    times = [seconds_of(run, device) for _ in range(repeats)]
    return {"seconds": median(times), "repeats": times, "warm_up_seconds": warm_up_seconds}


def time_naive(gpt: Transformer, settings: Settings, repeats: int, compiled: bool) -> Outcome:
    """Times the plain loop as the plain command runs it."""
    config = gpt.config
    if compiled:
        gpt = cast(Transformer, torch.compile(gpt, mode="reduce-overhead", fullgraph=True))
    device, sampling = settings.model.device, settings.sampling
    tokens = settings.model.tokens_per_image
    labels = torch.tensor(settings.labels, device=device)

    def run(steps: int = tokens) -> None:
        torch.manual_seed(sampling.seed)
        with limited_cpu_threads(config, device):
            generate(
                gpt,
                labels,
                steps,
                cfg_scale=sampling.cfg_scale,
                cfg_interval=sampling.cfg_interval,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            )

    return timed(run, lambda: run(tokens if compiled else _EAGER_WARM_UP_TOKENS), repeats, device)


def time_paged(gpt: Transformer, settings: Settings, repeats: int, config: EngineConfig) -> Outcome:
    """Times the engine until the codes are on the host.

    Args:
        config: of the engine, whose rows are those of the job.
    """
    device, params, precision = settings.model.device, settings.sampling, settings.model.precision
    ceilings = measure_ceilings(device, precision) if device.type == "cuda" else None
    began, rows = now(device), len(settings.labels) * params.rows
    engine = Engine(gpt, None, replace(config, max_num_seqs=rows))
    start_seconds = now(device) - began
    drawn: list[Request] = []

    def run() -> None:
        with limited_cpu_threads(gpt.config, device):
            drawn[:] = draw_all(engine, settings.labels, [params] * len(settings.labels))

    timing = {**timed(run, run, repeats, device), "start_seconds": start_seconds}
    timing["tokens_a_pass"] = kept_a_pass(drawn)
    if ceilings is None:
        return timing
    job = job_floor(
        Floor(
            gpt.config, precision.itemsize, ceilings, quantization_of(gpt), config.kv_cache_dtype
        ),
        engine.scheduler.limits,
        [params] * len(settings.labels),
    )
    return {**timing, "floor_seconds": job.seconds, **asdict(ceilings)}


def work(arguments: argparse.Namespace) -> None:
    """In the fresh process: times one method of one model. Its last line is JSON, also if it
    fails.
    """
    (model,), (method,) = arguments.models, arguments.methods
    try:
        settings = settings_for(model, arguments)
        set_llamagen_numerics(settings.model.device)
        found = find_weights(settings.model)
        if method in ("paged", "lookahead"):
            gpt = load_models(settings.model, found, arguments.quantization).gpt
            config = engine_config(
                arguments, 1, lookahead="auto" if method == "lookahead" else "off"
            )
            timing = time_paged(gpt, settings, arguments.repeats, config)
        else:
            gpt = load_models(settings.model, found).gpt
            repeats = arguments.naive_repeats if method == "naive" else arguments.repeats
            timing = time_naive(gpt, settings, repeats, compiled=method == "compile")
    except Exception as error:  # whatever it is, it goes into the table, and the others go on
        told = [type(error).__name__, *str(error).strip().splitlines()[:1]]
        print(json.dumps({"error": ": ".join(told)}), flush=True)
        raise
    print(json.dumps({"timing": {**timing, "trained": found.trained}}), flush=True)


def run_method(script: str, model: str, method: str, options: Sequence[str]) -> Outcome:
    """The outcome of a method in a fresh process.

    The compiler's caches are the process's own: it times kernels to choose among them, and what it
    once chose on a busy GPU would be taken over, and be slow, for ever.
    """
    command = [sys.executable, script, "--worker", "--models", model, "--methods", method, *options]
    with tempfile.TemporaryDirectory() as caches:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches},
            check=False,
        )
    *_, last = ["", *done.stdout.splitlines()]
    if last.startswith(('{"timing"', '{"error"')):
        outcome: Outcome = json.loads(last)
    else:  # it died without a line of its own, as after a crash of the driver
        *_, reason = ["no message", *done.stderr.strip().splitlines()]
        outcome = {"error": f"the process ended with status {done.returncode}: {reason}"}
    if "error" in outcome:
        print(done.stderr, file=sys.stderr)
    return outcome


def code_version() -> str:
    """A digest of what is timed and of what times it: models, engine, kernels and their tables,
    this module, Triton.
    """
    digest = hashlib.sha256(triton.__version__.encode())
    folders = ("autoregressive/models", "autoregressive/serve/engine", "kernels")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in sorted([*sources, Path(__file__)]):
        if path.suffix in (".py", ".json"):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def options_of(arguments: argparse.Namespace) -> list[str]:
    """The flags that every fresh process gets."""
    flags = []
    for name in (
        "repeats",
        "device",
        "output_dir",
        "image_size",
        "images",
        "naive_repeats",
        "quantization",
        "kv_cache_dtype",
    ):
        value = getattr(arguments, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def run(arguments: argparse.Namespace, script: str) -> None:
    """Measures what is missing, and writes the table, the chart and the JSON. Exit status 1 if
    something failed.

    Args:
        script: the file to run in fresh processes.
    """
    arguments.device = use_device(arguments.device)
    arguments.naive_repeats = arguments.naive_repeats or arguments.repeats
    if arguments.worker:
        work(arguments)
        return
    on_gpu, folder = arguments.device.type == "cuda", arguments.output_dir
    if arguments.models is None and not on_gpu and arguments.image_size:
        tell(
            "without a GPU the demo model takes the others' place, at its size: --image-size "
            f"{arguments.image_size} is left out"
        )
        arguments.image_size = None
    job = {
        "image_size": arguments.image_size,  # None: the models' default
        "images": arguments.images,  # None: all labels
        "device": str(arguments.device),
        "device_name": device_name(arguments.device),
        "torch": torch.__version__,
        # what was measured before a change is not what is measured after it
        "code": code_version(),
        "repeats": arguments.repeats,
        "naive_repeats": arguments.naive_repeats,
        # of the engine alone
        "quantization": arguments.quantization,
        "kv_cache_dtype": arguments.kv_cache_dtype,
    }
    check_own_folder("--output-dir", folder)
    models = models_for(arguments.models, on_gpu)
    for model in models:
        settings_for(model, arguments)  # refuses what the model has not
    folder.mkdir(exist_ok=True)
    for name in ("speedup.json", "speedup.md", "speedup.png"):
        check_file("--output-dir", folder / name, Path(name).suffix)
    kept = folder / "speedup.json"
    outcomes = read_outcomes(kept, job)
    for model in models:
        for method in arguments.methods:
            measure(outcomes.setdefault(model, {}), model, method, arguments, script)
            report = save(kept, job, outcomes)
    shown = {
        model: {method: outcomes[model][method] for method in arguments.methods} for model in models
    }
    write_results(shown, report, folder)
    if any("error" in outcome for found in shown.values() for outcome in found.values()):
        sys.exit(1)


def measure(
    kept: dict[str, Outcome], model: str, method: str, arguments: argparse.Namespace, script: str
) -> None:
    """Runs a method of a model unless it has finished; one that failed is tried again. Prints a
    line.
    """
    if "timing" in kept.get(method, {}):
        told = f"kept from {arguments.output_dir}/speedup.json; another --output-dir measures again"
    else:
        kept[method] = outcome = run_method(script, model, method, options_of(arguments))
        failed = f"failed: {outcome.get('error')}"
        told = f"{outcome['timing']['seconds']:.3f} s" if "timing" in outcome else failed
    print(f"{model}, {method}: {told}", flush=True)


def write_results(shown: Outcomes, report: Mapping[str, Any], folder: Path) -> None:
    """Writes the table and the chart, and prints the table and the JSON."""
    job = report["job"]
    floors = {
        model: report["floor_seconds"][model] if "paged" in found else None
        for model, found in shown.items()
    }
    with_lookahead = any("lookahead" in found for found in shown.values())
    columns = (*_COLUMNS, *(_LOOKAHEAD_COLUMNS if with_lookahead else ()))
    rows = []
    for model, found in shown.items():
        parameters = sum(
            weight.numel() for weight in empty_transformer(model, job["image_size"]).parameters()
        )
        rows.append(cells(model, parameters, found, floors[model]))
        if with_lookahead:
            rows[-1] += lookahead_cells(found["lookahead"])
    plain = ""
    if job["naive_repeats"] != job["repeats"]:
        plain = f" (the plain loop: of {job['naive_repeats']})"
    medians = f"Each time is the median of {job['repeats']} after one warm-up{plain}."
    kinds = {"weights": job["quantization"], "keys and values": job["kv_cache_dtype"]}
    told = [f"{name} in {kind}" for name, kind in kinds.items() if kind not in (None, "auto")]
    if told:
        medians += f"\nThe engine alone has {' and '.join(told)}."
    table = f"{markdown(columns, rows)}\n{medians}\n"
    picture = chart(shown, floors, job["device_name"])
    write_whole(folder / "speedup.md", lambda part: part.write_text(table, encoding="utf-8"))
    write_whole(folder / "speedup.png", lambda part: picture.save(part))
    print(table)
    give_figures(report)
