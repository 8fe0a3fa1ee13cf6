"""What the scripts' command lines have in common: models, lists with commas, least values, the
device, the figures' file.

What is wrong with a value is said in one line, and before any measuring.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from autoregressive.benchmarks.models import PAPER_MODELS
from autoregressive.files import check_file, write_whole
from autoregressive.models.config import GPT_SHAPES
from autoregressive.models.defaults import DEMO_MODEL

ENFORCE_EAGER_HELP = "launch kernels one by one, no CUDA graphs; no effect on a CPU"
DETERMINISTIC_HELP = (
    "as the engine's flag: Triton kernels for products of more than 64 rows too; no effect on a CPU"
)


def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""

    def parse(typed: str) -> list[str]:
        chosen = [name for name in typed.split(",") if name]
        unknown = [name for name in chosen if name not in allowed]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown) or 'nothing'}: choose from {', '.join(allowed)}"
            )
        return chosen

    return parse


def row_counts(typed: str) -> list[int]:
    """Comma-separated numbers of rows, each of whole guided pairs."""
    counts = [int(count) if count.isdecimal() else 0 for count in typed.split(",")]
    if any(count < 2 or count % 2 for count in counts):
        raise argparse.ArgumentTypeError(
            f"{typed}: must be even numbers, 2 or more, with commas between them"
        )
    return counts


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on."""

    def parse(typed: str) -> int:
        if not typed.isdecimal() or int(typed) < least:
            raise argparse.ArgumentTypeError(f"{typed}: must be a whole number, {least} or more")
        return int(typed)

    return parse


def service_key(environment: Mapping[str, str]) -> str | None:
    """The key to send: the first one in LLAMAGEN_API_KEY, where a service may have several."""
    keys = environment.get("LLAMAGEN_API_KEY")
    return keys.split(",")[0].strip() if keys else None


def add_models(parser: argparse.ArgumentParser, *, gpu_only: bool = False) -> None:
    """Adds --models: to be given to `models_for`, unless the script needs a GPU anyway."""
    default = ",".join(PAPER_MODELS)
    parser.add_argument(
        "--models",
        type=names(list(GPT_SHAPES)),
        default=default if gpu_only else None,
        metavar="NAMES",
        help=f"of {', '.join(GPT_SHAPES)}, with commas between them (default: "
        f"{default}{'' if gpu_only else on_cpu(DEMO_MODEL)})",
    )


def models_for(typed: list[str] | None, device: torch.device) -> list[str]:
    """What --models means on a device: large models take hours on a CPU, where the small one shows
    that the script works.
    """
    return typed or (list(PAPER_MODELS) if device.type == "cuda" else [DEMO_MODEL])


def on_cpu(default: object) -> str:
    """How a flag's help tells the default of a CPU behind that of a GPU."""
    return f"; on a CPU {default}"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device: to be given to `resolve_device`."""
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="D",
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds --output: to be given to `check_output` before the work and to `give_figures`
    after it.
    """
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="also write the figures here"
    )


def check_output(path: Path | None) -> None:
    """Raises `UserError` if --output was typed and cannot be written, now and not after the
    measuring.
    """
    if path is not None:
        check_file("--output", path, ".json")


def give_figures(figures: Mapping[str, object], path: Path | None) -> None:
    """Prints the figures as one line of JSON, the last of a benchmark's output, and writes them
    where --output says.
    """
    print(json.dumps(figures))
    if path is not None:
        write_whole(path, lambda part: part.write_text(json.dumps(figures, indent=1) + "\n"))
