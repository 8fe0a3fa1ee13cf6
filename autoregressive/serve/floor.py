"""The memory floor: the least time that a step can take on a device. Every report of the engine's
speed is compared with it.

A step reads every weight of the layers and of the head once, and every row's keys and values once.
Each matrix product takes at least the larger of two times: its weights' bytes over the read
bandwidth, and its operations over the rate of the matrix units (a roofline, which for few rows is
the memory's side). Reading keys and values comes on top. Embeddings, norms, activations and the
draw count as nothing. Both ceilings are measured in the run that uses them.

The floor of a job takes every pass to keep one token of an image. With lookahead there are fewer
passes, so a job may take less time than this floor.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from autoregressive.devices import ieee_float32
from autoregressive.models.config import GPTConfig
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import EngineTotals
from autoregressive.serve.engine.request import Request
from autoregressive.serve.engine.scheduler import Limits, Scheduler
from kernels.quantization import INT4_GROUP

_MATRIX_SIDE = 8192
_SCALE_BYTES = 4
# of a weight; a scale for each output is next to nothing
_QUANTIZED_BYTES = {"fp8": 1.0, "int8": 1.0, "int4": 0.5 + _SCALE_BYTES / INT4_GROUP}


@dataclass(frozen=True)
class Ceilings:
    """The most that a device can do, as measured."""

    read_bytes_per_second: float
    # of a large matrix product; a multiplication and an addition are two
    operations_per_second: float

    def or_higher(self, other: "Ceilings") -> "Ceilings":
        """The higher of each ceiling. A GPU that is hot from earlier work measures less, which
        would flatter the results that are compared with it.
        """
        return Ceilings(
            max(self.read_bytes_per_second, other.read_bytes_per_second),
            max(self.operations_per_second, other.operations_per_second),
        )


def product_elements(config: GPTConfig) -> tuple[int, ...]:
    """Elements of the weights of each kind of matrix product in a step, all layers together, on
    each of the ranks that share the model.
    """
    dim, layers = config.dim, config.n_layer
    heads, ffn = config.width_of_rank, config.ffn_of_rank
    return (
        dim * 3 * heads * layers,  # queries, keys and values
        heads * dim * layers,  # attention's output
        dim * 2 * ffn * layers,  # gate and up
        ffn * dim * layers,  # down
        dim * config.vocabulary_of_rank,  # head
    )


@dataclass(frozen=True)
class Floor:
    """The memory floor of one model on one device; the module says what it is."""

    config: GPTConfig
    element_bytes: int  # of a weight, and of a key or value, but for what is quantised
    ceilings: Ceilings
    quantization: str | None = None  # as of `EngineConfig`
    kv_cache_dtype: str = "auto"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token of one row, in all layers, on each rank."""
        vector_bytes = self.config.width_of_rank * self.element_bytes
        if self.kv_cache_dtype != "auto":
            vector_bytes = self.config.width_of_rank + self.config.heads_of_rank * _SCALE_BYTES
        return 2 * self.config.n_layer * vector_bytes

    def step_seconds(self, rows: int, kv_tokens: float) -> float:
        """The floor of one step.

        Args:
            rows: that take the step.
            kv_tokens: tokens of all rows together whose keys and values are read (the newest, which
                is written, counts as read).
        """
        seconds = kv_tokens * self.kv_bytes_per_token / self.ceilings.read_bytes_per_second
        return seconds + sum(of_product for _, of_product in self.products(rows))

    def products(self, rows: int) -> list[tuple[float, float]]:
        """Bytes of the weights and the floor in seconds of each product, in the order of
        `product_elements`. The head is not quantised.
        """
        layers_size = self.element_bytes + 0.0
        if self.quantization is not None:
            layers_size = _QUANTIZED_BYTES[self.quantization]
        *layers, head = product_elements(self.config)
        sized = [(elements, layers_size) for elements in layers] + [(head, self.element_bytes)]
        return [(elements * size, self._seconds(elements, size, rows)) for elements, size in sized]

    def _seconds(self, elements: int, element_bytes: float, rows: int) -> float:
        reading = elements * element_bytes / self.ceilings.read_bytes_per_second
        return max(reading, 2 * elements * rows / self.ceilings.operations_per_second)


