"""Times the engine's steps: milliseconds a step and share of the memory floor, for each model and
number of rows. Ends in JSON.

    python scripts/benchmarks/bench_decode.py --models GPT-B,GPT-XL --rows 2,16,512
    python scripts/benchmarks/bench_decode.py --models GPT-XL --rows 512 --image-size 256 \\
        --images 1024 --pixels
    python scripts/benchmarks/bench_decode.py --models GPT-XL --rows 2,4,8,16,32 --lookahead 4,8,16
    python scripts/benchmarks/bench_decode.py --models GPT-3B --rows 2,16 --tensor-parallel-size 2

Guided images with random weights, from class token to last token, so over all contexts; sampling
included. Two rows are one image. Times are medians of the repeats, after each engine has drawn one
image. The floor is that of autoregressive/serve/floor.py; both ceilings, read bandwidth and rate of
a matrix product, are measured in the same run, before each model, and the highest so far counts.
The floor of several GPUs (--tensor-parallel-size) is that of each of them.
With --pixels, decoding goes on beside the steps, and ms/step, share and images/s count it. On a CPU
the demo model shows that it works; there is no floor then. Exit status 1 if a model failed; the
others are measured all the same.

With --lookahead the table shows passes by their positions instead, beside those of one token. A
pass is timed while no guess holds. It pays where it keeps more tokens than `pays from`: so many
times longer it takes than one of one token. `2x` and `3x` are jobs whose guesses are offered, as
many of them right as make a pass keep 2 or 3 tokens on average: the tokens that it did keep, the
seconds of the job, and how many times faster it was than without lookahead. Offering guesses takes
some microseconds a pass, which are counted: --lookahead 1 has them without a window.
"""

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch

    from autoregressive.benchmarks.guessing import GuessingRunner
    from autoregressive.benchmarks.harness import (
        empty_transformer,
        random_tokenizer,
        seconds_of,
        use_device,
        with_random_weights,
    )
    from autoregressive.benchmarks.script import (
        Table,
        add_device,
        add_engine_flags,
        add_image_size,
        add_models,
        add_output,
        add_repeats,
        give_figures,
        listed,
        lookahead,
        models_for,
        on_cpu,
        row_count,
        script_parser,
        whole_number,
    )
    from autoregressive.benchmarks.window_times import FEWER_PASSES, guess_ms, time_window
    from autoregressive.devices import default_precision, now
    from autoregressive.models.defaults import model_defaults
    from autoregressive.models.gpt import Transformer
    from autoregressive.output.records import device_name
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.serve.engine.engine_config import EngineConfig
    from autoregressive.serve.engine.kv_pages import page_bytes, page_dtype
    from autoregressive.serve.engine.model_runner import ModelRunner
    from autoregressive.serve.engine_flags import add_tensor_parallel_flag, engine_config
    from autoregressive.serve.floor import Ceilings, Floor, job_floor, measure_ceilings
    from autoregressive.serve.worker.rank_processes import start_ranks
    from autoregressive.weights.finding import resolve_model
    from autoregressive.weights.loading import load_gpt
    from autoregressive.weights.options import ModelOptions, check_image_size
    from autoregressive.weights.quantized import weight_bytes

_ROWS, _CPU_ROWS = [2, 16, 64, 256, 512], [2]
_COLUMNS = {
    "model": "<9",
    "rows": ">5",
    "ms/step": ">9.3f",
    "floor ms": ">9.3f",
    "share": ">7.1%",
    "images/s": ">9.2f",
}
_LOOKAHEAD_COLUMNS = {
    "model": "<9",
    "rows": ">5",
    "lookahead": ">9",
    "ms/pass": ">9.3f",
    "pays from": ">9.2f",
    "seconds": ">8.3f",
    **{
        f"{tokens:g}x {name}": form
        for tokens in FEWER_PASSES
        for name, form in (("kept", ">7.2f"), ("s", ">7.3f"), ("speed", ">8.2f"))
    },
}


def measure(
    model: str, options: argparse.Namespace, ceilings: Ceilings | None, table: Table
) -> dict[str, Any]:
    """All numbers of rows of one model, with one engine."""
    device: torch.device = options.device
    defaults = model_defaults(model)
    settings = resolve_model(
        ModelOptions(
            gpt_model=model,
            image_size=options.image_size,
            device=str(device),
            random_weights=True,
        )
    )
    vq = random_tokenizer(defaults.vq_model, device) if options.pixels else None
    config = engine_config(options, max(options.rows), lookahead="off")
    with start_ranks(settings, None, config) as ranks:
        gpt = load_gpt(settings, None, rank=ranks.rank)
        if ceilings is not None:
            torch.cuda.reset_peak_memory_stats(device)
        floor = floor_of(gpt, config, ceilings)
        began = now(device)
        engine = Engine(gpt, vq, ranks.config, ranks.make_runner)
    try:
        return time_engine(engine, gpt, model, options, floor, ceilings, table, now(device) - began)
    finally:
        ranks.stop()


