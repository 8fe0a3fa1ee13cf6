"""Measures how much anonymous host memory loading a checkpoint takes, for each kind, against the
limit.

    python scripts/benchmarks/bench_loading.py --gpt-model GPT-XL --kinds "flat .pt" sharded

The limit: the model's own tensors on the CPU plus 20 % of the weights that it loads. With
--tensor-parallel-size N it loads the part of one of N ranks that share the model. Each load runs
in a fresh process; memory is RssAnon of /proc/self/status above its value before the load, sampled
every few milliseconds. Weights are float32 in the file, and bfloat16 or quantised in the model.
Ends in JSON; exit status 1 if a kind is over the limit.
"""

import argparse
import multiprocessing
import os
import platform
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError, either

with slow_imports(__name__):
    import torch
    import torch.distributed.checkpoint as dcp
    import torch.multiprocessing
    from safetensors.torch import save_file
    from torch import Tensor, distributed
    from torch.distributed.tensor import Shard, distribute_tensor

    from autoregressive.benchmarks.harness import seconds_of, use_device, with_random_weights
    from autoregressive.benchmarks.script import (
        Table,
        add_device,
        add_model,
        add_output,
        give_figures,
        script_parser,
    )
    from autoregressive.files import check_folder
    from autoregressive.models.config import GPT_SHAPES
    from autoregressive.models.gpt import GPT_models, Transformer
    from autoregressive.models.ranks import Rank
    from autoregressive.serve.engine_flags import add_quantization_flag
    from autoregressive.weights.checkpoint import load_weights
    from autoregressive.weights.quantized import weight_bytes

KINDS = ("flat .pt", "training .pt", ".safetensors", "sharded")
ALLOWED_SHARE = 0.2  # of the checkpoint's weights, above the model's own CPU tensors
SAMPLING_SECONDS = 0.002
RANKS = 2
_COLUMNS = {
    "kind": "<13",
    "on disk": ">8.0f",
    "target": ">8.0f",
    "peak": ">8.0f",
    "limit": ">8.0f",
    "seconds": ">8.2f",
    "MB above the start": "<2",
}


def build_on_meta(name: str, ranks: int = 1) -> Transformer:
    """The transformer, or one rank's part, on the meta device, which takes no memory. All have the
    large vocabulary.
    """
    with torch.device("meta"):
        return GPT_models[name](block_size=576, ranks=ranks)


def random_weights(name: str) -> dict[str, Tensor]:
    """Float32 weights of that model, each with memory of its own."""
    return with_random_weights(build_on_meta(name), torch.device("cpu"), torch.float32).state_dict()


def write_checkpoint(kind: str, name: str, folder: Path) -> Path:
    """Writes a checkpoint of that kind as training would leave it."""
    path = folder / "weights.pt"
    if kind == "sharded":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(write_shards, (port, name, str(folder)), nprocs=RANKS)
        return folder
    weights = random_weights(name)
    if kind == ".safetensors":
        path = folder / "weights.safetensors"
        save_file(weights, path)
    elif kind == "flat .pt":
        torch.save(weights, path)
    else:
        state = {
            index: {"exp_avg": tensor + 1, "exp_avg_sq": tensor + 1}
            for index, tensor in enumerate(weights.values())
        }
        content = {
            "model": weights,
            "ema": {key: tensor + 1 for key, tensor in weights.items()},
            "optimizer": {"state": state, "param_groups": [{"lr": 1e-4}]},
            "steps": 100,
            "args": argparse.Namespace(gpt_model=name),
        }
        torch.save(content, path)
    return path


def write_shards(rank: int, port: int, name: str, folder: str) -> None:
    """One of the processes that write a sharded checkpoint together."""
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    mesh = distributed.init_device_mesh("cpu", (RANKS,))
    sharded = {
        key: distribute_tensor(tensor, mesh, [Shard(0)])
        for key, tensor in random_weights(name).items()
    }
    dcp.save({"model": sharded}, checkpoint_id=folder)
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort a process that leaves the ordinary way


