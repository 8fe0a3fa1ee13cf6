"""What the benchmarks of the service share: to start it, to ask it with its key, to keep it busy
from other processes, and to count what comes of it. A load generator imports no torch.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import linear_regression
from typing import Any

import httpx2

from autoregressive.errors import UserError

PERCENTILES = "p50 / p90 / p99"
# of images, that a run at full load has to last at least for `steady_rate`: the start takes up to
# four, and has a third
WAVES = 15
_SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmarks"


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """The percentiles by nearest rank, in seconds; None if there are no values."""
    ordered = sorted(seconds)
    if not ordered:
        return None
    return {
        f"p{rank}": round(ordered[math.ceil(rank * len(ordered) / 100) - 1], 4)
        for rank in (50, 90, 99)
    }


def steady_rate(
    moments: Iterable[float], first: int, begun: float, until: float
) -> tuple[int, float, float]:
    """The pace of images while a service is kept busy: neither its start nor its end, where there
    is less to do, counts.

    Images may come in waves, so how many lie between two moments depends on where waves are cut:
    the pace is the slope of the straight line (least squares) through the images counted over time.
    It is right to a tenth with three waves, to a hundredth with eight, whatever their shape.

    Args:
        moments: seconds, at which images came
        first: so many are of the start, one or more.
        begun, until: moments from which on the service was kept busy, and left alone.

    Returns:
        How many images count, seconds from the first of them to the last, images a second; (0, 0,
        0) if the start took more than a third of the time, or what counts came within less than a
        third: there are too few waves then, or none.
    """
    ordered = sorted(moment for moment in moments if begun <= moment <= until)
    counted, third = ordered[first:], (until - begun) / 3
    if not counted or ordered[first - 1] - begun > third or counted[-1] - counted[0] < third:
        return 0, 0.0, 0.0
    return (
        len(counted),
        counted[-1] - counted[0],
        linear_regression(counted, range(len(counted))).slope,
    )


def authorization() -> dict[str, str]:
    """The header with the service's key: the first one in LLAMAGEN_API_KEY, where a service may
    have several. Empty without a key.
    """
    key = os.environ.get("LLAMAGEN_API_KEY", "").split(",")[0].strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextmanager
def service_at(url: str) -> Iterator[None]:
    """Turns a failure to connect to a service into one line.

    Raises:
        UserError: no service answers at that address.
    """
    try:
        yield
    except (httpx2.TransportError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise UserError(
            f"--url {url}: no service answers there; start autoregressive/serve/api_server.py first"
        ) from error


def script(name: str, *flags: object) -> list[str]:
    """The command that runs one of the benchmarks."""
    return [sys.executable, str(_SCRIPTS / name), *map(str, flags)]


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
    """Runs a script and returns the JSON in its last line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{Path(command[1]).name} failed: run it by hand to see why")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def at_once(commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Runs several scripts at the same time and returns the JSON of each."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(last_json, commands))


def saturate(
    bench: Sequence[str], url: str, concurrency: int, seconds: int, clients: int
) -> dict[str, Any]:
    """One run with `concurrency` requests all the time, from so many client processes, and what
    the service's supervisor sees of it.

    Args:
        bench: the command of bench_serve.py with the flags that all clients have.

    Raises:
        UserError: a script fails, or the time was too short for images to count.
    """
    load = [*bench, "--saturate", str(concurrency // clients), "--previews", "0", "--moments"]
    load += ["--seconds", str(seconds)]
    probed, *loads = at_once(
        [
            script("bench_serve.py", "--url", url, "--probe", "--seconds", seconds),
            *([*load, "--seed", str(seed)] for seed in range(clients)),
        ]
    )
    results = [one["results"][0] for one in loads]
    moments = [moment for result in results for moment in result["moments"]]
    ends = [result["until"] for result in results]  # in between all of them ask
    images, _, pace = steady_rate(moments, concurrency, max(ends) - seconds, min(ends))
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
