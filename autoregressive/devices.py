"""Which device a command runs on, found out before anything is put there; and what every command
minds while it runs there.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autoregressive.errors import SettingError, SettingName
from autoregressive.models.config import GPTConfig

PRECISIONS = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda (the first GPU) or cuda:N.

    Raises:
        SettingError: another name, or no such GPU here.
    """
    wanted = re.fullmatch(r"cpu|cuda(?::([0-9]+))?", name)
    if wanted is None:
        raise SettingError("device", name, "must be cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SettingError(
            "device", name, ("PyTorch finds no GPU here; use ", SettingName("device"), " cpu")
        )
    number, there = wanted[1] or "0", list(map(str, range(torch.cuda.device_count())))
    if number not in there:
        raise SettingError("device", name, f"the GPUs here are cuda:0 to cuda:{there[-1]}")
    return torch.device("cuda", int(number))


def rank_devices(first: torch.device, count: int) -> list[torch.device]:
    """The devices of ranks that share a model: a CPU for all, or the GPUs from one on."""
    if first.type == "cpu":
        return [first] * count
    return [torch.device("cuda", (first.index or 0) + number) for number in range(count)]


def default_precision(device: torch.device) -> torch.dtype:
    """Of a transformer's weights: bf16 on a GPU that computes in it, fp16 on an older one, float32
    on a CPU.
    """
    if device.type != "cuda":
        return torch.float32
    # The first GPUs that multiply in bf16 have compute capability 8.0.
    in_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if in_bf16 else torch.float16


def set_llamagen_numerics(device: torch.device) -> None:
    """TF32 and deterministic convolutions, as LlamaGen's commands set them; makes a GPU the current
    one.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.cuda.set_device(device)


def limit_cpu_threads(config: GPTConfig, device: torch.device, engines: int = 1) -> None:
    """One CPU thread where there is nothing to share: a GPU computes, or the model's products are
    too small (below a width of 512).

    More would spin on all cores after each operation on more than 32,768 elements on the CPU: other
    processes find no core free, and a thread that finds none holds up a step, for all of them are
    waited for. Ranks that share a model share the threads of the machine.

    Args:
        engines: that run beside each other on the machine; they share its threads, too.
    """
    if device.type == "cuda" or config.dim < 512:
        torch.set_num_threads(1)
    elif (sharing := config.ranks * engines) > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // sharing))


@contextmanager
def limited_cpu_threads(config: GPTConfig, device: torch.device) -> Iterator[None]:
    """`limit_cpu_threads`, for a while."""
    before = torch.get_num_threads()
    limit_cpu_threads(config, device)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """One CPU thread for a while. Sums on several have another order for each number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Float32 products are IEEE float32's, even where the process allows TF32 or bf16 in their
    place; it does again afterwards.

    The switches are the whole process's: products of other threads go by them for as long.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    # reads what either of torch's two interfaces has set
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given; only differences mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    said = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in said
    )
