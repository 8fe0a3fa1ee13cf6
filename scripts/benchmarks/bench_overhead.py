"""What HTTP costs: images a second of the engine alone and behind the service.

    python scripts/benchmarks/bench_overhead.py --gpt-model GPT-XL --image-size 256 --rows 512

The service is saturated by scripts/benchmarks/bench_serve.py: as many requests under way as fill
the rows twice, of one guided image each, without previews, so that when a wave of them ends, those
wait already who take its rows. What counts is the slope of images over time, after two waves and
until no more is asked for. Beside it another process asks for /health and /metrics. Before that,
the rows are filled once, and the time to the first preview of a lone request is taken, half drawn.
The engine alone draws four times as many images as fit, with their pixels
(scripts/benchmarks/bench_decode.py). With --in-a-thread also the service with its engine in a
thread of the same process. With --data-parallel-size also so many engines behind one service, with
as many times the requests, from as many processes. Random weights; each in processes of its own.
Ends in JSON.
"""

import argparse
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    from autoregressive.benchmarks.script import (
        add_model,
        add_quantization,
        add_repeats,
        add_values,
        give_figures,
        script_parser,
        whole_number,
    )
    from autoregressive.benchmarks.service import (
        WAVES,
        at_once,
        last_json,
        percentiles,
        running_service,
        saturate,
        script,
    )
    from autoregressive.models.sampling_params import SamplingParams
    from autoregressive.serve import api_server, lifecycle
    from autoregressive.serve.web.openai_routes import partial_rows
    from autoregressive.serve.web.server_flags import read_arguments
    from autoregressive.serve.web.server_settings import ServerSettings, resolve_server_settings
    from autoregressive.serve.worker.previews import fill_undrawn
    from autoregressive.serve.worker.process import connect
    from autoregressive.serve.worker.worker import MakeEngine, StartProcess, build_engine, serve
    from autoregressive.weights.finding import FoundWeights

_IN_THREAD, _LONE = "--serve-in-a-thread", "--draw-lone-previews"  # how this script runs itself
_LONE_REQUESTS = 21  # of which the first warms up
_LEAST_SECONDS = 10  # of a run
_NO_WEIGHTS = FoundWeights(None, None)


def settings_of(flags: Sequence[str]) -> ServerSettings:
    """The service's settings, as its command reads them."""
    return resolve_server_settings(read_arguments(flags, os.environ))


def recipe_of(settings: ServerSettings) -> MakeEngine:
    """How an engine is built with random weights."""
    return partial(build_engine, settings.model, _NO_WEIGHTS, settings.engine, SamplingParams())


def serve_with(settings: ServerSettings, start: StartProcess) -> int:
    """The service's command with random weights and engines that `start` starts otherwise."""
    recipe = recipe_of(settings)
    with lifecycle.listen(settings) as listeners:
        return lifecycle.serve(
            settings,
            lifecycle.served_model(settings, _NO_WEIGHTS),
            lambda index: recipe,
            listeners,
            start,
        )


class EngineThread(threading.Thread):
    """Stands in for the engine's process."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the thread; returns the status of a process that has ended."""
        self.join(timeout)
        return 0

    def kill(self) -> None:
        """Does nothing, because a thread cannot be killed."""


def start_in_a_thread(make_engine: MakeEngine, name: str) -> tuple[Any, socket.socket]:
    """Starts the engine in a thread; the arguments are those of `worker.start_process`."""
    ours, theirs = connect()
    thread = EngineThread(target=serve, args=(make_engine, theirs), daemon=True)
    thread.start()
    return thread, ours


