"""What the scripts' command lines have in common: models, lists with commas, numbers, the device,
the file for the figures.

A value that cannot be used is refused in one line before any measuring begins.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from autoregressive.benchmarks.models import PAPER_MODELS
from autoregressive.cli.command import OneLineParser
from autoregressive.devices import resolve_device
from autoregressive.files import check_file, write_whole
from autoregressive.models.config import GPT_SHAPES
from autoregressive.models.defaults import DEMO_MODEL
from autoregressive.output.records import device_name


def script_parser(purpose: str | None) -> OneLineParser:
    """A parser whose --help begins with a script's docstring, as it is."""
    return OneLineParser(
        description=purpose,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A type of flag: comma-separated names."""

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
    """A type of flag: comma-separated numbers of rows, each of whole guided pairs."""
    counts = [int(count) if count.isdecimal() else 0 for count in typed.split(",")]
    if any(count < 2 or count % 2 for count in counts):
        raise argparse.ArgumentTypeError(
            f"{typed}: must be even numbers, 2 or more, with commas between them"
        )
    return counts


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of flag: a whole number from `least` to `most`, or without an upper end."""

    def parse(typed: str) -> int:
        if not typed.isdecimal() or int(typed) < least or (most is not None and int(typed) > most):
            bounds = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{typed}: must be a whole number, {bounds}")
        return int(typed)

    return parse


def positive(typed: str) -> float:
    """A type of flag: a number of seconds."""
    try:
        value = float(typed)
    except ValueError:
        value = 0.0
    if not 0 < value < 10**6:
        raise argparse.ArgumentTypeError(f"{typed}: must be a number above 0")
    return value


def output_file(flag: str, suffix: str) -> Callable[[str], Path]:
    """A type of flag: a file with that suffix. `UserError` if it cannot be written, now and not
    after the measuring.
    """

    def parse(typed: str) -> Path:
        path = Path(typed)
        check_file(flag, path, suffix)
        return path

    return parse


def add_models(parser: argparse.ArgumentParser, *, gpu_only: bool = False) -> None:
    """Adds --models. Its value goes to `models_for`, unless the script needs a GPU anyway."""
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


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """Adds --image-size, which the models' families check."""
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="256, 384 or 512 (default: 384); GPT-demo: 128",
    )


def add_repeats(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds --repeats, of which a benchmark reports the median."""
    parser.add_argument(
        "--repeats",
        type=whole_number(1),
        default=default,
        metavar="N",
        help="timed runs after the warm-up, of which the median counts (default: %(default)s)",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the engine's flags --deterministic and --enforce-eager."""
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="as the engine's flag: Triton kernels for products of more than 64 rows too; no "
        "effect on a CPU",
    )
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="launch kernels one by one, no CUDA graphs; no effect on a CPU",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device, a `torch.device` that is here."""
    parser.add_argument(
        "--device",
        type=resolve_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="D",
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )


def on_cpu(default: object) -> str:
    """How a flag's help tells the default of a CPU behind that of a GPU."""
    return f"; on a CPU {default}"


def use_device(device: torch.device) -> str:
    """Makes the device the current one. Returns its name."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device_name(device)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds --output: its value goes to `give_figures` after the work."""
    parser.add_argument(
        "--output",
        type=output_file("--output", ".json"),
        metavar="FILE.json",
        help="also write the figures here",
    )


def give_figures(figures: Mapping[str, object], path: Path | None) -> None:
    """Prints the figures as one line of JSON, the last of a benchmark's output, and writes them
    where --output says.
    """
    print(json.dumps(figures))
    if path is not None:
        write_whole(path, lambda part: part.write_text(json.dumps(figures, indent=1) + "\n"))
