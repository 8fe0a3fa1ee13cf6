"""Times the engine's steps: milliseconds a step and share of the memory floor, for each model and
number of rows. Ends in JSON.

    python scripts/benchmarks/bench_decode.py --models GPT-B,GPT-XL --rows 2,16,512
    python scripts/benchmarks/bench_decode.py --models GPT-XL --rows 512 --image-size 256 \\
        --images 1024 --pixels

Guided images with random weights, from class token to last token, so over all contexts; sampling
included. Two rows are one image. Times are medians of the repeats, after each engine has drawn one
image. The floor is that of autoregressive/serve/floor.py; both ceilings, read bandwidth and rate of
a matrix product, are measured in the same run, before each model, and the highest so far counts.
With --pixels, decoding goes on beside the steps, and ms/step, share and images/s count it. On a CPU
the demo model shows that it works; there is no floor then. Exit status 1 if a model failed; the
others are measured all the same.
"""

import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch

    from autoregressive.benchmarks.arguments import (
        add_device,
        add_engine_flags,
        add_image_size,
        add_models,
        add_output,
        add_repeats,
        give_figures,
        models_for,
        on_cpu,
        row_counts,
        script_parser,
        use_device,
        whole_number,
    )
    from autoregressive.benchmarks.models import random_transformer
    from autoregressive.devices import default_precision, now
    from autoregressive.models.defaults import model_defaults
    from autoregressive.models.gpt import Transformer
    from autoregressive.serve.engine.config import EngineConfig
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.serve.engine.model_runner import page_bytes
    from autoregressive.serve.floor import Ceilings, Floor, job_floor, measure_ceilings
    from autoregressive.weights.options import check_image_size
    from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel

_ROWS, _CPU_ROWS = "2,16,64,256,512", "2"


@dataclass(frozen=True)
class Options:
    """What is measured of every model."""

    rows: list[int]
    image_size: int | None  # None: 384; of GPT-demo 128
    images: int | None  # None: as many as run at once
    repeats: int
    pixels: bool
    deterministic: bool
    enforce_eager: bool
    device: torch.device


@dataclass(frozen=True)
class Result:
    """One model and number of rows."""

    model: str
    rows: int
    images: int
    steps: int
    seconds: float
    repeats: list[float]
    floor_seconds: float | None  # None: no GPU

    @property
    def step_ms(self) -> float:
        """Milliseconds that a step takes."""
        return self.seconds / self.steps * 1e3

    @property
    def share(self) -> float | None:
        """The floor divided by the time; None without a GPU."""
        return None if self.floor_seconds is None else self.floor_seconds / self.seconds

    def line(self) -> str:
        """The line of the table."""
        share = "-" if self.share is None else f"{self.share:.1%}"
        floor = (
            "-" if self.floor_seconds is None else f"{self.floor_seconds / self.steps * 1e3:.3f}"
        )
        return (
            f"{self.model:<9} {self.rows:>5} {self.step_ms:>9.3f} {floor:>9} {share:>7} "
            f"{self.images / self.seconds:>9.2f}"
        )


def build(model: str, options: Options) -> tuple[Transformer, VQModel | None]:
    """Random weights on the device: bf16 (fp16 on a GPU without), float32 on a CPU."""
    device = options.device
    gpt = random_transformer(model, options.image_size, device, default_precision(device))
    vq = None
    if options.pixels:
        torch.manual_seed(0)
        vq = VQ_models[model_defaults(model).vq_model]().to(device).eval().requires_grad_(False)
    return gpt, vq


def measure(model: str, options: Options, ceilings: Ceilings | None) -> dict[str, object]:
    """All numbers of rows of one model, with one engine."""
    device = options.device
    params = model_defaults(model).sampling
    gpt, vq = build(model, options)
    if ceilings is not None:
        torch.cuda.reset_peak_memory_stats(device)
    floor = Floor(gpt.config, gpt.output.weight.element_size(), ceilings or Ceilings(1.0, 1.0))
    config = EngineConfig(
        max(options.rows), deterministic=options.deterministic, enforce_eager=options.enforce_eager
    )
    began = now(device)
    engine = Engine(gpt, vq, config)
    start_seconds = now(device) - began
    engine.generate([0], params, decode=options.pixels)
    results = []
    for rows in options.rows:
        images = options.images or rows // params.rows
        labels = [image % engine.num_classes for image in range(images)]
        times = []
        for repeat in range(options.repeats):
            began = now(device)
            engine.generate(labels, replace(params, seed=repeat), decode=options.pixels)
            times.append(now(device) - began)
        job = job_floor(floor, engine.scheduler.limits, [params] * images)
        floor_seconds = None if ceilings is None else job.seconds
        results.append(
            Result(model, rows, images, job.steps, statistics.median(times), times, floor_seconds)
        )
        print(results[-1].line(), flush=True)
    report: dict[str, object] = {
        "model": model,
        "start_seconds": start_seconds,
        "results": [with_rates(each) for each in results],
    }
    if ceilings is not None:
        report["ceilings"] = asdict(ceilings)
        report["memory_gib"] = memory_gib(engine, gpt)
    return report