@dataclass(frozen=True)
class JobFloor:
    """The memory floor of a whole job of the engine, at one token of an image a pass."""

    steps: int  # passes
    seconds: float


def job_floor(floor: Floor, limits: Limits, jobs: Sequence[SamplingParams]) -> JobFloor:
    """Counts the steps that the engine needs for requests that are all there at the start, without
    lookahead, and adds up their floor. It runs the scheduler alone.
    """
    scheduler = Scheduler(limits)
    for number, params in enumerate(jobs):
        scheduler.add(Request(number, 0, params))
    scheduler.admit()
    steps, seconds = 0, 0.0
    while (span := scheduler.plan_span(limits.tokens)) > 0:
        scheduler.allocate(span)
        positions = [image.position for image in scheduler.images for _ in image.rows]
        mean_kv_tokens = sum(positions) + len(positions) * (span + 1) / 2
        steps += span
        seconds += span * floor.step_seconds(len(positions), mean_kv_tokens)
        for ended in scheduler.advance(span):
            scheduler.release_slots(ended.slots)
        scheduler.admit()
    return JobFloor(steps, seconds)


def speed_lines(
    images: int,
    tokens: int,
    seconds: Sequence[float],
    job: JobFloor,
    ceilings: Ceilings | None,
    totals: EngineTotals,
) -> list[str]:
    """How fast pictures were drawn, as the command prints it. Where nothing was guessed, nothing is
    said of lookahead.

    Args:
        tokens: of an image.
        seconds: of the sampling, and of the decoding.
        job: the floor of the sampling.
        ceilings: those of the floor; None: not measured, for there is no GPU.
        totals: of an engine that has drawn these pictures and no others.
    """
    sampling, decoding = seconds
    each, floor = f"{sampling / job.steps * 1e3:.3f} ms/step", "memory floor"
    if totals.drafted:
        each = f"{sampling / totals.passes * 1e3:.3f} ms/pass"
        floor = "memory floor of one token a pass"
    lines = [
        f"{images * tokens / sampling:.0f} tokens/s, {images / (sampling + decoding):.2f} images/s "
        f"with decoding, {each}."
    ]
    if totals.drafted:
        kept = images * tokens / (images * tokens - totals.accepted)
        lines.append(
            f"lookahead: {totals.passes} passes, where one token a pass takes {job.steps}; "
            f"{kept:.2f} tokens of an image kept a pass."
        )
    if ceilings is not None:
        lines.append(
            f"share of the {floor}: {job.seconds / sampling:.1%} (at best {job.seconds:.3f} "
            f"seconds, with the {ceilings.read_bytes_per_second / 1e12:.2f} TB/s and "
            f"{ceilings.operations_per_second / 1e12:.0f} TFLOP/s measured here)."
        )
    return lines


@ieee_float32()
def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Ceilings:
    """Measures both ceilings on a GPU in well under a second: a sum over 2 GiB, or over half of the
    free memory where that is less, and a large matrix product. Each is the median of `repeats` runs
    on random data, because zeros run faster.

    Args:
        dtype: of the matrix product; float32 is IEEE float32, as the engine's.
    """
    free_bytes, _ = torch.cuda.mem_get_info(device)
    size_bytes = max(min(2 * 2**30, free_bytes // 2), 2**28)  # far beyond any cache
    data = torch.rand(size_bytes // 4, device=device)  # float32
    read_bytes_per_second = data.numel() * 4 / median_seconds(data.sum, device, repeats)
    del data
    a, b = (torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, device=device, dtype=dtype) for _ in range(2))
    multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
    operations_per_second = 2 * _MATRIX_SIDE**3 / median_seconds(multiply, device, repeats)
    del a, b, multiply
    torch.cuda.empty_cache()
    return Ceilings(read_bytes_per_second, operations_per_second)


def median_seconds(
    run: Callable[[], object],
    device: torch.device,
    repeats: int,
    before: Callable[[], object] | None = None,
) -> float:
    """The time of one run on a GPU: the median of `repeats` runs by the device's clock, after two
    warm-ups.

    Args:
        before: called ahead of each run; what it enqueues is not timed.
    """
    times = []
    with torch.cuda.device(device):
        for repeat in range(repeats + 2):
            if before is not None:
                before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if repeat >= 2:
                times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
