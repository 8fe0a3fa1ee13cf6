"""Measures how much anonymous host memory loading a checkpoint takes, for each kind, against the
limit.

    python scripts/benchmarks/bench_loading.py --gpt-model GPT-XL --kinds "flat .pt" sharded

The limit: the model's own tensors on the CPU plus 20 % of the checkpoint's weights. Each load runs
in a fresh process; memory is RssAnon of /proc/self/status above its value before the load, sampled
every few milliseconds. Weights are float32 in the file and bfloat16 in the model. Ends in JSON;
exit status 1 if a kind is over the limit.
"""

import argparse
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch
    import torch.distributed.checkpoint as dcp
    import torch.multiprocessing
    from safetensors.torch import save_file
    from torch import Tensor, distributed
    from torch.distributed.tensor import Shard, distribute_tensor

    from autoregressive.benchmarks.arguments import add_output, give_figures, script_parser
    from autoregressive.devices import now, resolve_device
    from autoregressive.files import check_folder
    from autoregressive.models.gpt import GPT_models, Transformer
    from autoregressive.weights.checkpoint import load_weights

KINDS = ("flat .pt", "training .pt", ".safetensors", "sharded")
ALLOWED_SHARE = 0.2  # of the checkpoint's weights, above the model's own CPU tensors
SAMPLING_SECONDS = 0.002
RANKS = 2


@dataclass(frozen=True)
class Measurement:
    """One load."""

    kind: str
    on_disk_bytes: int
    weights_bytes: int  # of the set of weights that is loaded, as stored
    target_bytes: int  # of the model's tensors on the CPU
    peak_bytes: int  # anonymous memory above the start
    seconds: float

    @property
    def limit_bytes(self) -> int:
        """What the peak must not exceed."""
        return self.target_bytes + int(ALLOWED_SHARE * self.weights_bytes)

    @property
    def within_limit(self) -> bool:
        """Whether the peak stays within the limit."""
        return self.peak_bytes <= self.limit_bytes


def build_on_meta(name: str) -> Transformer:
    """The transformer on the meta device, which takes no memory."""
    with torch.device("meta"):
        return GPT_models[name](block_size=576)


def random_weights(name: str) -> dict[str, Tensor]:
    """Float32 weights of that model, each with memory of its own."""
    generator = torch.Generator().manual_seed(0)
    shapes = {key: tensor.shape for key, tensor in build_on_meta(name).state_dict().items()}
    return {
        key: torch.empty(shape).uniform_(-1, 1, generator=generator)
        for key, shape in shapes.items()
    }


def write_checkpoint(kind: str, name: str, folder: Path) -> Path:
    """Writes a checkpoint of that kind as training would leave it."""
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
        path = folder / "weights.pt"
        torch.save(weights, path)
    else:
        path = folder / "training.pt"
        copies = [[tensor + 1 for tensor in weights.values()] for _ in range(3)]
        moments = {
            i: {"exp_avg": m, "exp_avg_sq": v}
            for i, (m, v) in enumerate(zip(*copies[:2], strict=True))
        }
        content = {
            "model": weights,
            "ema": dict(zip(weights, copies[2], strict=True)),
            "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4}]},
            "steps": 100,
            "args": argparse.Namespace(gpt_model=name),
        }
        torch.save(content, path)
    return path


def write_shards(rank: int, port: int, name: str, folder: str) -> None:
    """One of the processes that write a sharded checkpoint together."""
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
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
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise UserError("/proc/self/status has no RssAnon; this benchmark needs Linux")


@contextmanager
def sampled_peak() -> Iterator[list[int]]:
    """Yields a list whose one element becomes the peak of anonymous memory above the start."""
    start, peak, done = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLING_SECONDS):
            peak[0] = max(peak[0], anonymous_bytes() - start)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], anonymous_bytes() - start)


def measure_here(kind: str, name: str, path: Path, device: torch.device) -> Measurement:
    """Loads once in this process, which should have done nothing else."""
    torch.zeros(1, device=device)
    model = build_on_meta(name)
    elements = sum(tensor.numel() for tensor in model.state_dict().values())
    with sampled_peak() as peak:
        began = now(device)
        load_weights(model, path, device=device, dtype=torch.bfloat16)
        seconds = now(device) - began
    files = [path] if path.is_file() else list(path.iterdir())
    return Measurement(
        kind=kind,
        on_disk_bytes=sum(file.stat().st_size for file in files),
        weights_bytes=elements * torch.float32.itemsize,
        target_bytes=elements * torch.bfloat16.itemsize if device.type == "cpu" else 0,
        peak_bytes=peak[0],
        seconds=seconds,
    )


def measure(kind: str, name: str, folder: Path, device: torch.device) -> Measurement:
    """Writes a checkpoint, loads it in a fresh process, and removes it."""
    fresh = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(dir=folder) as place,
        ProcessPoolExecutor(1, mp_context=fresh) as process,
    ):
        path = write_checkpoint(kind, name, Path(place))
        try:
            return process.submit(measure_here, kind, name, path, device).result()
        except Exception as error:  # whatever a loader raises, or the end of its process
            raise UserError(f"the process that loads {kind} failed: {error}") from error


def print_table(measurements: list[Measurement]) -> None:
    """Prints one line for each kind, with sizes in MB (10^6 bytes)."""
    print(
        f"{'kind':<13} {'on disk':>8} {'target':>8} {'peak':>8} {'limit':>8} {'seconds':>8}  MB "
        "above the start"
    )
    for m in measurements:
        sizes = [
            size / 1e6 for size in (m.on_disk_bytes, m.target_bytes, m.peak_bytes, m.limit_bytes)
        ]
        columns = " ".join(f"{size:>8.0f}" for size in sizes)
        print(
            f"{m.kind:<13} {columns} {m.seconds:>8.2f}  "
            f"{'ok' if m.within_limit else 'OVER THE LIMIT'}"
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--gpt-model",
        choices=list(GPT_models),
        default="GPT-L",
        metavar="NAME",
        help=f"the weights' shapes: {', '.join(GPT_models)} (default: %(default)s)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"of checkpoints: {', '.join(map(repr, KINDS))} (default: all)",
    )
    parser.add_argument(
        "--device",
        type=resolve_device,
        default="cpu",
        metavar="D",
        help="where the model goes: cpu, cuda or cuda:N (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="for the checkpoints, which are removed (default: the system's folder for temporary "
        "files)",
    )
    add_output(parser)
    typed = parser.parse_args(argv)
    if typed.folder is not None:
        check_folder("--folder", typed.folder)
    anonymous_bytes()
    return typed


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    arguments = parse_arguments(argv)
    name: str = arguments.gpt_model
    measurements = []
    for kind in arguments.kinds:
        print(f"{name}, {kind} ...", file=sys.stderr)
        measurements.append(measure(kind, name, arguments.folder, arguments.device))
    print_table(measurements)
    report = {
        "benchmark": "loading",
        "gpt_model": name,
        "device": str(arguments.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "measurements": [
            asdict(m) | {"limit_bytes": m.limit_bytes, "within_limit": m.within_limit}
            for m in measurements
        ],
    }
    give_figures(report, arguments.output)
    if not all(m.within_limit for m in measurements):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
