"""What HTTP costs: images a second of the engine alone and behind the service.

    python scripts/benchmarks/bench_overhead.py --gpt-model GPT-XL --image-size 256 --rows 512

The service is saturated by scripts/benchmarks/bench_serve.py: as many requests under way as fill
the rows twice, of one guided image each, without previews, so that when a wave of them ends, those
wait already who take its rows. What counts is the slope of images over time, after two waves and
until no more is asked for. Beside it scripts/benchmarks/bench_probes.py asks for /health and
/metrics. Before that, the rows are filled once, and the time to the first preview of a lone request
is taken, half drawn. The engine alone draws four times as many images as fit, with their pixels
(scripts/benchmarks/bench_decode.py). With --in-a-thread also the service with its engine in a
thread of the same process. With --data-parallel-size also so many engines behind one service, with
as many times the requests, from as many processes. Random weights; each in processes of its own.
Ends in JSON.
"""

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, cast

from autoregressive.cli.command import OneLineParser, run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    from autoregressive.benchmarks.arguments import at_least
    from autoregressive.benchmarks.serve_report import WAVES, percentiles, steady_rate
    from autoregressive.models.config import GPT_SHAPES
    from autoregressive.serve import api_server
    from autoregressive.serve.engine.request import SamplingParams
    from autoregressive.serve.web.config_layers import read_arguments
    from autoregressive.serve.web.openai_routes import partial_rows
    from autoregressive.serve.web.server_settings import resolve_server_settings
    from autoregressive.serve.worker.outbox import Outbox
    from autoregressive.serve.worker.previews import fill_undrawn
    from autoregressive.serve.worker.process import EngineRecipe, MakeEngine, connect
    from autoregressive.serve.worker.worker import serve
    from autoregressive.weights.loading import FoundWeights

_SCRIPTS = Path(__file__).parent
_IN_THREAD, _LONE = "--serve-in-a-thread", "--draw-lone-previews"  # how this script runs itself
_LONE_REQUESTS = 21  # of which the first warms up
_LEAST_SECONDS = 10  # of a run


class ThreadedEngine:
    """Stands in for the engine's process: the same loop in a thread of the service's own
    process.
    """

    def __init__(self, make_engine: MakeEngine, connection: socket.socket) -> None:
        outbox = Outbox(connection, "events")
        self._thread = threading.Thread(
            target=lambda: serve(make_engine, connection, outbox), daemon=True
        )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the thread; returns the status of a process that has ended."""
        self._thread.join(timeout)
        return 0

    def kill(self) -> None:
        """Does nothing, because a thread cannot be killed."""


def start_in_a_thread(make_engine: MakeEngine, name: str) -> tuple[Any, socket.socket]:
    """As `worker.process.start_process`."""
    ours, theirs = connect()
    return ThreadedEngine(make_engine, theirs), ours


def serve_in_a_thread(flags: Sequence[str]) -> int:
    """The service's command with its engine in a thread."""
    settings = resolve_server_settings(read_arguments(flags, os.environ))
    found = FoundWeights(None, None)
    recipe = EngineRecipe(settings.choice.model, found, settings.engine, SamplingParams())
    with api_server.listen(settings) as listeners:
        model = api_server.served_model(settings, found)
        return api_server.serve(settings, model, lambda index: recipe, listeners, start_in_a_thread)


def draw_lone_previews(flags: Sequence[str]) -> int:
    """What the engine itself takes to the first preview of a lone request, as bench_serve.py asks
    for it: half of the rows.
    """
    settings = resolve_server_settings(read_arguments(flags, os.environ))
    model = settings.choice.model
    engine = EngineRecipe(model, FoundWeights(None, None), settings.engine, SamplingParams())(
        lambda done, total: None
    )
    assert engine.decoder is not None
    rows = partial_rows(1, model.grid)[0]
    times = []
    for seed in range(_LONE_REQUESTS):
        begun = time.monotonic()
        request = engine.submit(
            seed, SamplingParams(cfg_scale=settings.choice.defaults.cfg_scale, top_k=0, seed=seed)
        )
        while request.steps < rows * model.grid:
            engine.step()
        codes = engine.peek([request]).codes()[0]
        engine.decoder.submit_to_host(fill_undrawn(codes, rows, model.grid)).pictures()
        times.append(time.monotonic() - begun)
        engine.cancel(request)
        while not request.ended:
            engine.step()
    print(json.dumps({"first_preview_seconds": percentiles(times[1:])}))
    return 0