def draw_lone_previews(flags: Sequence[str]) -> int:
    """What the engine itself takes to the first preview of a lone request, as bench_serve.py asks
    for it: half of the rows.
    """
    settings = settings_of(flags)
    engine = recipe_of(settings)(lambda done, total: None)
    assert engine.decoder is not None
    grid = settings.model.grid
    rows = partial_rows(1, grid)[0]
    times = []
    for seed in range(_LONE_REQUESTS):
        begun = time.monotonic()
        sampling = settings.model.defaults.sampling.updated(top_k=0, seed=seed)
        request = engine.submit(seed, sampling)
        while request.steps < rows * grid:
            engine.step()
        codes = engine.peek([request]).result()[0].codes
        engine.decoder.submit_to_host(fill_undrawn(codes, rows, grid)).result()
        times.append(time.monotonic() - begun)
        engine.cancel(request)
        while not request.ended:
            engine.step()
    give_figures({"first_preview_seconds": percentiles(times[1:])})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags, measures, prints a table and JSON."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == [_IN_THREAD]:
        return serve_with(settings_of(given[1:]), start_in_a_thread)
    if given[:1] == [_LONE]:
        return draw_lone_previews(given[1:])
    arguments = parse_arguments(given)
    model, rows, engines = arguments.gpt_model, arguments.rows, arguments.data_parallel_size
    size = [] if arguments.image_size is None else ["--image-size", str(arguments.image_size)]
    quantized = ["--kv-cache-dtype", arguments.kv_cache_dtype]
    if arguments.quantization is not None:
        quantized += ["--quantization", arguments.quantization]
    flags = ["--gpt-model", model, *size, "--random-weights", "--max-num-seqs", str(rows)]
    flags += quantized
    # as bench_decode.py, which times the engine alone
    flags += ["--port", "0", "--max-queue-size", "10000", "--lookahead", "off"]
    process = [sys.executable, api_server.__file__, *flags]
    commands = {"in a process": (process, 1)}
    if arguments.in_a_thread:
        commands["in a thread"] = ([sys.executable, __file__, _IN_THREAD, *flags], 1)
    if engines > 1:
        commands[f"in {engines} processes"] = (
            [*process, "--data-parallel-size", str(engines)],
            engines,
        )
    job = ("--models", model, "--rows", rows, "--images", 2 * rows, "--pixels", *size, *quantized)
    decoded = last_json(script("bench_decode.py", *job))
    alone = decoded["models"][0]["results"][0]["images_per_second"]
    lone = last_json([sys.executable, __file__, _LONE, *flags])["first_preview_seconds"]
    seconds = seconds_of_load(arguments.seconds, rows / 2 / alone)
    results: dict[str, Any] = {
        "alone": {"images_per_second": alone, "lone_first_preview_seconds": lone}
    }
    print(f"the engine alone: {alone:.2f} images/s, lone preview {lone}", flush=True)
    for where, (command, count) in commands.items():
        results[where] = result = behind(command, rows * count, seconds, arguments.repeats, count)
        rate = result["images_per_second"]
        print(
            f"behind HTTP, engine {where}: {rate:.2f} images/s ({rate / (alone * count):.1%}), "
            f"lone preview {result['lone_first_preview_seconds']}",
            flush=True,
        )
        for run in result["runs"]:
            print(f"    a run: {run}", flush=True)
    figures = {"benchmark": "overhead", "model": model, "rows": rows, "quantized": quantized}
    give_figures(figures | {"results": results})
    return 0


def seconds_of_load(asked: int | None, wave_seconds: float) -> int:
    """How long a run lasts: as asked, or enough for waves of images, each of which takes so long,
    to be counted.

    Raises:
        UserError: that is too short.
    """
    least = math.ceil(WAVES * wave_seconds)
    if asked is not None and asked < least:
        raise UserError(
            f"--seconds {asked}: {WAVES} waves of images take {least} s here; give as many, or "
            "leave it out"
        )
    return max(_LEAST_SECONDS, least) if asked is None else asked


def behind(
    command: Sequence[str], concurrency: int, seconds: int, repeats: int, clients: int
) -> dict[str, Any]:
    """What a service that `command` starts does: with a lone request at a time, then several times
    with so many.

    Before that, about so many once, for what a service does the first time only.

    Args:
        clients: processes that ask.
    """
    with running_service(command) as (_, url):
        bench = script("bench_serve.py", "--url", url)
        at_once([[*bench, "--rates", str(concurrency / clients / 2), "--seconds", "2"]] * clients)
        lone = last_json([*bench, "--saturate", "1", "--seconds", str(seconds / 2)])["results"][0]
        runs = [saturate(bench, url, concurrency, seconds, clients) for _ in range(repeats)]
    return {
        "images_per_second": median(run["images_per_second"] for run in runs),
        "lone_first_preview_seconds": lone["first_preview_seconds"],
        "lone_image_seconds": lone["image_seconds"],
        "runs": runs,
    }


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the flags, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_model(parser, "GPT-XL")
    waves = "of load a run (default: fifteen waves of images)"
    add_values(
        parser,
        ("--image-size", whole_number(1), None, "PIXELS", "(default: the model's)"),
        ("--rows", whole_number(4), 512, "N", "rows that run at once"),
        ("--seconds", whole_number(1), None, "S", waves),
        ("--data-parallel-size", whole_number(1), 1, "N", "also N engines"),
    )
    parser.add_argument(
        "--in-a-thread", action="store_true", help="also with the engine in a thread of the service"
    )
    add_quantization(parser)
    add_repeats(parser, 3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
