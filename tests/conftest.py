"""What several test files share: numerics, and the weights that the reference outputs were made
with.
"""

import json
import os
import re
import signal
import zlib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT_models, build_gpt

if TYPE_CHECKING:
    from fake_service import Service
    from page_browser import OpenPage
    from page_stand_in import Behaviour, StandIn
    from playwright.sync_api import Browser

REFERENCE = Path(__file__).parent / "reference"
_STARTERS = re.compile(
    r"^\s*(import|from) (subprocess|multiprocessing|compiled|fake_service|forked_services"
    r"|page_browser|page_stand_in|playwright)\b",
    re.MULTILINE,
)


def pytest_configure() -> None:
    """Where processes share the work (`pytest -n`), each and what it starts gets one thread: more
    would wait for each other. Ctrl-C interrupts the tests that send it also where the shell has
    started pytest in its background, and so without.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the GPU's tests where there is none, and marks as slow what starts processes."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if _starts_processes(item.path):
            item.add_marker(pytest.mark.slow)


@cache
def _starts_processes(path: Path) -> bool:
    """Whether a module of tests imports what starts processes, a browser or a compiler."""
    return _STARTERS.search(path.read_text()) is not None


@pytest.fixture(autouse=True)
def ieee_float32() -> Iterator[None]:
    """TF32 can flip a greedy token; commands run in-process turn it on, so every test starts and
    ends without it.
    """

    def turn_off() -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    turn_off()
    yield
    turn_off()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Service"]:
    """A service with a key."""
    from fake_service import KEY, running_service

    folder = tmp_path_factory.mktemp("locked")
    with running_service(folder, environment={"LLAMAGEN_API_KEY": KEY}) as service:
        yield service


@pytest.fixture(scope="module")
def stand_in() -> Iterator["StandIn"]:
    """A stand-in of the service for the page."""
    for module in ("fastapi", "uvicorn", "playwright.sync_api"):
        pytest.importorskip(module, reason=f"the page's tests need {module}")
    from page_stand_in import StandIn

    service = StandIn()
    yield service
    service.close()


@pytest.fixture(scope="module", params=["chromium", "firefox"])
def page_browser(request: pytest.FixtureRequest) -> Iterator["Browser"]:
    """Each of the browsers in which the page is tested."""
    from page_browser import started_browser

    with started_browser(request.param) as browser:
        yield browser


@pytest.fixture
def behaviour(stand_in: "StandIn") -> Iterator["Behaviour"]:
    """What the stand-in does, as if it were new."""
    stand_in.reset()
    yield stand_in.behaviour
    stand_in.reset()


@pytest.fixture
def open_page(
    page_browser: "Browser", stand_in: "StandIn", behaviour: "Behaviour"
) -> Iterator["OpenPage"]:
    """Opens the page, and fails if it complains or asks another server."""
    from page_browser import opened_pages

    with opened_pages(page_browser, stand_in) as opened:
        yield opened


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder for a command that runs in this process. The process's switches are
    put back afterwards, for other tests need IEEE float32.
    """
    monkeypatch.chdir(tmp_path)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [(matmul, "allow_tf32"), (cudnn, "allow_tf32")]
    switches += [(cudnn, "deterministic"), (cudnn, "benchmark")]
    before = [getattr(owner, name) for owner, name in switches]
    threads = torch.get_num_threads()
    # on a busy machine, threads that wait for each other make small steps 30 times slower
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    for (owner, name), value in zip(switches, before, strict=True):
        setattr(owner, name, value)


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-demo as small as can be, for tests whose weights are random anyway: in this process."""
    shape = GPTConfig(n_layer=1, n_head=1, dim=64)
    monkeypatch.setitem(GPT_models, "GPT-demo", partial(build_gpt, shape))


def reference_weights(model: nn.Module, seed: int) -> None:
    """Fills a model with the weights that tests/reference was made with (its recipe is in
    tests/reference/README.md).
    """
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key == "quantize.codebook_used":
                continue
            generator = torch.Generator().manual_seed(
                (seed * 1000003 + zlib.crc32(key.encode())) % 2**63
            )
            drawn = torch.randn(tensor.shape, generator=generator)
            if "embedding" in key:
                tensor.copy_(drawn)
            elif tensor.dim() > 1:
                tensor.copy_(drawn / float(np.prod(tensor.shape[1:])) ** 0.5)
            else:
                tensor.copy_(0.1 * drawn + (1.0 if key.endswith("weight") else 0.0))


def load_reference(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A reference file's description and arrays."""
    with np.load(REFERENCE / f"{name}.npz") as arrays:
        values = {key: arrays[key] for key in arrays.files}
    meta = json.loads(str(values.pop("meta"))) if "meta" in values else {}
    return meta, values
