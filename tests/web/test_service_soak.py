"""The service under load for as long as it takes to see something grow: `pytest -m soak
tests/web/test_service_soak.py -s`.

On a CPU the demo model for 30 minutes, on a GPU GPT-XL with random weights for 8; SOAK_SECONDS says
otherwise.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx2
import pytest
import torch

ROOT = Path(__file__).parents[2]
LOAD = 0.8  # of what the service can do
WARM_UP_SECONDS = 120.0
MOST_GROWTH_BYTES = 50 * 2**20
SAMPLE_SECONDS = 5.0


def tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(grandchild for child in children for grandchild in tree(int(child)))]


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def served(*flags: str) -> Iterator[tuple[int, str]]:
    """Process id and address of the real service."""
    command = [
        sys.executable,
        str(ROOT / "autoregressive/serve/api_server.py"),
        "--port",
        "0",
        "--log-level",
        "warning",
        *flags,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if (ready := re.match(r"ready after .*: (http\S+)", line)) is not None:
                    yield process.pid, ready[1]
                    break
            else:
                pytest.fail("the service did not start")
        finally:
            process.terminate()
            process.wait(90)


def bench(url: str, *flags: str) -> dict[str, float]:
    command = [
        sys.executable,
        str(ROOT / "scripts/benchmarks/bench_serve.py"),
        "--url",
        url,
        *flags,
    ]
    result: dict[str, float] = json.loads(
        subprocess.check_output(command, text=True).splitlines()[-1]
    )["results"][0]
    return result


@pytest.mark.soak
def test_nothing_grows_under_load() -> None:
    """Resident memory of all processes at most 50 MB after the warm-up; descriptors, pages and
    gauges end where they began.
    """
    on_gpu = torch.cuda.is_available()
    flags = (
        ("--gpt-model", "GPT-XL", "--random-weights")
        if on_gpu
        else ("--gpt-model", "GPT-demo", "--max-num-seqs", "16")
    )
    seconds = float(os.environ.get("SOAK_SECONDS", "480" if on_gpu else "1800"))
    with served(*flags) as (pid, url):
        processes = tree(pid)
        at_once = "128" if on_gpu else "8"  # images that fill the rows
        capacity = bench(url, "--saturate", at_once, "--seconds", "30" if on_gpu else "90")[
            "images_per_second"
        ]
        before = {process: descriptors(process) for process in processes}
        samples: list[tuple[float, int]] = []
        over = threading.Event()

        def sample() -> None:
            while not over.wait(SAMPLE_SECONDS):
                samples.append(
                    (time.monotonic(), sum(resident_bytes(process) for process in processes))
                )

        sampling = threading.Thread(target=sample)
        sampling.start()
        begun = time.monotonic()
        try:
            result = bench(url, "--rates", f"{LOAD * capacity:.4f}", "--seconds", f"{seconds:g}")
        finally:
            over.set()
            sampling.join()
        warm = min(WARM_UP_SECONDS, seconds / 2)
        settled = [size for moment, size in samples if warm <= moment - begun < warm + 60]
        at_end = [size for _, size in samples[-12:]]
        growth = median(at_end) - median(settled)
        told = {
            "capacity": capacity,
            "seconds": seconds,
            "growth_mb": round(growth / 2**20, 1),
            "result": result,
        }
        print(json.dumps(told))
        assert result["failures"] == {}
        assert growth <= MOST_GROWTH_BYTES
        time.sleep(6)  # idle connections are closed after five seconds
        text = httpx2.get(f"{url}/metrics").text
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert f"llamagen:{gauge} 0.0" in text
        assert {process: descriptors(process) for process in processes} == pytest.approx(
            before, abs=2
        )
        assert tree(pid) == processes
