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

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from autoregressive.benchmarks.harness import (
        config_of,
        empty_transformer,
        use_device,
        with_random_weights,
    )
    from autoregressive.benchmarks.script import (
        Table,
        add_device,
        add_engine_flags,
        add_model,
        add_output,
        give_figures,
        on_cpu,
        row_count,
        script_parser,
    )
    from autoregressive.devices import PRECISIONS, limited_cpu_threads
    from autoregressive.models.defaults import DEMO_MODEL
    from autoregressive.models.gpt import Transformer
    from autoregressive.models.sampling_params import SamplingParams
    from autoregressive.output.records import device_name
    from autoregressive.serve.engine.batch import Batch, BatchShape
    from autoregressive.serve.engine.kv_pages import LayerPages
    from autoregressive.serve.engine.model_runner import ModelRunner, quantize_as_configured
    from autoregressive.serve.engine.request import ImageState, RowState
    from autoregressive.serve.engine_flags import engine_config
    from autoregressive.serve.floor import Floor, measure_ceilings, median_seconds
    from kernels.operations import Operations, triton_runs_on

STEPS = 16  # of a span; the context grows by as many
REPEATS = 11
PAGE_SIZE = 16
TOP_K = 2000  # the commands' default
_MODEL = "GPT-XL"
_SCALED, _LARGEST = 32.0, 127.0  # of random pages with scales; int8 holds no larger number
_COLUMNS = {
    "operation": "<15",
    "launches": ">8.4g",
    "busy us": ">10.2f",
    "mean us": ">9.2f",
    "adds us": ">10.2f",
    "MB": ">9.2f",
    "floor us": ">9.2f",
    "share": ">7.1%",
}
# As `floor.products` lists them.
PRODUCTS = ("qkv product", "output product", "swiglu", "down product", "head")
# In the order of a step. Where a library does the products of many rows, `swiglu` is the product
# and `gate` what follows it.
ORDER = (
    "embed", "qkv product", "attention", "combine", "output product", "add_norm",
    "swiglu", "gate", "down product", "head", "draw",
)  # fmt: skip

_KERNELS = {
    "_embed_kernel": "embed",
    "_attention_kernel": "attention",
    "_hopper_attention_kernel": "attention",
    "_many_rows_attention_kernel": "attention",
    "_scaled_attention_kernel": "attention",
    "_many_rows_scaled_attention_kernel": "attention",
    "_combine_kernel": "combine",
    "_add_norm_kernel": "add_norm",
    "_swiglu_kernel": "swiglu",
    "_fused_swiglu_kernel": "swiglu",
    "_many_rows_swiglu_kernel": "swiglu",
    "_quantized_swiglu_kernel": "swiglu",
    "_many_rows_quantized_swiglu_kernel": "swiglu",
    "_gate_kernel": "gate",
    "_draw_kernel": "draw",
}
# products without an `add_norm` after them
_ADD_THEMSELVES = (
    "_fused_project_kernel",
    "_many_rows_project_kernel",
    "_quantized_project_kernel",
    "_many_rows_quantized_project_kernel",
)
# Every other kernel is of a product: the one that is due after these. After the down product's
# `add_norm` a layer is over.
_NEXT_PRODUCT = {
    "embed": "qkv product",
    "attention": "output product",
    "combine": "output product",
    "add_norm": "swiglu",
    "swiglu": "down product",
    "gate": "down product",
}


Kernel = tuple[str, float, float]  # a launch: name, start and end in microseconds
# Of an operation, for one step, as in the JSON. Without a value: `adds_us`, where nothing overlaps;
# `bytes`, `floor_us` and `share`, where nothing but activations moves, which stay in the cache.
Figures = dict[str, Any]


def figures_of(
    operation: str, launches: float, busy_us: float, adds_us: float | None = None
) -> Figures:
    """The figures of an operation before its floor is known.

    Args:
        busy_us: from the kernels' start to their end.
        adds_us: from the end of the kernel before to the own end.
    """
    return {
        "operation": operation,
        "launches": launches,
        "busy_us": busy_us,
        "mean_us": busy_us / launches,
        "adds_us": adds_us,
        "bytes": None,
        "floor_us": None,
        "share": None,
    }


def operations_of(names: Iterable[str], layers: int) -> list[str]:
    """Which operation each kernel is of, by its name and by what came before.

    Args:
        names: kernels in the order of their starts, from the beginning of a step.
        layers: of the model.
    """
    found: list[str] = []
    due, layer = "qkv product", 0
    for name in names:
        own = next(
            (operation for kernel, operation in _KERNELS.items() if name.startswith(kernel)), None
        )
        found.append(own or due)
        if own == "embed":
            layer = 0
        if due == "down product" and (own == "add_norm" or name.startswith(_ADD_THEMSELVES)):
            layer += 1
            due = "qkv product" if layer < layers else "head"
        elif own is not None:
            due = _NEXT_PRODUCT.get(own, due)
    return found