def anonymous_bytes() -> int:
    """Anonymous memory of this process that is resident now."""
    found = re.search(r"^RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise UserError("/proc/self/status has no RssAnon; this benchmark needs Linux")
    return int(found[1]) * 1024


@contextmanager
def sampled_peak() -> Iterator[list[int]]:
    """Yields a list whose one element becomes the peak of anonymous memory above the start."""
    start, peak, done = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        ended = False
        while not ended:
            ended = done.wait(SAMPLING_SECONDS)
            peak[0] = max(peak[0], anonymous_bytes() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def measure_here(
    kind: str,
    name: str,
    path: Path,
    device: torch.device,
    quantization: str | None = None,
    ranks: int = 1,
) -> dict[str, Any]:
    """Loads once in this process, which should have done nothing else: the last rank's part."""
    torch.zeros(1, device=device)
    model = build_on_meta(name, ranks)
    elements = sum(tensor.numel() for tensor in model.state_dict().values())
    load = partial(
        load_weights, model, path, device=device, dtype=torch.bfloat16, quantization=quantization
    )
    if ranks > 1:
        load = partial(load, rank=Rank(ranks - 1, ranks))
    with sampled_peak() as peak:
        seconds = seconds_of(load, device)
    files = [path] if path.is_file() else list(path.iterdir())
    weights_bytes = elements * torch.float32.itemsize
    target_bytes = weight_bytes(model) if device.type == "cpu" else 0
    limit_bytes = target_bytes + int(ALLOWED_SHARE * weights_bytes)
    return {
        "kind": kind,
        "on_disk_bytes": sum(file.stat().st_size for file in files),
        "weights_bytes": weights_bytes,  # of the set of weights that is loaded, as stored
        "target_bytes": target_bytes,  # of the model's tensors on the CPU
        "peak_bytes": peak[0],  # anonymous memory above the start
        "seconds": seconds,
        "limit_bytes": limit_bytes,
        "within_limit": peak[0] <= limit_bytes,
    }


def measure(
    kind: str,
    name: str,
    folder: Path,
    device: torch.device,
    quantization: str | None = None,
    ranks: int = 1,
) -> dict[str, Any]:
    """Writes a checkpoint, loads it in a fresh process, and removes it."""
    fresh = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(dir=folder) as place,
        ProcessPoolExecutor(1, mp_context=fresh) as process,
    ):
        path = write_checkpoint(kind, name, Path(place))
        try:
            way = (device, quantization, ranks)
            return process.submit(measure_here, kind, name, path, *way).result()
        except Exception as error:  # whatever a loader raises, or the end of its process
            raise UserError(f"the process that loads {kind} failed: {error}") from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_model(parser, "GPT-L")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"of checkpoints: {', '.join(map(repr, KINDS))} (default: all)",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share the model, of which one is measured (default: 1)",
    )
    add_quantization_flag(parser)
    add_device(parser, "cpu")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="for the checkpoints, which are removed (default: the system's folder for temporary "
        "files)",
    )
    add_output(parser)
    typed = parser.parse_args(argv)
    typed.device = use_device(typed.device)
    counts = GPT_SHAPES[typed.gpt_model].rank_counts
    if typed.quantization is not None and typed.tensor_parallel_size > 1:
        parser.error("--quantization: quantised weights are not split among ranks; leave it out")
    if typed.tensor_parallel_size not in counts:
        parser.error(f"--tensor-parallel-size {typed.tensor_parallel_size}: use {either(counts)}")
    if typed.folder is not None:
        check_folder("--folder", typed.folder)
    anonymous_bytes()
    return typed


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    typed = parse_arguments(argv)
    name, table, measurements = typed.gpt_model, Table(_COLUMNS), []
    way = typed.quantization, typed.tensor_parallel_size
    for kind in typed.kinds:
        print(f"{name}, {kind} ...", file=sys.stderr)
        found = measure(kind, name, typed.folder, typed.device, *way)
        measurements.append(found)
        sizes = [found[f"{size}_bytes"] / 1e6 for size in ("on_disk", "target", "peak", "limit")]
        told = "ok" if found["within_limit"] else "OVER THE LIMIT"
        table.row(kind, *sizes, found["seconds"], told)
    figures = {
        "benchmark": "loading",
        "gpt_model": name,
        "quantization": typed.quantization,
        "tensor_parallel_size": typed.tensor_parallel_size,
        "device": str(typed.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "measurements": measurements,
    }
    give_figures(figures, typed.output)
    if not all(found["within_limit"] for found in measurements):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
