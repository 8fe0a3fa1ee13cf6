"""Where one step's microseconds go: each operation's launches, time, bytes and share of the floor.
Ends in JSON.

    python scripts/benchmarks/profile_step.py --gpt-model GPT-XL --rows 16 --context 288

Runs a span of steps through the engine's runner, guided rows of random weights at about that
context, and asks torch's profiler for every kernel's start and end. Two times of each operation are
shown, both in microseconds a step:
  busy   from the kernels' start to their end. Kernels overlap (programmatic dependent launch: the
         next one's weights are on their way while the one before it ends), so these sum to more
         than the step.
  adds   from the end of the kernel before to the own end: by how much the step is longer. These sum
         to the step.
Bytes are those that must come from memory, weights and KV cache, as in
autoregressive/serve/floor.py; the share is floor / adds. The step itself is timed without the
profiler, which makes kernels a little slower. On a CPU, operations are timed by the host's clock,
attention and combine are one, and there is no floor.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from autoregressive.benchmarks.arguments import (
        add_device,
        add_engine_flags,
        add_output,
        give_figures,
        on_cpu,
        script_parser,
        use_device,
    )
    from autoregressive.benchmarks.models import config_of, random_transformer
    from autoregressive.benchmarks.step_times import (
        HEADER,
        ORDER,
        Kernel,
        OperationTime,
        summed,
        with_floor,
    )
    from autoregressive.devices import PRECISIONS, limited_cpu_threads
    from autoregressive.models.defaults import DEMO_MODEL
    from autoregressive.models.gpt import GPT_models, Transformer
    from autoregressive.models.sampling import SamplingParams
    from autoregressive.serve.engine.batch import Batch, BatchShape
    from autoregressive.serve.engine.config import EngineConfig
    from autoregressive.serve.engine.model_runner import ModelRunner
    from autoregressive.serve.engine.request import ImageState, RowState
    from autoregressive.serve.floor import Floor, measure_ceilings, median_seconds
    from kernels.operations import Operations, triton_runs_on

STEPS = 16  # of a span; the context grows by as many
REPEATS = 11
PAGE_SIZE = 16
TOP_K = 2000  # the commands' default
_MODEL = "GPT-XL"


@dataclass(frozen=True)
class Case:
    """What is profiled."""

    model: str
    rows: int
    context: int  # tokens that the span's middle step attends to, the newest included
    precision: str
    enforce_eager: bool
    deterministic: bool


class TimedRunner(ModelRunner):
    """Times each operation by the host's clock: only on a CPU, where a call returns when its work
    is done.
    """

    def make_operations(self, gpt: Transformer) -> Operations:
        """The model's operations, each of which is timed."""
        operations, width, ffn = super().make_operations(gpt), gpt.config.dim, gpt.config.ffn_dim
        self.seconds: dict[str, list[float]] = {}  # operation -> seconds of each call
        self._products = {
            (3 * width, width): "qkv product",
            (width, width): "output product",
            (width, ffn): "down product",
        }
        names = (
            "embed",
            "linear",
            "whole_linear",
            "swiglu",
            "gate",
            "attention",
            "add_norm",
            "draw_tokens",
        )
        timed: dict[str, Any] = {
            name: self._timed(name, getattr(operations, name)) for name in names
        }
        return replace(operations, **timed)

    def _timed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        title = {"whole_linear": "head", "draw_tokens": "draw"}.get(name, name)

        def run(*tensors: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = operation(*tensors, **options)
            seconds = time.perf_counter() - began
            self.seconds.setdefault(
                self._products[tensors[1].shape] if name == "linear" else title, []
            ).append(seconds)
            return result

        return run


class Span:
    """Steps of full rows at one context, as often as wanted.

    Args:
        runner: prepared here.
        context: of the span's middle step, as near as the ends of the image allow.
    """

    def __init__(self, runner: ModelRunner, rows: int, context: int) -> None:
        self.runner, self.rows, self.images = runner, rows, rows // 2
        shape = runner.shape
        self.steps = min(STEPS, shape.tokens)
        self.first = min(max(0, context - 1 - self.steps // 2), shape.tokens - self.steps)
        self.mean_context = self.first + (self.steps + 1) / 2
        order = torch.randperm(
            rows * shape.pages_per_row, generator=torch.Generator().manual_seed(0)
        )
        self._pages = order.view(rows, -1).tolist()
        self.batch = Batch(shape, runner.device)
        runner.prepare(self.batch)
        for pages in runner.kv_pages:  # a layer at a time, for memory's sake
            pages.normal_()  # zeros would run faster
        self.batch.codes.random_(0, runner.model.vocab_size)

    def rewind(self) -> None:
        """Puts every row at the span's first position."""
        model = self.runner.model
        # class 0 and no class in turn
        labels = [row % 2 and model.num_classes for row in range(self.rows)]
        rows = [
            RowState(label, row // 2, self.first, self._pages[row])
            for row, label in enumerate(labels)
        ]
        params = SamplingParams(top_k=min(TOP_K, model.vocab_size))
        images = [
            ImageState(params, image, image, rows[2 * image], rows[2 * image + 1])
            for image in range(self.images)
        ]
        self.batch.load(rows, images)

    def run(self) -> None:
        """Enqueues the span."""
        self.runner.run(self.batch, self.rows, self.images, self.steps)


def profile_on_gpu(span: Span, layers: int) -> list[OperationTime]:
    """Runs one span under the profiler."""
    device = span.runner.device
    for _ in range(2):  # the first time pays for the profiler's own start
        span.rewind()
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            span.run()
            torch.cuda.synchronize(device)
    events = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    kernels = [Kernel(event.name, event.time_range.start, event.time_range.end) for event in events]
    return summed(kernels, layers, span.steps)


def profile_on_cpu(span: Span) -> tuple[list[OperationTime], float]:
    """The host's times of one span, after a warm-up; and seconds of a step."""
    assert isinstance(span.runner, TimedRunner)
    seconds = 0.0
    for _ in range(2):
        span.rewind()
        span.runner.seconds.clear()
        began = time.perf_counter()
        span.run()
        seconds = (time.perf_counter() - began) / span.steps
    calls = span.runner.seconds
    times = {
        name: (len(calls[name]) / span.steps, sum(calls[name]) / span.steps * 1e6) for name in calls
    }
    return [OperationTime(name, *times[name], None) for name in ORDER if name in times], seconds


@torch.no_grad()
def measure(case: Case, device: torch.device) -> dict[str, object]:
    """Prints the table; returns everything for JSON."""
    dtype, on_gpu = PRECISIONS[case.precision], device.type == "cuda"
    ceilings = measure_ceilings(device, dtype) if on_gpu else None
    gpt = random_transformer(case.model, None, device, dtype)
    shape = BatchShape.of(case.rows, gpt.config.block_size, PAGE_SIZE)
    config = EngineConfig(enforce_eager=case.enforce_eager, deterministic=case.deterministic)
    make_runner = ModelRunner if on_gpu else TimedRunner
    span = Span(
        make_runner(gpt, shape, case.rows * shape.pages_per_row, config), case.rows, case.context
    )
    report: dict[str, object] = {"mean_context": span.mean_context, "steps": span.steps}
    floor_us = None
    with limited_cpu_threads(gpt.config, device):
        if ceilings is None:
            times, step_seconds = profile_on_cpu(span)
        else:
            floor = Floor(gpt.config, dtype.itemsize, ceilings)
            times = with_floor(
                profile_on_gpu(span, gpt.config.n_layer), floor, case.rows, span.mean_context
            )
            step_seconds = (
                median_seconds(span.run, device, REPEATS, before=span.rewind) / span.steps
            )
            floor_us = floor.step_seconds(case.rows, case.rows * span.mean_context) * 1e6
            report |= {
                "floor_us": floor_us,
                "share": floor_us / (step_seconds * 1e6),
                "ceilings": asdict(ceilings),
            }
    show(times, step_seconds * 1e6, floor_us)
    operations = [asdict(each) | {"mean_us": each.mean_us, "share": each.share} for each in times]
    return report | {"step_us": step_seconds * 1e6, "operations": operations}


def show(times: list[OperationTime], step_us: float, floor_us: float | None) -> None:
    """Prints the table, and below it the time of the step."""
    print(HEADER)
    for each in times:
        print(each.line())
    busy, adds = (
        sum(each.busy_us for each in times),
        [each.adds_us for each in times if each.adds_us is not None],
    )
    if adds:
        print(f"under the profiler: {sum(adds):.1f} us, or {busy:.1f} with overlaps counted twice")
    share = (
        ""
        if floor_us is None
        else f": {floor_us / step_us:.1%} of the floor, which is {floor_us:.1f} us"
    )
    print(f"the step: {step_us:.1f} us{share}")


def parse_arguments(argv: Sequence[str] | None) -> tuple[Case, torch.device, Path | None]:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--gpt-model",
        choices=list(GPT_models),
        metavar="NAME",
        help=f"{', '.join(GPT_models)} (default: {_MODEL}{on_cpu(DEMO_MODEL)})",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=16,
        metavar="N",
        help="an even number: guided pairs (default: %(default)s)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="that each row attends to (default: half of an image's)",
    )
    parser.add_argument(
        "--precision",
        choices=list(PRECISIONS),
        metavar="P",
        help=f"none (float32), fp16 or bf16 (default: bf16{on_cpu('none')})",
    )
    add_engine_flags(parser)
    add_device(parser)
    add_output(parser)
    typed = parser.parse_args(argv)
    if typed.rows < 2 or typed.rows % 2:
        raise UserError(f"--rows {typed.rows}: must be an even number, 2 or more")
    device = typed.device
    model = typed.gpt_model or (_MODEL if device.type == "cuda" else DEMO_MODEL)
    tokens = config_of(model).block_size
    context = tokens // 2 if typed.context is None else typed.context
    if not 1 <= context <= tokens:
        raise UserError(f"--context {context}: must be 1 to {tokens}, the tokens of an image")
    if device.type == "cuda" and not triton_runs_on(device):
        raise UserError(
            "this GPU runs torch's operations, whose kernels' names do not tell what they are of: "
            "use --device cpu"
        )
    precision = typed.precision or ("bf16" if device.type == "cuda" else "none")
    case = Case(model, typed.rows, context, precision, typed.enforce_eager, typed.deterministic)
    return case, device, typed.output


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    case, device, output = parse_arguments(argv)
    device_name = use_device(device)
    print(
        f"{case.model} on {device_name}: one step of {case.rows} rows at context {case.context}, "
        f"precision {case.precision}"
    )
    try:
        measured = measure(case, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} has too little free memory: fewer --rows, or a smaller --gpt-model"
        ) from error
    report = {
        "benchmark": "profile_step",
        "device": device_name,
        "torch": torch.__version__,
        **asdict(case),
        **measured,
    }
    give_figures(report, output)


if __name__ == "__main__":
    run_command(main)
