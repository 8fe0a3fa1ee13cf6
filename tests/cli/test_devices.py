"""What every command minds of the device that it runs on, beside the names in test_arguments.py."""

from collections.abc import Iterator

import pytest
import torch

from autoregressive.devices import limited_cpu_threads
from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.serve import lifecycle
from autoregressive.serve.web.server_flags import read_arguments
from autoregressive.serve.web.server_settings import resolve_server_settings
from autoregressive.serve.worker import worker


@pytest.fixture
def several_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("model", "device", "threads"),
    [
        ("GPT-XL", "cuda", 1),
        ("GPT-demo", "cuda:1", 1),
        ("GPT-demo", "cpu", 1),
        ("GPT-B", "cpu", 3),
        ("GPT-XL", "cpu", 3),
    ],
)
def test_threads_are_used_where_there_is_something_to_share(
    several_threads: int, model: str, device: str, threads: int
) -> None:
    """Fails if threads spin beside a GPU, or a wide model on a CPU has but one."""
    with limited_cpu_threads(GPTConfig(**vars(GPT_SHAPES[model])), torch.device(device)):
        assert torch.get_num_threads() == threads
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
