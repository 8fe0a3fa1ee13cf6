"""What HTTP alone costs: the service with engines that draw nothing, and take their time for it. No
GPU is needed.

    python scripts/benchmarks/bench_http.py --data-parallel-size 2 --seconds 10

Each engine stands in for one that holds --places images at once and takes --seconds-per-image for
each; its pictures are noise, asked for as JPEG, which costs the least to encode. The load is that
of scripts/benchmarks/bench_overhead.py. With many places the service is what limits images/s; with
a long time for an image, hundreds are ready at once. Beside images/s and the time that /health and
/metrics take: what each process of the service spends, in milliseconds of a processor an image, and
how often its threads are taken off one. Ends in JSON.
"""

import argparse
import contextlib
import heapq
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import httpx2
    from bench_overhead import serve_with, settings_of

    from autoregressive.benchmarks.script import (
        add_values,
        give_figures,
        positive,
        script_parser,
        whole_number,
    )
    from autoregressive.benchmarks.service import (
        WAVES,
        authorization,
        last_json,
        running_service,
        saturate,
        script,
    )
    from autoregressive.serve.worker.messages import (
        Ended,
        EngineRequest,
        Image,
        LoopStats,
        Progress,
        Ready,
        Started,
        Stop,
    )
    from autoregressive.serve.worker.process import ChildProcess, start_child
    from autoregressive.serve.worker.transport import Outbox, receive
    from autoregressive.serve.worker.worker import STATS_SECONDS, MakeEngine

_SERVE = "--serve"  # how this script runs itself
# Engines' processes import `draw_nothing` by its module's name, so that must not be __main__.
_AS_A_MODULE = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_http; "
    "sys.exit(bench_http.main())"
)
_SIZE = 256  # pixels a side
_STEP_SECONDS = 0.006  # between looks at what is due: a step of GPT-XL with 512 rows


def draw_nothing(places: int, seconds: float, connection: socket.socket) -> None:
    """An engine's process: every image takes so many seconds and one of the places."""
    outbox, noise = Outbox(connection, "events"), os.urandom(_SIZE * _SIZE * 3)
    waiting: deque[int] = deque()
    running: list[tuple[float, int]] = []
    told_at = 0.0
    outbox.put(Ready(2 * places, 2 * places, 1))
    while True:
        now = time.monotonic()
        while running and running[0][0] <= now:
            _, request_id = heapq.heappop(running)
            outbox.put(Image(request_id, 0, now, now, 0.0, noise))
            outbox.put(Ended(request_id, "finished", now))
        while waiting and len(running) < places:
            request_id = waiting.popleft()
            heapq.heappush(running, (now + seconds, request_id))
            outbox.put(Started(request_id, now))
            outbox.put(Progress(request_id, 1, now))
        if now - told_at > STATS_SECONDS:
            told_at = now
            outbox.put(LoopStats(2 * len(running)))
        timeout = _STEP_SECONDS
        while wait([connection], timeout):
            timeout = 0.0
            for command in receive(connection):
                if isinstance(command, Stop):
                    return
                if isinstance(command, EngineRequest):
                    waiting.append(command.request_id)


def serve(places: str, seconds: str, engines: str, flags: Sequence[str]) -> int:
    """The service's command with such engines, more than one without the GPUs that
    --data-parallel-size asks for.
    """
    settings = replace(settings_of(flags), engines=int(engines))

    def start(make_engine: MakeEngine, name: str) -> tuple[ChildProcess, socket.socket]:
        return start_child(partial(draw_nothing, int(places), float(seconds)), name)

    return serve_with(settings, start)


def spent(processes: Iterable[int]) -> list[tuple[float, int]]:
    """What each of some processes has used so far: seconds of a processor, and how often its
    threads were taken off one. This needs Linux.
    """
    found = []
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        switches = 0
        for thread in Path(f"/proc/{process}/task").glob("*/status"):
            with contextlib.suppress(OSError):  # it has ended
                switches += sum(
                    int(line.split()[1])
                    for line in thread.read_text().splitlines()
                    if "ctxt_switches" in line
                )
        found.append((seconds, switches))
    return found


