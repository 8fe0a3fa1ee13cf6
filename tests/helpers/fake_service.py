"""The service with an engine that costs nothing and fails when told to, and `running_service` to
run it.

Everything is real but the model: HTTP, the engine's process, its loop, scheduler and pages. Images
have 8 x 8 tokens and 32 px. What is to go wrong is told by files in a folder, which the engine's
process looks at before every span. Processes are forked, so that a start takes a tenth of a second
(`forked_services`).
"""

import contextlib
import json
import os
import re
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import httpx2
import torch
from fake_runner import CLASSES, VOCABULARY, FakeRunner, tiny_gpt
from torch import Tensor

from autoregressive.errors import UserError
from autoregressive.models.classes import ClassNames
from autoregressive.models.defaults import DEMO_DEFAULTS
from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.pixel_decoder import PixelDecoder
from autoregressive.serve.lifecycle import listen, serve
from autoregressive.serve.signals import SignalWatch
from autoregressive.serve.web.schema import ServedModel
from autoregressive.serve.web.server_flags import read_arguments
from autoregressive.serve.web.server_settings import resolve_server_settings
from autoregressive.serve.worker.worker import MakeEngine

GRID, TOKENS, IMAGE_SIZE = 8, 64, 32
LARGE_SIZE = (
    384  # with the environment variable LARGE: pictures of noise, which no format makes small
)
LARGE = "FAKE_SERVICE_LARGE"
CLASS_NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay")
KEY = "k" * 32  # of the fixture `locked`
FAULTS = "FAKE_SERVICE_FAULTS"  # the environment variable that names the folder
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Faults:
    """What is to go wrong. A fault is a file in the folder; its text may say more."""

    folder: Path

    def set(self, name: str, text: str = "") -> None:
        """From now on."""
        (self.folder / name).write_text(text)

    def clear(self, name: str) -> None:
        """No more."""
        (self.folder / name).unlink(missing_ok=True)

    def get(self, name: str) -> str | None:
        """The fault's text; None: it is not set."""
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            return None

    def take(self, name: str) -> bool:
        """Whether it was set; it is not any more."""
        there = self.get(name) is not None
        self.clear(name)
        return there

    def before_span(self, runner: FakeRunner) -> None:
        """In the engine's process."""
        runner.step_seconds = float(self.get("step_seconds") or 0)
        if (share := self.get("right_share")) is not None:  # of the guesses
            runner.right_share = float(share)
        if self.get("die") is not None:
            os._exit(9)
        if self.get("segfault") is not None:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.get("raise") is not None:
            raise RuntimeError("a fault of no known kind")
        while self.get("hang") is not None:
            time.sleep(0.05)
        if self.take("out_of_memory"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (seed := self.get("nan")) is not None:
            runner.fails = {(int(seed), image, 3) for image in range(10)}
        else:
            runner.fails = set()


class FakeDecoder:
    """Pictures whose every pixel tells a code: red is the code of its token, the rest is zero."""

    batch_sizes = (1,)

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._noise = (
            torch.randint(256, (1, LARGE_SIZE, LARGE_SIZE, 3), dtype=torch.uint8)
            if LARGE in os.environ
            else None
        )

    def submit_to_host(self, codes: Tensor) -> DeviceFuture[tuple[Tensor, ...]]:
        """As `PixelDecoder`'s."""
        if self._faults.take("out_of_memory_in_pixels"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        images = codes.shape[0]
        finite = torch.ones(images, dtype=torch.bool)
        if self._noise is not None:
            return DeviceFuture.done((self._noise.expand(images, -1, -1, -1), finite))
        pixels = torch.zeros(images, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
        side = IMAGE_SIZE // GRID
        pixels[..., 0] = (
            codes.view(images, GRID, GRID)
            .repeat_interleave(side, 1)
            .repeat_interleave(side, 2)
            .to(torch.uint8)
        )
        return DeviceFuture.done((pixels, finite))


def make_engine(
    on_progress: Callable[[int, int], None], *, config: EngineConfig, folder: Path
) -> Engine:
    """In the engine's process."""
    faults = Faults(folder)
    if (seconds := faults.get("slow_start")) is not None:
        time.sleep(float(seconds))
    if (message := faults.get("unable")) is not None:
        raise UserError(message)
    if (number := faults.get("die_while_loading")) is not None:
        os.kill(os.getpid(), int(number))
    on_progress(1, 2)
    engine = Engine(tiny_gpt(TOKENS), None, config, FakeRunner)
    engine.decoder = cast(PixelDecoder, FakeDecoder(faults))
    runner = cast(FakeRunner, engine.runner)
    runner.before_span = lambda steps: faults.before_span(runner)
    return engine


def fake_model(name: str, *aliases: str) -> ServedModel:
    """What clients are told."""
    assert len(CLASS_NAMES) == CLASSES
    record: dict[str, object] = {"program": "llamagen-serve", "trained": True, "model": name}
    size = LARGE_SIZE if LARGE in os.environ else IMAGE_SIZE
    return ServedModel(
        name,
        1700000000,
        size,
        GRID,
        VOCABULARY,
        ClassNames(CLASS_NAMES),
        DEMO_DEFAULTS,
        True,
        record,
        aliases,
    )


def main(watch: SignalWatch) -> int:
    """The service's flags, with a fake model."""
    settings = resolve_server_settings(read_arguments(sys.argv[1:], os.environ))
    recipe: MakeEngine = partial(
        make_engine, config=settings.engine, folder=Path(os.environ[FAULTS])
    )
    settings = replace(settings, engines=int(os.environ.get("FAKE_SERVICE_ENGINES", "1")))
    model = fake_model("fake") if settings.names == ("GPT-demo",) else fake_model(*settings.names)
    with listen(settings) as listeners:
        return serve(settings, model, lambda index: recipe, listeners, watch=watch)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class ServiceProcess:
    """The service's own process, which is not this one's child.

    Args:
        status: the file into which its parent writes its status.
    """

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self._status = pid, status

    def poll(self) -> int | None:
        """Its status, once it has ended."""
        said = self._status.read_text() if self._status.exists() else ""
        return int(said) if said else None

    def wait(self, timeout: float = 60) -> int:
        """Its status."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < deadline, f"did not end within {timeout} s"
            time.sleep(0.01)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """If it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """At once."""
        self.send_signal(signal.SIGKILL)


class Service:
    """A running service, as others see it."""

    def __init__(
        self,
        process: ServiceProcess,
        url: str,
        faults: Faults,
        log: Path,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.process, self.url, self.faults, self._log = process, url, faults, log
        path = url.removeprefix("unix:")
        transport = httpx2.HTTPTransport(uds=path, verify=verify) if path != url else None
        base = "http://localhost" if transport else url
        self.client = httpx2.Client(base_url=base, timeout=60, verify=verify, transport=transport)

    @property
    def log(self) -> str:
        """What it has written on stderr."""
        return self._log.read_text()

    def logged(self, number: str) -> dict[str, Any]:
        """The log's line of a request, which is written when its answer has been."""
        self.wait_for(lambda: f'"{number}"' in self.log and self.log.endswith("\n"), 5)
        line: dict[str, Any] = next(
            json.loads(line) for line in self.log.splitlines() if f'"{number}"' in line
        )
        return line

    @property
    def children(self) -> list[int]:
        """Process ids of engines, then of fronts."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(word) for word in listed.split()]

    def wait_until_ready(self) -> None:
        """Until requests are accepted."""
        self.wait_for(lambda: self.client.get("/ready").status_code == 200, _START_SECONDS)

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> float:
        """Until something holds; how long it took."""
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < seconds, f"did not come true within {seconds} s"
            time.sleep(0.02)
        return time.monotonic() - begun

    def draw(self, **body: Any) -> httpx2.Response:
        """A request for images."""
        return self.client.post("/v1/images/generations", json={"prompt": "cat"} | body)

    def gauges(self) -> dict[str, float]:
        """Metrics by name, without the prefix and the model's name, and without histograms."""
        text = re.sub(r'model_name="[^"]*",?', "", self.client.get("/metrics").text)
        lines = text.replace("{}", "").splitlines()
        pairs = (
            line.rsplit(" ", 1)
            for line in lines
            if line.startswith("llamagen:") and "le=" not in line
        )
        return {name.removeprefix("llamagen:"): float(value) for name, value in pairs}

    def holds(self, running: int, waiting: int) -> bool:
        """Whether so many requests run and wait, at one moment."""
        gauges = self.gauges()
        return (gauges["num_requests_running"], gauges["num_requests_waiting"]) == (
            running,
            waiting,
        )

    def is_empty(self) -> bool:
        """Whether it holds nothing for anybody."""
        gauges = self.gauges()
        return all(
            gauges[name] == 0
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        )

    def terminate(self, timeout: float = 30) -> int:
        """SIGTERM; the status that it ends with."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


@contextmanager
def running_service(
    folder: Path,
    *flags: str,
    ready: bool = True,
    environment: Mapping[str, str] = MappingProxyType({}),
    start_new_session: bool = False,
    open_files: int | None = None,
    verify: ssl.SSLContext | bool = True,
) -> Iterator[Service]:
    """A service on a free port; killed at the end if it still runs.

    Args:
        folder: for its faults and its log.
        ready: wait until it is.
        open_files: the limit of them, soft and hard; None: this process's.
        verify: as of httpx2's client.
    """
    from forked_services import forge  # which forks this module's services

    with forge().service(
        folder,
        *flags,
        environment=environment,
        start_new_session=start_new_session,
        open_files=open_files,
        verify=verify,
    ) as service:
        if ready:
            service.wait_until_ready()
        yield service
