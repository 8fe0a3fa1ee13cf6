"""What every command minds of the device that it runs on, beside the names in test_arguments.py."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch

from autoregressive.devices import limit_cpu_threads, limited_cpu_threads
from autoregressive.errors import UserError
from autoregressive.models.config import GPT_SHAPES
from autoregressive.serve import lifecycle
from autoregressive.serve.bulk.ranks import Ranks
from autoregressive.serve.web.server_flags import read_arguments
from autoregressive.serve.web.server_settings import resolve_server_settings
from autoregressive.serve.worker import worker


@pytest.fixture
def several_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield 6
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("model", "device", "engines", "threads"),
    [
        ("GPT-XL", "cuda", 1, 1),
        ("GPT-demo", "cuda:1", 1, 1),
        ("GPT-demo", "cpu", 1, 1),
        ("GPT-B", "cpu", 1, 6),
        ("GPT-XL", "cpu", 1, 6),
        ("GPT-XL", "cpu", 3, 2),
        ("GPT-XL of 2 ranks", "cpu", 1, 3),
        ("GPT-XL of 2 ranks", "cpu", 2, 1),
        ("GPT-XL of 4 ranks", "cpu", 2, 1),
    ],
)
def test_threads_are_used_where_there_is_something_to_share(
    several_threads: int, model: str, device: str, engines: int, threads: int
) -> None:
    """Fails if threads spin beside a GPU, or a wide model on a CPU has but one."""
    name, _, ranks = model.partition(" of ")
    config = replace(GPT_SHAPES[name], ranks=int(ranks.removesuffix(" ranks") or 1))
    limit_cpu_threads(config, torch.device(device), engines)
    assert torch.get_num_threads() == threads


def test_more_threads_are_used_again_afterwards(several_threads: int) -> None:
    """Fails if a draw in a program leaves it with one thread."""
    with limited_cpu_threads(GPT_SHAPES["GPT-demo"], torch.device("cpu")):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == several_threads


def test_an_engines_process_uses_the_limited_cpu_threads(
    several_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an engine of the service is built with a thread for every core, whatever
    it runs on.
    """
    monkeypatch.setattr(worker, "settle_heap", lambda: None)  # this process goes on
    _, recipe = lifecycle.prepare(
        resolve_server_settings(read_arguments(["--gpt-model", "GPT-demo", "--device", "cpu"], {}))
    )
    assert torch.get_num_threads() == several_threads
    recipe(0)(lambda done, total: None)
    assert torch.get_num_threads() == 1


def test_each_engine_of_a_service_takes_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if ranks of two engines would share a GPU."""
    monkeypatch.setattr(lifecycle, "served_model", lambda *_: None)  # it asks the GPU for its name
    settings = resolve_server_settings(
        read_arguments(["--gpt-model", "GPT-demo", "--device", "cpu"], {})
    )
    engine = replace(settings.engine, tensor_parallel_size=2)
    for first, expected in ("cuda:0", ["cuda:0", "cuda:2", "cuda:4"]), ("cpu", ["cpu"] * 3):
        model = replace(settings.model, device=torch.device(first))
        _, recipe = lifecycle.prepare(replace(settings, model=model, engines=3, engine=engine))
        builds = [recipe(index) for index in range(3)]
        assert all(isinstance(build, partial) for build in builds)
        assert [str(cast(Any, build).args[0].device) for build in builds] == expected


def test_each_process_of_a_bulk_job_takes_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if models of two processes would share a GPU, or one gets GPUs that are not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert [Ranks(rank, 2, rank).device(None, 2) for rank in range(2)] == ["cuda:0", "cuda:2"]
    assert Ranks(4, 5, 4).device(None) == "cuda:4"
    with pytest.raises(UserError, match="has 5 GPUs, and each process takes 2: start no more"):
        Ranks(2, 3, 2).device(None, 2)
