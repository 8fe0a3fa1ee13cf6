"""Times every kernel of a step alone: against its floor, and the matrix products against cuBLAS.
Ends in JSON.

    python scripts/benchmarks/bench_kernels.py --models GPT-B,GPT-XL --rows 2,16,64 --context 288

First each kernel's result is compared with the torch reference in float32; one that is wrong is not
timed. Then launches follow each other in a CUDA graph, with programmatic dependent launch where the
GPU has it, as they do in a step, over so many copies of weights and KV pages that none is in the
second-level cache. Times are medians of 11. The floor is the bytes that must be moved over the read
bandwidth, or the operations over the rate of a large matrix product if that is more; both are
measured in the same run. Kernels are those of a step with so many rows on this GPU, in tiles of
kernels/tiles.py; above 64 rows, where a step leaves products to the library, the plain ones, and
`gate`, which follows the library's. `attention` includes `combine`, the kernel that weighs its
chunks, which is also timed alone. cuBLAS's times are of the products alone: our `swiglu` also
gates, and up to 64 rows of 16-bit weights on compute capability 9.0 our products also norm their
inputs or add themselves to the residual stream, so that there is no `add_norm`. The pixel decoder,
whose kernels no step runs, is measured as a whole: scripts/benchmarks/bench_pixels.py. Needs a GPU
of compute capability 8.0 or above; exit status 2 if a kernel is wrong.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError, tell

with slow_imports(__name__):
    import torch

    from autoregressive.benchmarks.harness import config_of, use_device
    from autoregressive.benchmarks.kernel_cases import Case, Setting, cases
    from autoregressive.benchmarks.script import (
        Table,
        add_device,
        add_models,
        add_output,
        add_quantization,
        give_figures,
        listed,
        row_count,
        script_parser,
    )
    from autoregressive.devices import PRECISIONS
    from autoregressive.output.records import device_name
    from autoregressive.serve.floor import Ceilings, measure_ceilings, median_seconds
    from kernels.attention_reference import attention_reference
    from kernels.operations import select_operations, triton_runs_on
    from kernels.quantization import BYTE_DTYPES
    from kernels.tiles import ATTENTION, tile_table

REPEATS = 11
FEWEST_LAUNCHES = 20  # of a graph, so that its start does not count
CACHES = 4  # copies fill the second-level cache so many times
_LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# share of draws that may differ from the reference's: ties within the noise's precision
_OTHER_TOKENS = 0.1
_COLUMNS = {
    "model": "<9",
    "rows": ">4",
    "operation": "<15",
    "shape": "<20",
    "error": ">8.1e",
    "us": ">8.2f",
    "floor us": ">9.2f",
    "share": ">7.1%",
    "cuBLAS us": ">10.2f",
    "speed-up": ">9.2f",
}


def floor_seconds(case: Case, ceilings: Ceilings) -> float:
    """The least time of a launch."""
    return max(
        case.bytes / ceilings.read_bytes_per_second,
        2 * case.multiplications / ceilings.operations_per_second,
    )


def is_wrong(case: Case, error: float, dtype: torch.dtype) -> bool:
    """Whether a result is too far from the reference's, as NaN always is."""
    return not error <= (_OTHER_TOKENS if case.operation == "draw" else _LARGEST_ERROR[dtype])


def launch_us(run: Callable[[int], object], copies: int, device: torch.device) -> float:
    """Microseconds of one launch in a row of equal launches."""
    launches = max(FEWEST_LAUNCHES, copies)
    run(0)  # compiles, or builds the library's plan
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in range(launches):
            run(launch % copies)
    return median_seconds(graph.replay, device, REPEATS) / launches * 1e6


def measure(
    case: Case, setting: Setting, model: str, ceilings: Ceilings, table: Table
) -> dict[str, Any]:
    """Compares an operation with its reference, then times it unless it is wrong. Prints a line."""
    error = case.error()
    wrong = is_wrong(case, error, setting.dtype)
    us = library_us = None
    if not wrong:
        us = launch_us(case.run, case.copies, setting.device)
        if case.library is not None:
            library_us = launch_us(case.library, case.copies, setting.device)
    floor_us = floor_seconds(case, ceilings) * 1e6
    figures = {
        "model": model,
        "rows": setting.rows,
        "operation": case.operation,
        "shape": case.shape,
        "error": error,
        "us": us,
        "floor_us": floor_us,
        "share": us and floor_us / us,
        "library_us": library_us,
    }
    shown = figures | {"us": "WRONG" if wrong else us}
    table.row(*shown.values(), us and library_us and library_us / us)
    return {**figures, "wrong": wrong}


@torch.no_grad()
def measure_model(model: str, typed: argparse.Namespace, table: Table) -> list[dict[str, Any]]:
    """Measures every kernel for every number of rows."""
    config, device, dtype = config_of(model), typed.device, PRECISIONS[typed.precision]
    operations = select_operations(
        device, dtype, config.n_head, config.head_size, "triton", tell=tell
    )
    capability = torch.cuda.get_device_capability(device)
    tiles = tile_table(capability, dtype).find(ATTENTION, config.n_head, config.head_size)
    ceilings = measure_ceilings(device, dtype)
    results = []
    for rows in typed.rows:
        setting = Setting(
            config,
            rows,
            typed.context,
            device,
            dtype,
            operations,
            CACHES * torch.cuda.get_device_properties(device).L2_cache_size,
            attention_tiles=None if operations.attention is attention_reference else tiles,
            launch_pdl=capability >= (9, 0),
            quantization=typed.quantization,
            page_dtype=BYTE_DTYPES.get(typed.kv_cache_dtype),
        )
        torch.manual_seed(0)
        results += [measure(case, setting, model, ceilings, table) for case in cases(setting)]
    return results


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_models(parser, gpu_only=True)
    parser.add_argument(
        "--rows",
        type=listed(row_count),
        default="2,16,64",
        metavar="NUMBERS",
        help="rows of a step: even numbers, with commas between them (default: %(default)s)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=288,
        metavar="TOKENS",
        help="tokens that attention reads of each row (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=list(PRECISIONS),
        default="bf16",
        metavar="P",
        help="none (float32), fp16 or bf16 (default: %(default)s)",
    )
    add_quantization(parser)
    add_device(parser)
    add_output(parser)
    typed = parser.parse_args(argv)
    for model in typed.models:
        tokens = config_of(model).block_size
        if not 1 <= typed.context <= tokens:
            raise UserError(
                f"--context {typed.context}: must be 1 to {tokens}, the tokens of {model}'s image"
            )
    typed.device = use_device(typed.device)
    if typed.device.type != "cuda" or not triton_runs_on(typed.device):
        raise UserError(
            "a GPU of compute capability 8.0 or above is needed: elsewhere the kernels do not run"
        )
    return typed


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    typed = parse_arguments(argv)
    device = device_name(typed.device)
    print(f"{device}, precision {typed.precision}, median of {REPEATS}, microseconds")
    table, results = Table(_COLUMNS), []
    for model in typed.models:
        results += measure_model(model, typed, table)
    give_figures(
        {
            "benchmark": "kernels",
            "device": device,
            "torch": torch.__version__,
            "precision": typed.precision,
            "context": typed.context,
            "repeats": REPEATS,
            "results": results,
        },
        typed.output,
    )
    wrong = sum(result["wrong"] for result in results)
    if wrong:
        raise UserError(
            f"{wrong} of {len(results)} kernels differ from their references: see the lines above"
        )


if __name__ == "__main__":
    run_command(main)
