"""The service on ranks that share the demo model, on a CPU, with images of 4 x 4 tokens: all of it
is real but the size of the images.

`python tests/helpers/rank_service.py FLAGS` runs one; `rank_service` is one for a test.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fake_service import Faults, Service
from source_tree import ROOT

from autoregressive.cli.command import run_command
from autoregressive.serve.lifecycle import listen, prepare, serve
from autoregressive.serve.signals import SignalWatch
from autoregressive.serve.web.server_flags import read_arguments
from autoregressive.serve.web.server_settings import resolve_server_settings

GRID = 4
_START_SECONDS = 120.0
CHECKPOINT = ROOT / "pretrained_models" / "demo_gpt.safetensors"
_FLAGS = ["--port", "0", "--gpt-model", "GPT-demo", "--device", "cpu"]
# which would not be found for images of this size
_FLAGS += ["--gpt-ckpt", str(CHECKPOINT)]
_FLAGS += ["--tensor-parallel-size", "2", "--lookahead", "off"]


def main(watch: SignalWatch) -> int:
    """The service, with small images."""
    settings = resolve_server_settings(read_arguments(sys.argv[1:], os.environ))
    model = replace(settings.model, image_size=GRID * settings.model.downsample_size)
    settings = replace(settings, model=model)
    with listen(settings) as listeners:
        served, recipe = prepare(settings)
        return serve(settings, served, recipe, listeners, watch=watch)


def rank_command(*flags: str) -> list[str]:
    """Runs such a service."""
    return [sys.executable, __file__, *_FLAGS, *flags]


def other_ranks(pid: int) -> list[int]:
    """The processes of ranks other than 0 that a process and its children have started."""
    found = []
    for one in tree(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if b"\0rank-" in Path(f"/proc/{one}/cmdline").read_bytes():
                found.append(one)
    return found


def tree(pid: int) -> list[int]:
    """A process and all that it has started, from whichever thread."""
    found = [pid]
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    return found


@contextmanager
def rank_service(folder: Path, *flags: str) -> Iterator[Service]:
    """A service that is ready; killed at the end if it still runs."""
    # on a busy machine, threads that wait for each other make small steps 30 times slower
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = folder / "stderr"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            rank_command(*flags), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        too_late = threading.Timer(_START_SECONDS, process.kill)
        too_late.start()
        try:
            ready = next((line for line in process.stdout if line.startswith("ready after")), None)
            too_late.cancel()
            assert ready is not None, log.read_text()
            service = Service(cast(Any, process), ready.split()[-1], Faults(folder), log)
            yield service
            service.client.close()
        finally:
            too_late.cancel()
            process.kill()


if __name__ == "__main__":
    run_command(lambda: main(SignalWatch()))
