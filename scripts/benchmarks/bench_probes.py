"""How soon a busy service answers its supervisor: /health and /metrics, asked in turn while
scripts/benchmarks/bench_serve.py keeps it busy.

    python scripts/benchmarks/bench_probes.py --url http://127.0.0.1:8000 --seconds 30

From a process of its own, so that what the load generator does is not counted; each on a connection
of its own, as a supervisor's. The service's key, if it has one, is taken from LLAMAGEN_API_KEY.
Ends in JSON.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import httpx2

    from autoregressive.benchmarks.arguments import script_parser, whole_number
    from autoregressive.benchmarks.serve_report import PERCENTILES, percentiles
    from autoregressive.benchmarks.service import add_url, authorization, service_at

_PATHS = ("/health", "/metrics")
_EVERY_SECONDS = 0.05  # from one question to the next
_TIMEOUT_SECONDS = 10.0


def probe(url: str, seconds: float) -> dict[str, list[float]]:
    """Seconds that each answer took, by path.

    Raises:
        UserError: nobody answers at `url`, or an answer is not 200.
    """
    took: dict[str, list[float]] = {path: [] for path in _PATHS}
    headers = {"Connection": "close"} | authorization()
    with (
        service_at(url),
        httpx2.Client(base_url=url, headers=headers, timeout=_TIMEOUT_SECONDS) as client,
    ):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for path in _PATHS:
                asked = time.monotonic()
                status = client.get(path).status_code
                took[path].append(time.monotonic() - asked)
                if status != 200:
                    raise UserError(f"--url {url}: {path} answers {status}, not 200")
                time.sleep(max(0.0, asked + _EVERY_SECONDS - time.monotonic()))
    return took


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, measures, prints percentiles and JSON.

    Raises:
        UserError: see `probe`.
    """
    parser = script_parser(__doc__)
    add_url(parser)
    parser.add_argument(
        "--seconds", type=whole_number(1), default=30, metavar="S", help="to ask for (default: 30)"
    )
    arguments = parser.parse_args(argv)
    took = probe(arguments.url, arguments.seconds)
    results: dict[str, dict[str, Any]] = {
        path: {"answers": len(seconds), "seconds": percentiles(seconds) or {}}
        for path, seconds in took.items()
    }
    for path, result in results.items():
        times = " / ".join(f"{value:.4f}" for value in result["seconds"].values())
        print(f"{path}: {result['answers']} answers, {PERCENTILES} {times} s")
    print(json.dumps({"benchmark": "probes", "results": results}))


if __name__ == "__main__":
    run_command(main)