@contextmanager
def running_service(command: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The process id and the URL of a service that is ready."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if (ready := re.match(r"ready after .*: (http\S+)", line)) is not None:
                    yield process.pid, ready[1]
                    break
            else:
                raise UserError("the service did not start: run its command by hand to see why")
        finally:
            process.terminate()
            process.wait()


def last_json(command: Sequence[str]) -> dict[str, Any]:
    """What a script ends in."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{Path(command[1]).name} failed: run it by hand to see why")
    return cast(dict[str, Any], json.loads(done.stdout.splitlines()[-1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags, measures, prints a table and JSON."""
    given = sys.argv[1:] if argv is None else list(argv)
    for mode, run in ((_IN_THREAD, serve_in_a_thread), (_LONE, draw_lone_previews)):
        if given[:1] == [mode]:
            return run(given[1:])
    arguments = parse_arguments(given)
    model, rows, engines = arguments.gpt_model, arguments.rows, arguments.data_parallel_size
    size = [] if arguments.image_size is None else ["--image-size", str(arguments.image_size)]
    flags = ["--gpt-model", model, *size, "--random-weights", "--max-num-seqs", str(rows)]
    flags += ["--port", "0", "--max-queue-size", "10000"]
    process = [sys.executable, api_server.__file__, *flags]
    commands = {"in a process": (process, 1)}
    if arguments.in_a_thread:
        commands["in a thread"] = ([sys.executable, __file__, _IN_THREAD, *flags], 1)
    if engines > 1:
        commands[f"in {engines} processes"] = (
            [*process, "--data-parallel-size", str(engines)],
            engines,
        )
    decode = [
        sys.executable,
        str(_SCRIPTS / "bench_decode.py"),
        "--models",
        model,
        "--rows",
        str(rows),
        *size,
    ]
    alone = last_json([*decode, "--images", str(2 * rows), "--pixels"])["models"][0]["results"][0][
        "images_per_second"
    ]
    lone = last_json([sys.executable, __file__, _LONE, *flags])["first_preview_seconds"]
    seconds = seconds_of_load(arguments.seconds, rows / 2 / alone)
    results: dict[str, Any] = {
        "alone": {"images_per_second": alone, "lone_first_preview_seconds": lone}
    }
    print(f"the engine alone: {alone:.2f} images/s, lone preview {lone}", flush=True)
    for where, (command, count) in commands.items():
        results[where] = result = behind(command, rows * count, seconds, arguments.repeats, count)
        what = (
            f"{result['images_per_second']:.2f} images/s "
            f"({result['images_per_second'] / (alone * count):.1%})"
        )
        print(
            f"behind HTTP, engine {where}: {what}, lone preview "
            f"{result['lone_first_preview_seconds']}",
            flush=True,
        )
        for run in result["runs"]:
            print(f"    a run: {run}", flush=True)
    print(json.dumps({"benchmark": "overhead", "model": model, "rows": rows, "results": results}))
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
    command: Sequence[str], under_way: int, seconds: int, repeats: int, clients: int
) -> dict[str, Any]:
    """What a service that `command` starts does: with a lone request at a time, then several times
    with so many.

    Before that, about so many once, for what a service does the first time only.

    Args:
        clients: processes that ask.
    """
    with running_service(command) as (_, url):
        bench = [sys.executable, str(_SCRIPTS / "bench_serve.py"), "--url", url]
        at_once([[*bench, "--rates", str(under_way / clients / 2), "--seconds", "2"]] * clients)
        lone = last_json([*bench, "--saturate", "1", "--seconds", str(seconds / 2)])["results"][0]
        runs = [saturate(bench, url, under_way, seconds, clients) for _ in range(repeats)]
    return {
        "images_per_second": median(run["images_per_second"] for run in runs),
        "lone_first_preview_seconds": lone["first_preview_seconds"],
        "lone_image_seconds": lone["image_seconds"],
        "runs": runs,
    }


def at_once(commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """What several scripts end in that run beside each other."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(last_json, commands))


def saturate(
    bench: Sequence[str], url: str, under_way: int, seconds: int, clients: int
) -> dict[str, Any]:
    """One run with so many requests all the time, from so many client processes, and what the
    service's supervisor sees of it.

    Raises:
        UserError: a script fails, or the time was too short for images to count.
    """
    load = [
        *bench,
        "--saturate",
        str(under_way // clients),
        "--previews",
        "0",
        "--seconds",
        str(seconds),
        "--moments",
    ]
    commands = [
        [sys.executable, str(_SCRIPTS / "bench_probes.py"), "--url", url, "--seconds", str(seconds)]
    ]
    commands += [[*load, "--seed", str(seed)] for seed in range(clients)]
    probed, *loads = at_once(commands)
    results = [one["results"][0] for one in loads]
    moments = [moment for result in results for moment in result["moments"]]
    ends = [result["until"] for result in results]  # in between all of them ask
    images, _, pace = steady_rate(moments, under_way, max(ends) - seconds, min(ends))
    if images == 0:
        raise UserError(
            f"--seconds {seconds}: the first requests took more than a third of that; give more "
            "seconds"
        )
    return {
        "images_per_second": round(pace, 3),
        "failures": [result["failures"] for result in results],
        "probes": probed["results"],
    }


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpt-model",
        choices=list(GPT_SHAPES),
        default="GPT-XL",
        metavar="NAME",
        help="(default: GPT-XL)",
    )
    parser.add_argument(
        "--image-size", type=at_least(1), metavar="PIXELS", help="(default: the model's)"
    )
    parser.add_argument(
        "--rows",
        type=at_least(4),
        default=512,
        metavar="N",
        help="rows that run at once (default: 512)",
    )
    parser.add_argument(
        "--seconds",
        type=at_least(1),
        metavar="S",
        help="of load a run (default: fifteen waves of images)",
    )
    parser.add_argument(
        "--in-a-thread", action="store_true", help="also with the engine in a thread of the service"
    )
    parser.add_argument(
        "--data-parallel-size",
        type=at_least(1),
        default=1,
        metavar="N",
        help="also N engines (default: 1)",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        default=3,
        metavar="N",
        help="runs, of which the median counts (default: 3)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
