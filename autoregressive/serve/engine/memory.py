"""The memory that an engine takes: how many pages there are, and what takes less of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from autoregressive.devices import is_out_of_memory
from autoregressive.errors import Change, SettingError, SettingName, UserError
from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.kv_pages import page_bytes, page_dtype
from autoregressive.serve.engine.model_runner import StepBytes
from autoregressive.weights.finding import ModelSettings, smaller_precision

# of a GPU, beside weights, pages and scratch memory: captured graphs, libraries, decoding
_RESERVE_BYTES = 2 * 2**30
_CPU_SHARE = 0.25  # of the memory, for pages
# version 2, 1
_CONTAINER_LIMITS = tuple(
    Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes")
)


def pool_pages(gpt: Transformer, shape: BatchShape, config: EngineConfig) -> int:
    """Pages of the KV cache: as many as were asked for, else as many as memory gives, at most for
    `max_rows` rows.

    Raises:
        UserError: so many do not fit, or not even one. The message says what to do.
    """
    device = gpt.tok_embeddings.weight.device
    bytes_of_page = page_bytes(gpt, shape.page_size, page_dtype(gpt, config))
    free_bytes, total_bytes = memory_of(device)
    steps = StepBytes.of(gpt, shape, config)
    there = f"{device} has {_readable(free_bytes)} of {_readable(total_bytes)} free"
    page = f"a page of {shape.page_size} tokens takes {_readable(bytes_of_page)}"
    if steps.scratch > free_bytes:
        needed = f"steps of so many rows take {_readable(steps.scratch)}, and {there}"
        remedies = (Change("lower", "max_num_seqs"), "use a smaller model")
        raise SettingError("max_num_seqs", shape.max_rows, needed, remedies)
    if config.num_pages is not None:
        fitting = (free_bytes - steps.scratch) // bytes_of_page
        if config.num_pages > fitting:
            ways: list[str | Change] = [Change("lower", "num_pages", f"to {fitting} or less")]
            if fitting <= 0:
                ways = [*_smaller_pages(config), "use a smaller model"]
            raise SettingError("num_pages", config.num_pages, f"{page}, and {there}", ways)
        return config.num_pages
    # ranks and engines share a host's memory
    share, reserve_bytes = _CPU_SHARE / (gpt.config.ranks * config.engines_on_cpu), 0
    if device.type == "cuda":
        share = config.gpu_memory_utilization
        reserve_bytes = _RESERVE_BYTES + steps.scratch + steps.gathered
    most = shape.max_rows * shape.pages_per_row
    pages = pages_that_fit(total_bytes, free_bytes, share, reserve_bytes, bytes_of_page, most)
    if pages == 0:
        told: list[str | SettingName] = [f"no memory for the KV cache: {there}, "]
        if device.type == "cuda":
            kept = (
                f"{_readable(reserve_bytes)} are kept for graphs and steps of {shape.max_rows} rows"
            )
            told += [SettingName("gpu_memory_utilization"), f" is {share:g}, {kept}, {page}"]
        else:
            told += [f"{share:.0%} of it may be pages, {page}"]
        raise UserError(*told, remedies=ways_to_more_pages(config, device))
    return pages


def pages_that_fit(
    total_bytes: int,
    free_bytes: int,
    utilization: float,
    reserve_bytes: int,
    page_bytes: int,
    most: int,
) -> int:
    """How many pages to make of a device's memory; 0 if not one fits.

    Args:
        total_bytes: the device's memory.
        free_bytes: what of it is free now, with the weights loaded.
        utilization: the share of the whole memory that this process and all others together may
            fill.
        reserve_bytes: left for activations, captured graphs and decoding.
        page_bytes: one page in all layers, keys and values.
        most: pages that the largest batch can hold; more would never be used.
    """
    budget = int(total_bytes * utilization) - (total_bytes - free_bytes) - reserve_bytes
    return max(0, min(most, budget // page_bytes))


def ways_to_more_pages(config: EngineConfig, device: torch.device) -> list[str | Change]:
    """What to do where the pool has too few pages; what was set comes first."""
    if config.num_pages is not None:
        return [Change("raise", "num_pages")]
    more = (
        [Change("raise", "gpu_memory_utilization"), Change("lower", "max_num_seqs")]
        if device.type == "cuda"
        else [Change("give", "num_pages")]
    )
    return [*_smaller_pages(config), *more, "use a smaller model"]


def ways_to_less_memory(config: EngineConfig, device: torch.device) -> list[Change]:
    """Which settings of the engine to change where memory runs out in spite of all forecasts; what
    was set comes first.
    """
    pages = [Change("lower", "num_pages")] if config.num_pages is not None else []
    if not pages and device.type == "cuda":
        pages = [Change("lower", "gpu_memory_utilization")]
    return [*pages, *_smaller_pages(config), Change("lower", "max_num_seqs")]


def _smaller_pages(config: EngineConfig) -> list[Change]:
    return [Change("lower", "page_size")] if config.page_size > EngineConfig.page_size else []


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes of a device that are free, and all; of a CPU, whose memory the system can clear, all
    count as free.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading the weights has left counts as free
        return torch.cuda.mem_get_info(device)
    # What a container may take; without a limit there is no file, or a word.
    words = [path.read_text().strip() for path in _CONTAINER_LIMITS if path.is_file()]
    limits = [int(word) for word in words if word.isdecimal()]
    total_bytes = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])
    return total_bytes, total_bytes


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@contextmanager
def saying_what_needs_less_memory(
    model: ModelSettings, config: EngineConfig | None = None
) -> Iterator[None]:
    """Turns running out of memory into a `UserError`.

    Args:
        config: the engine's settings, where they matter. What was set comes first in the message.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        ways = [
            *(ways_to_less_memory(config, model.device) if config is not None else ()),
            "use a smaller model",
            *smaller_precision(model),
        ]
        raise UserError(f"{model.device} has too little free memory", remedies=ways) from error