def memory_gib(engine: Engine, gpt: Transformer) -> dict[str, float]:
    """The peak of what torch has taken from the GPU, and what of it is neither weights
    nor pages.
    """
    limits = engine.scheduler.limits
    peak = torch.cuda.max_memory_reserved(engine.device)
    weights = sum(parameter.nbytes for parameter in gpt.parameters())
    pages = limits.num_pages * page_bytes(gpt, limits.page_size)
    sizes = {"peak": peak, "weights": weights, "pages": pages, "other": peak - weights - pages}
    return {name: size / 2**30 for name, size in sizes.items()}


def with_rates(result: Result) -> dict[str, object]:
    """A result with its rates, ready for JSON."""
    return asdict(result) | {
        "step_ms": result.step_ms,
        "share": result.share,
        "images_per_second": result.images / result.seconds,
    }


def measure_all(models: Sequence[str], options: Options) -> Iterator[dict[str, object]]:
    """One after the other; the ceilings are measured three times before the first, while the GPU is
    cool, and before each.
    """
    ceilings = None
    for number, model in enumerate(models):
        for _ in range(0 if options.device.type != "cuda" else 3 if number == 0 else 1):
            measured = measure_ceilings(options.device, default_precision(options.device))
            ceilings = measured if ceilings is None else ceilings.or_higher(measured)
        yield measure_or_say_why(model, options, ceilings)


def measure_or_say_why(
    model: str, options: Options, ceilings: Ceilings | None
) -> dict[str, object]:
    """Measures one model. If that fails, it says why, so that the others are still measured."""
    try:
        return measure(model, options, ceilings)
    except Exception as error:  # a compiler's errors are of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"{model:<9} failed: {reason}", flush=True)
        return {"model": model, "error": reason}
    finally:  # the next model needs the memory
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()


def parse_arguments(argv: Sequence[str] | None) -> tuple[list[str], Options, Path | None]:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_models(parser)
    parser.add_argument(
        "--rows",
        type=row_counts,
        metavar="NUMBERS",
        help=(
            "rows that run at once: even numbers, with commas between them (default: "
            f"{_ROWS}{on_cpu(_CPU_ROWS)})"
        ),
    )
    add_image_size(parser)
    parser.add_argument(
        "--images",
        type=whole_number(1),
        metavar="N",
        help=(
            "also more than run at once; goes with one number of --rows (default: as many as "
            "run at once)"
        ),
    )
    add_repeats(parser, 3)
    parser.add_argument(
        "--pixels",
        action="store_true",
        help="decode the images' pixels too (default: tokens alone)",
    )
    add_engine_flags(parser)
    add_device(parser)
    add_output(parser)
    typed = parser.parse_args(argv)
    device = typed.device
    typed.models = models_for(typed.models, device)
    typed.rows = typed.rows or row_counts(_ROWS if device.type == "cuda" else _CPU_ROWS)
    if typed.image_size is not None:
        for model in typed.models:
            check_image_size(model, typed.image_size)
    if typed.images is not None and len(typed.rows) > 1:
        raise UserError(f"--images {typed.images}: goes with one number of --rows")
    options = Options(
        rows=typed.rows,
        image_size=typed.image_size,
        images=typed.images,
        repeats=typed.repeats,
        pixels=typed.pixels,
        deterministic=typed.deterministic,
        enforce_eager=typed.enforce_eager,
        device=device,
    )
    return typed.models, options, typed.output


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    models, options, output = parse_arguments(argv)
    torch.set_num_threads(1)  # a GPU computes, or the demo model's products are too small to share
    device_name = use_device(options.device)
    print(f"{device_name}, median of {options.repeats}")
    print(f"{'model':<9} {'rows':>5} {'ms/step':>9} {'floor ms':>9} {'share':>7} {'images/s':>9}")
    results = list(measure_all(models, options))
    report = {
        "benchmark": "decode",
        "device": device_name,
        "torch": torch.__version__,
        "options": asdict(options) | {"device": str(options.device)},
        "models": results,
    }
    give_figures(report, output)
    if any("error" in model for model in results):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