def time_engine(
    engine: Engine,
    gpt: Transformer,
    model: str,
    options: argparse.Namespace,
    floor: Floor,
    ceilings: Ceilings | None,
    table: Table,
    start_seconds: float,
) -> dict[str, Any]:
    """All numbers of rows of an engine that has been started."""
    device, params = engine.device, model_defaults(model).sampling
    report: dict[str, Any] = {
        "model": model,
        "start_seconds": start_seconds,
        "results": [],
    }
    engine.generate([0], params, decode=options.pixels)
    for rows in options.rows:
        images = options.images or rows // params.rows
        labels = [image % engine.num_classes for image in range(images)]
        seeded = [replace(params, seed=seed) for seed in range(options.repeats)]
        draw = partial(engine.generate, labels, decode=options.pixels)
        times = [seconds_of(partial(draw, each), device) for each in seeded]
        seconds = median(times)
        job = job_floor(floor, engine.scheduler.limits, [params] * images)
        floor_seconds = None if ceilings is None else job.seconds
        result = {
            "model": model,
            "rows": rows,
            "images": images,
            "steps": job.steps,
            "seconds": seconds,
            "repeats": times,
            "floor_seconds": floor_seconds,
            "step_ms": seconds / job.steps * 1e3,
            "share": floor_seconds and floor_seconds / seconds,
            "images_per_second": images / seconds,
        }
        report["results"].append(result)
        floor_ms = floor_seconds and floor_seconds / job.steps * 1e3
        table.row(model, rows, result["step_ms"], floor_ms, result["share"], images / seconds)
    if ceilings is not None:
        report["ceilings"] = asdict(ceilings)
        report["memory_gib"] = memory_gib(engine, gpt)
    return report


def measure_lookahead(
    model: str, options: argparse.Namespace, ceilings: Ceilings | None, table: Table
) -> dict[str, Any]:
    """All settings and numbers of rows of one model, with one engine a setting."""
    params = model_defaults(model).sampling
    gpt = with_random_weights(
        empty_transformer(model, options.image_size),
        options.device,
        default_precision(options.device),
    )
    results: list[dict[str, Any]] = []
    # by rows, with lookahead off
    alone: dict[int, dict[str, Any]] = {}
    for setting in dict.fromkeys(["off", *options.lookahead]):
        config = engine_config(options, max(options.rows), lookahead=setting)
        floor = floor_of(gpt, config, ceilings)
        engine = Engine(gpt, None, config, ModelRunner if setting == "off" else GuessingRunner)
        guessing_ms = guess_ms(engine)
        for rows in options.rows:
            images = rows // params.rows
            labels = [image % engine.num_classes for image in range(images)]
            times = time_window(engine, labels, params, options.repeats)
            steps = job_floor(floor, engine.scheduler.limits, [params] * images).steps
            result = {
                "model": model,
                "rows": rows,
                "lookahead": setting,
                "images": images,
                "pass_ms": times.no_guess_holds.seconds / steps * 1e3,
                "guess_ms": guessing_ms,
                **asdict(times),
            }
            results.append(result)
            alone.setdefault(rows, result)
            table.row(*lookahead_row(result, alone[rows]))
        del engine
        free_memory(options.device)  # the next engine needs it
    return {"model": model, "results": results}


def floor_of(gpt: Transformer, config: EngineConfig, ceilings: Ceilings | None) -> Floor:
    """The memory floor of a model in an engine. Without ceilings it counts steps alone."""
    return Floor(
        gpt.config,
        gpt.output.weight.element_size(),
        ceilings or Ceilings(1.0, 1.0),
        config.quantization,
        config.kv_cache_dtype,
    )


def lookahead_row(result: dict[str, Any], alone: dict[str, Any]) -> list[object]:
    """A line of the table.

    Args:
        alone: the same rows with lookahead off.
    """
    seconds, off_seconds = (each["no_guess_holds"]["seconds"] for each in (result, alone))
    row = [result["model"], result["rows"], result["lookahead"], result["pass_ms"]]
    row += [None if result is alone else result["pass_ms"] / alone["pass_ms"], seconds]
    for tokens in FEWER_PASSES:
        timing = result["fewer"].get(tokens)
        if timing is None:
            row += [None, None, None]
        else:
            found = timing["seconds"]
            row += [timing["tokens_a_pass"], found, off_seconds / found]
    return row