def processes_of(service: int, engines: int, fronts: int) -> dict[str, int]:
    """A service's processes, which are numbered in the order of their start."""
    children = sorted(
        map(int, Path(f"/proc/{service}/task/{service}/children").read_text().split())
    )
    names = [
        *(f"engine {index}" for index in range(engines)),
        *(f"front {index}" for index in range(fronts)),
    ]
    return {"service": service} | dict(zip(names, children[-len(names) :], strict=True))


def images_drawn(url: str) -> int:
    """By a service, so far.

    Raises:
        UserError: the service does not say.
    """
    answer = httpx2.get(f"{url}/metrics", headers=authorization(), timeout=60)
    if answer.status_code != 200:
        raise UserError(
            f"{url}/metrics answers {answer.status_code}, not 200; check LLAMAGEN_API_KEY"
        )
    [line] = [
        line for line in answer.text.splitlines() if line.startswith("llamagen:images_total{")
    ]
    return int(float(line.rsplit(maxsplit=1)[1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags, measures, prints a table and JSON."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == [_SERVE]:
        return serve(given[1], given[2], given[3], given[4:])
    arguments = parse_arguments(given)
    engines = arguments.data_parallel_size
    fronts = arguments.api_server_count or engines
    stand_in = [arguments.places, arguments.seconds_per_image, engines]
    flags = ["--gpt-model", "GPT-XL", "--image-size", _SIZE, "--random-weights", "--port", 0,
             "--max-queue-size", 100000, "--api-server-count", fronts]  # fmt: skip
    command = [sys.executable, "-c", _AS_A_MODULE, _SERVE, *map(str, [*stand_in, *flags])]
    with running_service(command) as (service, url):
        processes = processes_of(service, engines, fronts if fronts > 1 else 0)
        bench = script("bench_serve.py", "--url", url, "--output-format", "jpeg")
        last_json([*bench, "--rates", "2", "--seconds", "2"])  # warm
        before, drawn = spent(processes.values()), images_drawn(url)
        result = saturate(bench, url, 2 * arguments.places * engines, arguments.seconds, engines)
        images = images_drawn(url) - drawn
        after = spent(processes.values())
    print(
        f"{engines} engines, {fronts} processes that answer HTTP: "
        f"{result['images_per_second']:.1f} images/s"
    )
    print(f"probes: {result['probes']}")
    costs = {}
    for name, then, now in zip(processes, before, after, strict=True):
        milliseconds = 1e3 * (now[0] - then[0]) / images
        switches = (now[1] - then[1]) / images
        costs[name] = {"milliseconds": round(milliseconds, 3), "switches": round(switches, 2)}
        print(f"{name}: {milliseconds:.2f} ms, {switches:.1f} switches an image")
    options = {
        "places": arguments.places,
        "seconds_per_image": arguments.seconds_per_image,
        "engines": engines,
        "fronts": fronts,
    }
    give_figures({"benchmark": "http", "options": options, "result": result, "costs": costs})
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the flags, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    servers = "processes that answer HTTP (default: as many as engines)"
    add_values(
        parser,
        ("--data-parallel-size", whole_number(1), 1, "N", "engines"),
        ("--api-server-count", whole_number(1), None, "N", servers),
        ("--places", whole_number(1), 32, "N", "images that an engine holds"),
        ("--seconds-per-image", positive, 0.05, "S", "that it takes for each of them"),
        ("--seconds", whole_number(1), 10, "S", "of load"),
    )
    arguments = parser.parse_args(argv)
    if arguments.seconds < WAVES * arguments.seconds_per_image:
        parser.error(
            f"argument --seconds: must be {WAVES} times --seconds-per-image or more, for waves to "
            "be counted"
        )
    if not Path("/proc/self/stat").exists():
        parser.error("this script reads Linux's /proc, which is not there")
    return arguments


if __name__ == "__main__":
    run_command(main)
