"""How much faster the engine is: for each model LlamaGen's plain loop, the same compiled, and the
engine. A table, a chart, JSON.

    python scripts/speedup_table.py --models GPT-B,GPT-L,GPT-XL,GPT-XXL,GPT-3B --image-size 384

The job is that of the commands: the tokens of LlamaGen's eight labels, guided, with each model's
defaults; bf16 on a GPU. Weights are random where none are found: speed does not depend on them.
Each model runs in a fresh process; times are medians after one warm-up (16 tokens of the plain
loop, which compiles nothing; the whole job for the others, compiled anew each time). The floor and
its share are those of autoregressive/serve/floor.py, at the highest bandwidth that the models'
processes have measured. The table goes to speedup.md in --output-dir, the chart to speedup.png.
What is finished is kept in speedup.json there: a run that was broken off, or in which something
failed (exit status 1), goes on where it was. On a CPU the demo model takes the others' place.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError, tell

with slow_imports(__name__):
    import torch
    import triton

    from autoregressive.benchmarks.arguments import (
        add_device,
        add_image_size,
        add_models,
        add_repeats,
        models_for,
        names,
        script_parser,
        whole_number,
    )
    from autoregressive.benchmarks.speedup_report import (
        METHODS,
        Results,
        SpeedupJob,
        Timing,
        chart,
        markdown,
    )
    from autoregressive.cli.drawing import Settings, resolve_settings
    from autoregressive.cli.flags import build_parser
    from autoregressive.devices import limited_cpu_threads, now
    from autoregressive.files import check_file, check_own_folder, write_whole
    from autoregressive.models.generate import generate
    from autoregressive.models.gpt import Transformer
    from autoregressive.output.records import device_name
    from autoregressive.sample.naive import set_numerics
    from autoregressive.serve.engine.config import EngineConfig
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.serve.floor import Floor, job_floor, measure_ceilings
    from autoregressive.weights.finding import find_weights
    from autoregressive.weights.loading import load_models

ROOT = Path(__file__).resolve().parents[1]
_EAGER_WARM_UP_TOKENS = 16


def settings_for(model: str, job: SpeedupJob, folder: Path) -> Settings:
    """The naive command's settings for this model's job."""
    typed = ["--gpt-model", model, "--device", job.device, "--output", str(folder / "unused.png")]
    if job.image_size is not None:
        typed += ["--image-size", str(job.image_size)]
    settings = resolve_settings(build_parser("", "scripts/speedup_table.py").parse_args(typed))
    if job.images is not None and job.images > len(settings.labels):
        raise UserError(
            f"--images {job.images}: must be 1 to {len(settings.labels)}, the labels of {model}"
        )
    return replace(settings, labels=settings.labels[: job.images])


def time_naive(settings: Settings, repeats: int, compiled: bool) -> Timing:
    """Times the plain loop as the naive command runs it."""
    set_numerics(settings)
    found = find_weights(settings.model)
    gpt = load_models(settings.model, found).gpt
    if compiled:
        gpt = cast(Transformer, torch.compile(gpt, mode="reduce-overhead", fullgraph=True))
    device, tokens, sampling = (
        settings.model.device,
        settings.model.tokens_per_image,
        settings.sampling,
    )
    labels = torch.tensor(settings.labels, device=device)

    def run(steps: int = tokens) -> None:
        torch.manual_seed(sampling.seed)
        with limited_cpu_threads(gpt.config, device):
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

    warm_up_seconds = seconds_of(lambda: run(tokens if compiled else _EAGER_WARM_UP_TOKENS), device)
    times = [seconds_of(run, device) for _ in range(repeats)]
    return Timing(statistics.median(times), times, warm_up_seconds, found.trained)


def time_paged(settings: Settings, repeats: int) -> Timing:
    """Times the engine until the codes are on the host."""
    set_numerics(settings)
    found = find_weights(settings.model)
    gpt = load_models(settings.model, found).gpt
    device, params = settings.model.device, settings.sampling
    ceilings = measure_ceilings(device, settings.model.precision) if device.type == "cuda" else None
    rows = len(settings.labels) * params.rows
    began = now(device)
    engine = Engine(gpt, None, EngineConfig(max_num_seqs=rows))
    start_seconds = now(device) - began

    def run() -> None:
        with limited_cpu_threads(gpt.config, device):
            engine.generate(settings.labels, params, decode=False)

    warm_up_seconds = seconds_of(run, device)
    times = [seconds_of(run, device) for _ in range(repeats)]
    timing = Timing(statistics.median(times), times, warm_up_seconds, found.trained, start_seconds)
    if ceilings is None:
        return timing
    floor = Floor(gpt.config, settings.model.precision.itemsize, ceilings)
    job = job_floor(floor, engine.scheduler.limits, [params] * len(settings.labels))
    return replace(timing, floor_seconds=job.seconds, **asdict(ceilings))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run; the device is idle before and after it."""
    began = now(device)
    run()
    return now(device) - began