def summed(kernels: Sequence[Kernel], layers: int, steps: int) -> list[Figures]:
    """Times for one step of each operation, in the order of a step.

    Args:
        kernels: all of `steps` steps, in any order.

    Raises:
        UserError: the kernels are not those of so many steps.
    """
    kernels = sorted(kernels, key=lambda kernel: kernel[1:])
    labels = operations_of((name for name, _, _ in kernels), layers)
    seen = labels.count("embed")
    if seen != steps or labels.count("draw") != steps:
        raise UserError(
            f"the profiler saw {seen} of {steps} steps: try again, or with --enforce-eager"
        )
    busy, adds = dict.fromkeys(ORDER, 0.0), dict.fromkeys(ORDER, 0.0)
    last_end = kernels[0][1]
    for label, (_, start, end) in zip(labels, kernels, strict=True):
        busy[label] += (end - start) / steps
        adds[label] += max(0.0, end - last_end) / steps
        last_end = max(last_end, end)
    return [
        figures_of(label, labels.count(label) / steps, busy[label], adds[label])
        for label in ORDER
        if label in labels
    ]


def add_floor(times: list[Figures], floor: Floor, rows: int, context: float) -> None:
    """Adds each operation's bytes, its memory floor, and the floor's share of what it adds.

    Args:
        context: tokens that a row attends to.
    """
    kv_bytes = round(rows * context * floor.kv_bytes_per_token)
    known = {"attention": (float(kv_bytes), kv_bytes / floor.ceilings.read_bytes_per_second)}
    known |= zip(PRODUCTS, floor.products(rows), strict=True)
    for each in times:
        if each["operation"] in known:
            moved, seconds = known[each["operation"]]
            share = seconds * 1e6 / (each["adds_us"] or each["busy_us"])
            each |= {"bytes": moved, "floor_us": seconds * 1e6, "share": share}


class TimedRunner(ModelRunner):
    """Times each operation by the host's clock: only on a CPU, where a call returns when its work
    is done.
    """

    def make_operations(self, gpt: Transformer) -> Operations:
        """The model's operations, each of which is timed."""
        operations, width, ffn = super().make_operations(gpt), gpt.config.dim, gpt.config.ffn_dim
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)  # of each call
        linear = {
            (3 * width, width): "qkv product",
            (width, width): "output product",
            (width, ffn): "down product",
        }
        titles = {"whole_linear": "head", "draw_tokens": "draw"}

        def timed(name: str) -> Callable[..., None]:
            operation = getattr(operations, name)

            def run(*tensors: Any, **options: Any) -> None:
                began = time.perf_counter()
                operation(*tensors, **options)
                seconds = time.perf_counter() - began
                title = linear[tensors[1].shape] if name == "linear" else titles.get(name, name)
                self.seconds[title].append(seconds)

            return run

        names = ("embed", "linear", "swiglu", "gate", "attention", "add_norm", *titles)
        calls: dict[str, Any] = {name: timed(name) for name in names}
        return replace(operations, **calls)