def free_memory(device: torch.device) -> None:
    """Returns what no object holds any more to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_gib(engine: Engine, gpt: Transformer) -> dict[str, float]:
    """The peak of what torch has taken from the GPU, and what of it is neither weights
    nor pages.
    """
    limits = engine.scheduler.limits
    peak = torch.cuda.max_memory_reserved(engine.device)
    weights = weight_bytes(gpt)
    pages = limits.num_pages * page_bytes(gpt, limits.page_size, page_dtype(gpt, engine.config))
    sizes = {"peak": peak, "weights": weights, "pages": pages, "other": peak - weights - pages}
    return {name: size / 2**30 for name, size in sizes.items()}


def measure_all(options: argparse.Namespace, table: Table) -> Iterator[dict[str, Any]]:
    """One model after the other. One that fails is reported with the reason, so that the others are
    still measured.

    The ceilings are measured three times before the first, while the GPU is cool, and before each.
    """
    ceilings = None
    device = options.device
    for number, model in enumerate(options.models):
        for _ in range(0 if device.type != "cuda" else 3 if number == 0 else 1):
            measured = measure_ceilings(device, default_precision(device))
            ceilings = measured if ceilings is None else ceilings.or_higher(measured)
        try:
            how = measure if options.lookahead is None else measure_lookahead
            yield how(model, options, ceilings, table)
        except Exception as error:  # a compiler's errors are of many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"{model:<9} failed: {reason}", flush=True)
            yield {"model": model, "error": reason}
        free_memory(device)  # the next model needs it


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_models(parser)
    parser.add_argument(
        "--rows",
        type=listed(row_count),
        metavar="NUMBERS",
        help="rows that run at once: even numbers, with commas between them (default: "
        f"{','.join(map(str, _ROWS))}{on_cpu(_CPU_ROWS[0])})",
    )
    add_image_size(parser)
    parser.add_argument(
        "--images",
        type=whole_number(1),
        metavar="N",
        help="also more than run at once; goes with one number of --rows (default: as many as run "
        "at once)",
    )
    add_repeats(parser, 3)
    parser.add_argument(
        "--pixels",
        action="store_true",
        help="decode the images' pixels too (default: tokens alone)",
    )
    parser.add_argument(
        "--lookahead",
        type=listed(lookahead),
        metavar="SETTINGS",
        help="positions of an image that a pass computes, or auto, with commas between them; shows "
        "their table instead (default: none)",
    )
    add_engine_flags(parser)
    add_tensor_parallel_flag(parser)
    parser.set_defaults(tensor_parallel_size=EngineConfig.tensor_parallel_size)
    add_device(parser)
    add_output(parser)
    typed = parser.parse_args(argv)
    typed.device = use_device(typed.device)
    on_gpu = typed.device.type == "cuda"
    typed.models = models_for(typed.models, on_gpu)
    typed.rows = typed.rows or (_ROWS if on_gpu else _CPU_ROWS)
    for model in typed.models if typed.image_size is not None else []:
        check_image_size(model, typed.image_size)
    for flag, given in (("--pixels", typed.pixels), ("--images", typed.images)):
        if typed.lookahead is not None and given:
            raise UserError(f"{flag}: does not go with --lookahead")
    if typed.tensor_parallel_size > 1:
        if typed.lookahead is not None:
            raise UserError("--lookahead: does not go with --tensor-parallel-size")
        if len(typed.models) > 1:  # ranks meet through each other's memory once in a process
            raise UserError("--tensor-parallel-size: goes with one of --models")
    if typed.images is not None and len(typed.rows) > 1:
        raise UserError(f"--images {typed.images}: goes with one number of --rows")
    return typed


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    typed = parse_arguments(argv)
    torch.set_num_threads(1)  # a GPU computes, or the demo model's products are too small to share
    device = device_name(typed.device)
    print(f"{device}, median of {typed.repeats}")
    columns = _COLUMNS if typed.lookahead is None else _LOOKAHEAD_COLUMNS
    results = list(measure_all(typed, Table(columns)))
    options = {**vars(typed), "device": str(typed.device)}
    figures = {
        "benchmark": "decode",
        "device": device,
        "torch": torch.__version__,
        "options": {key: options[key] for key in options if key not in ("models", "output")},
        "models": results,
    }
    give_figures(figures, typed.output)
    if any("error" in model for model in results):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
