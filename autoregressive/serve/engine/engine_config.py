"""The settings that an engine is built with. Nothing here imports torch, so that a command can say
its flags at once.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

from autoregressive.errors import SettingError
from kernels import BACKENDS, KV_CACHE_DTYPES, QUANTIZATIONS

if TYPE_CHECKING:
    import torch

SchedulingPolicy = Literal["fcfs", "fair"]
SCHEDULING_POLICIES: tuple[SchedulingPolicy, ...] = get_args(SchedulingPolicy)
LookaheadSetting = Literal["auto", "off"] | int
MOST_LOOKAHEAD = 64
# Rows are an axis of the kernels' grids; page numbers are int32.
_MOST = {
    "max_num_seqs": 65535,
    "page_size": 2**20,
    "num_pages": 2**31 - 1,
    "tensor_parallel_size": 1024,
    "engines_on_cpu": 1024,
}


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is built with. Names and defaults follow vLLM where the thing is the same.

    Raises:
        SettingError: a value is out of range; the message says what is allowed.
    """

    max_num_seqs: int = 256  # rows that run at once; a guided image has two
    page_size: int = 16  # tokens of a page
    num_pages: int | None = None  # None: as many as fit, and as are of use
    # share of the GPU's memory that may be filled; without effect where num_pages is given
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False  # no CUDA graphs
    attention_backend: str = "auto"
    # Triton's kernels for any number of rows: codes do not depend on neighbours; a library's may.
    # Hopper has kernels for any number.
    deterministic: bool = False
    # "fcfs": first come, first served; "fair": an equal share for each client that waits
    scheduling_policy: SchedulingPolicy = "fcfs"
    # Positions of an image that one pass computes: more than one takes fewer passes for the same
    # tokens. "off" is 1, and "auto" a number that suits the rows that run.
    lookahead: LookaheadSetting = "auto"
    # of the weights of the layers' products: "fp8", "int8" or "int4"; None: as they are
    quantization: str | None = None
    # of the pages: "fp8" and "int8" take half of the memory of 16 bits, "auto" is the weights' own
    kv_cache_dtype: str = "auto"
    # processes, one a device, that share the model; one of its `GPTConfig.rank_counts`
    tensor_parallel_size: int = 1
    # engines that share a CPU's threads and memory, this one among them; the service sets it
    engines_on_cpu: int = 1

    def __post_init__(self) -> None:
        for name, value in (
            ("max_num_seqs", self.max_num_seqs),
            ("page_size", self.page_size),
            ("num_pages", self.num_pages),
            ("tensor_parallel_size", self.tensor_parallel_size),
            ("engines_on_cpu", self.engines_on_cpu),
        ):
            if value is not None and not (
                isinstance(value, Integral) and 1 <= value <= _MOST[name]
            ):
                raise SettingError(name, value, f"must be a whole number, 1 to {_MOST[name]}")
        share = self.gpu_memory_utilization
        if not 0 < share <= 1:
            raise SettingError("gpu_memory_utilization", share, "must be above 0 and at most 1")
        for name, choices in (
            ("attention_backend", BACKENDS),
            ("scheduling_policy", SCHEDULING_POLICIES),
            ("quantization", (None, *QUANTIZATIONS)),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
        ):
            chosen = getattr(self, name)
            if chosen not in choices:
                raise SettingError(name, chosen, f"must be one of {', '.join(map(str, choices))}")
        if self.quantization is not None and self.tensor_parallel_size > 1:
            told = "quantised weights are not split among processes; leave one of both out"
            raise SettingError("quantization", self.quantization, told)
        window = self.lookahead
        if window not in ("auto", "off") and not (
            isinstance(window, Integral)
            and not isinstance(window, bool)
            and 1 <= window <= MOST_LOOKAHEAD
        ):
            told = f"must be auto, off or a whole number, 1 (off) to {MOST_LOOKAHEAD}"
            raise SettingError("lookahead", window, told)

    def uses_graphs(self, device: "torch.device") -> bool:
        """Whether steps are captured as CUDA graphs."""
        return device.type == "cuda" and not self.enforce_eager