def work(arguments: argparse.Namespace, job: SpeedupJob) -> None:
    """In the fresh process: times one model's methods in turn, a line of JSON each; the first
    failure is the last line.
    """
    (model,) = arguments.models
    for method in arguments.methods:
        try:
            settings = settings_for(model, job, arguments.output_dir)
            if method == "paged":
                timing = time_paged(settings, job.repeats)
            else:
                timing = time_naive(
                    settings,
                    job.naive_repeats if method == "naive" else job.repeats,
                    method == "compile",
                )
        except Exception as error:  # whatever it is, it goes into the table, and the others go on
            print(json.dumps({"method": method, "error": first_line(error)}), flush=True)
            raise
        print(json.dumps({"method": method, "timing": asdict(timing)}), flush=True)


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_model(
    model: str, methods: Sequence[str], options: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs the worker, again in a fresh process after each failure; yields each method's timing or
    error as it comes.

    The compiler's caches are the worker's own: it times kernels to choose among them, and what it
    once chose on a busy GPU would be taken over, and be slow, for ever.
    """
    left = list(methods)
    while left:
        command = [
            sys.executable,
            __file__,
            "--worker",
            "--models",
            model,
            "--methods",
            ",".join(left),
            *options,
        ]
        with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as caches:
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            ) as process:
                assert process.stdout is not None
                failed = False
                try:
                    for line in process.stdout:
                        if not line.startswith('{"method"'):  # a library's word
                            continue
                        outcome = json.loads(line)
                        left.remove(outcome["method"])
                        failed = failed or "error" in outcome
                        yield outcome.pop("method"), outcome
                except BaseException:
                    # After Ctrl-C the worker, which need not have heard it, would go on using the
                    # GPU.
                    process.kill()
                    raise
            errors.seek(0)
            said = errors.read().strip()
        if failed:
            print(said, file=sys.stderr)
        elif process.returncode != 0 and left:
            # It died without a line of its own, as after a crash of the driver.
            reason = said.splitlines()[-1] if said else "no message"
            told = f"the process ended with status {process.returncode}: {reason}"
            yield left.pop(0), {"error": told}


def code_version() -> str:
    """A digest of what is timed and of what times it: models, engine, kernels and their tables,
    this script, Triton.
    """
    digest = hashlib.sha256(triton.__version__.encode())
    folders = [
        ROOT / "autoregressive" / "models",
        ROOT / "autoregressive" / "serve" / "engine",
        ROOT / "kernels",
    ]
    sources = [
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".json")
    ]
    for path in sorted([*sources, ROOT / "scripts" / "speedup_table.py"]):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_models(parser)
    parser.add_argument(
        "--methods",
        type=names(METHODS),
        default=list(METHODS),
        metavar="NAMES",
        help=(
            "of naive (the plain loop), compile (the same compiled) and paged (the engine), "
            "with commas (default: all)"
        ),
    )
    add_image_size(parser)
    parser.add_argument(
        "--images",
        type=whole_number(1),
        metavar="N",
        help="how many of the eight labels (default: all)",
    )
    add_repeats(parser, 3)
    parser.add_argument(
        "--naive-repeats",
        type=whole_number(1),
        metavar="N",
        help="the same of the plain loop, which takes long (default: as --repeats)",
    )
    add_device(parser)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("speedup"),
        metavar="DIR",
        help=("where the table, the chart and the JSON go; made if need be (default: %(default)s)"),
    )
    # in the fresh process
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.models is None and arguments.device.type != "cuda" and arguments.image_size:
        tell(
            "without a GPU the demo model takes the others' place, at its size: --image-size "
            f"{arguments.image_size} is left out"
        )
        arguments.image_size = None
    arguments.models = models_for(arguments.models, arguments.device)
    return arguments


def worker_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags that every model's fresh process gets."""
    flags = ["--repeats", str(arguments.repeats), "--device", str(arguments.device)]
    flags += ["--output-dir", str(arguments.output_dir)]
    for name in ("image_size", "images", "naive_repeats"):
        if getattr(arguments, name) is not None:
            flags += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    arguments = parse_arguments(argv)
    repeats = arguments.repeats, arguments.naive_repeats or arguments.repeats
    job = SpeedupJob(
        arguments.image_size,
        arguments.images,
        str(arguments.device),
        device_name(arguments.device),
        torch.__version__,
        code_version(),
        *repeats,
    )
    if arguments.worker:
        work(arguments, job)
        return
    folder: Path = arguments.output_dir
    check_own_folder("--output-dir", folder)
    for model in arguments.models:
        settings_for(model, job, folder.parent)  # refuses what the model has not
    folder.mkdir(exist_ok=True)
    for name in ("speedup.json", "speedup.md", "speedup.png"):
        check_file("--output-dir", folder / name, Path(name).suffix)
    results = Results(folder / "speedup.json", job)
    options = worker_flags(arguments)
    for model in arguments.models:
        missing = results.missing(model, arguments.methods)
        kept = [method for method in arguments.methods if method not in missing]
        if kept:
            source = folder / "speedup.json"
            print(
                f"{model}, {', '.join(kept)}: kept from {source}; another --output-dir measures "
                "again",
                flush=True,
            )
        for method, outcome in run_model(model, missing, options):
            results.keep(model, method, outcome)
            told = (
                f"{outcome['timing']['seconds']:.3f} s"
                if "timing" in outcome
                else f"failed: {outcome['error']}"
            )
            print(f"{model}, {method}: {told}", flush=True)
    results.save()
    rows = [results.row(model, arguments.methods) for model in arguments.models]
    table = f"{markdown(rows)}\n{job.medians_of()}\n"
    write_whole(folder / "speedup.md", lambda part: part.write_text(table, encoding="utf-8"))
    write_whole(folder / "speedup.png", lambda part: chart(rows, job.device_name).save(part))
    print(table)
    print(json.dumps(results.report()))
    if any(row.errors for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
