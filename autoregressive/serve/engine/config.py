"""What an engine is built with, and how many pages a device's memory gives it."""

import os
from dataclasses import dataclass
from numbers import Integral

import torch

from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.model_runner import RunnerConfig, page_bytes
from autoregressive.serve.engine.page_pool import pages_that_fit
from kernels.dispatch import BACKENDS

_WORKSPACE_BYTES = 2 * 2**30  # of a GPU, beside weights and pages: activations, captured graphs, decoding
_CPU_SHARE = 0.25  # of the memory, for pages
# Rows are an axis of the kernels' grids; page numbers are int32.
_MOST = {"max_num_seqs": 65535, "page_size": 2**20, "num_pages": 2**31 - 1}


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is built with. Names and defaults follow vLLM where the thing is the same.

    Raises:
        ValueError: a value out of range; the message names it and what is allowed.
    """

    max_num_seqs: int = 256  # rows that run at once; a guided image has two
    page_size: int = 16  # tokens of a page
    num_pages: int | None = None  # None: as many as fit, and as are of use
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory that may be filled; without effect where num_pages is given
    enforce_eager: bool = False  # no CUDA graphs
    attention_backend: str = "auto"
    deterministic: bool = False  # an image's codes do not depend on its neighbours, also where that costs speed

    def __post_init__(self) -> None:
        for name, value in (("max_num_seqs", self.max_num_seqs), ("page_size", self.page_size), ("num_pages", self.num_pages)):
            if value is not None and not (isinstance(value, Integral) and 1 <= value <= _MOST[name]):
                raise ValueError(f"{name} {value}: must be a whole number, 1 to {_MOST[name]}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization {self.gpu_memory_utilization}: must be above 0 and at most 1")
        if self.attention_backend not in BACKENDS:
            raise ValueError(f"attention_backend {self.attention_backend}: must be one of {', '.join(BACKENDS)}")

    @property
    def runner(self) -> RunnerConfig:
        """The part of it that the runner goes by."""
        return RunnerConfig(self.attention_backend, self.enforce_eager, self.deterministic)


def default_num_pages(gpt: Transformer, shape: BatchShape, utilization: float) -> int:
    """Pages for as many rows as memory allows, at most for `max_rows`.

    Raises:
        ValueError: no memory is left.
    """
    weight = gpt.tok_embeddings.weight
    bytes_of_page = page_bytes(gpt, shape.page_size)
    most = shape.max_rows * shape.pages_per_row
    if weight.device.type == "cuda":
        torch.cuda.empty_cache()  # what loading the weights has left counts as free
        free_bytes, total_bytes = torch.cuda.mem_get_info(weight.device)
        return pages_that_fit(total_bytes, free_bytes, utilization, _WORKSPACE_BYTES, bytes_of_page, most)
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages_that_fit(total_bytes, total_bytes, _CPU_SHARE, 0, bytes_of_page, most)