class Span:
    """Steps of full rows at one context, as often as wanted.

    Args:
        runner: prepared here.
        context: of the span's middle step, as near as the ends of the image allow.
    """

    def __init__(self, runner: ModelRunner, rows: int, context: int) -> None:
        self.runner, self.rows = runner, rows
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
        for layer in runner.kv_pages.layers:  # one at a time, for memory's sake
            fill_randomly(layer)
        self.batch.codes.random_(0, runner.model.vocab_size)

    def rewind(self) -> None:
        """Puts every row at the span's first position."""
        model, tokens = self.runner.model, self.runner.shape.tokens
        params = SamplingParams(top_k=min(TOP_K, model.vocab_size))
        rows = [  # of class 0 and of no class in turn
            RowState(row % 2 and model.num_classes, row // 2, tokens, pages)
            for row, pages in enumerate(self._pages)
        ]
        images = [
            ImageState(params, image, image, rows[2 * image : 2 * image + 2], self.first, tokens)
            for image in range(self.rows // 2)
        ]
        self.batch.lengths[: self.rows // 2] = self.first
        self.batch.load(rows, images)

    def run(self) -> None:
        """Enqueues the span."""
        self.runner.run(self.batch, self.rows, self.rows // 2, self.steps, window=1)


def fill_randomly(layer: LayerPages) -> None:
    """Fills the pages of a layer with normally distributed numbers. Zeros would run faster."""
    if layer.scales is None:
        layer.pages.normal_()
        return
    numbers = torch.randn(layer.pages.shape, device=layer.pages.device)
    layer.pages.copy_(numbers.mul_(_SCALED).clamp_(-_LARGEST, _LARGEST))
    layer.scales.fill_(1 / _SCALED)


def profile_on_gpu(span: Span, layers: int) -> list[Figures]:
    """Runs one span under the profiler."""
    device = span.runner.device
    for _ in range(2):  # the first time pays for the profiler's own start
        span.rewind()
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            span.run()
            torch.cuda.synchronize(device)
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return summed(kernels, layers, span.steps)


def profile_on_cpu(span: Span) -> tuple[list[Figures], float]:
    """The host's times of one span, after a warm-up; and seconds of a step."""
    assert isinstance(span.runner, TimedRunner)
    calls, began = span.runner.seconds, 0.0
    for _ in range(2):
        span.rewind()
        calls.clear()
        began = time.perf_counter()
        span.run()
    seconds = (time.perf_counter() - began) / span.steps
    times = [
        figures_of(name, len(calls[name]) / span.steps, sum(calls[name]) / span.steps * 1e6)
        for name in ORDER
        if name in calls
    ]
    return times, seconds


@torch.no_grad()
def measure(typed: argparse.Namespace) -> dict[str, object]:
    """Prints the table; returns everything for JSON."""
    device, rows, dtype = typed.device, typed.rows, PRECISIONS[typed.precision]
    ceilings = measure_ceilings(device, dtype) if device.type == "cuda" else None
    gpt = with_random_weights(empty_transformer(typed.gpt_model), device, dtype)
    shape = BatchShape.of(rows, gpt.config.block_size, PAGE_SIZE)
    config = engine_config(typed, rows, lookahead="off")
    quantize_as_configured(gpt, config)
    make_runner = TimedRunner if ceilings is None else ModelRunner
    span = Span(make_runner(gpt, shape, rows * shape.pages_per_row, config), rows, typed.context)
    report: dict[str, object] = {"mean_context": span.mean_context, "steps": span.steps}
    floor_us = None
    with limited_cpu_threads(gpt.config, device):
        if ceilings is None:
            times, step_seconds = profile_on_cpu(span)
        else:
            floor = Floor(
                gpt.config, dtype.itemsize, ceilings, config.quantization, config.kv_cache_dtype
            )
            times = profile_on_gpu(span, gpt.config.n_layer)
            add_floor(times, floor, rows, span.mean_context)
            step_seconds = (
                median_seconds(span.run, device, REPEATS, before=span.rewind) / span.steps
            )
            floor_us = floor.step_seconds(rows, rows * span.mean_context) * 1e6
            report |= {
                "floor_us": floor_us,
                "share": floor_us / (step_seconds * 1e6),
                "ceilings": asdict(ceilings),
            }
    show(times, step_seconds * 1e6, floor_us)
    return report | {"step_us": step_seconds * 1e6, "operations": times}


def show(times: list[Figures], step_us: float, floor_us: float | None) -> None:
    """Prints the table, and below it the time of the step."""
    table = Table(_COLUMNS)
    for each in times:
        megabytes = each["bytes"] and each["bytes"] / 1e6
        table.row(*(each | {"bytes": megabytes}).values())
    if floor_us is None:
        print(f"the step: {step_us:.1f} us")
        return
    busy, adds = (sum(each[key] for each in times) for key in ("busy_us", "adds_us"))
    print(f"under the profiler: {adds:.1f} us, or {busy:.1f} with overlaps counted twice")
    share = f"{floor_us / step_us:.1%} of the floor, which is {floor_us:.1f} us"
    print(f"the step: {step_us:.1f} us: {share}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_model(parser, None, f"{_MODEL}{on_cpu(DEMO_MODEL)}")
    parser.add_argument(
        "--rows",
        type=row_count,
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
    typed.device = use_device(typed.device)
    on_gpu = typed.device.type == "cuda"
    typed.gpt_model = typed.gpt_model or (_MODEL if on_gpu else DEMO_MODEL)
    typed.precision = typed.precision or ("bf16" if on_gpu else "none")
    tokens = config_of(typed.gpt_model).block_size
    typed.context = tokens // 2 if typed.context is None else typed.context
    if not 1 <= typed.context <= tokens:
        raise UserError(f"--context {typed.context}: must be 1 to {tokens}, the tokens of an image")
    if on_gpu and not triton_runs_on(typed.device):
        raise UserError(
            "this GPU runs torch's operations, whose kernels' names do not tell what they are of: "
            "use --device cpu"
        )
    return typed


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    typed = parse_arguments(argv)
    device = device_name(typed.device)
    print(
        f"{typed.gpt_model} on {device}: one step of {typed.rows} rows at context {typed.context}, "
        f"precision {typed.precision}"
    )
    try:
        measured = measure(typed)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{typed.device} has too little free memory: fewer --rows, or a smaller --gpt-model"
        ) from error
    told = ("rows", "context", "precision", "enforce_eager", "deterministic")
    figures = {
        "benchmark": "profile_step",
        "device": device,
        "torch": torch.__version__,
        "model": typed.gpt_model,
        **{name: getattr(typed, name) for name in told},
        **measured,
    }
    give_figures(figures, typed.output)


if __name__ == "__main__":
    run_command(main)
