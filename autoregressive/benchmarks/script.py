"""What the scripts have in common. At their start it is flags: models, lists with commas, numbers,
the device, the file for the figures. At their end it is figures: a table on stdout, a table in
Markdown, bars, and JSON.

A value that cannot be used is refused in one line before any measuring begins. This module does not
import torch, so a script can read its flags first.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from PIL import Image, ImageDraw, ImageFont

from autoregressive.cli.command import OneLineParser
from autoregressive.errors import SettingError
from autoregressive.files import check_file, write_whole
from autoregressive.models.config import GPT_SHAPES
from autoregressive.models.defaults import DEMO_MODEL
from autoregressive.serve.engine.engine_config import EngineConfig, LookaheadSetting
from autoregressive.serve.engine_flags import add_kv_cache_dtype_flag, add_quantization_flag

PAPER_MODELS = ("GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B")
# Of speedup_table.py. "lookahead" is the engine too; the table has it where it is asked for.
HEADLINE_METHODS = ("naive", "compile", "paged")
METHODS = (*HEADLINE_METHODS, "lookahead")
_DEVICE = "cuda if there is a GPU, else cpu"
Value = TypeVar("Value")
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM, _BAR, _GAP = 900, 110, 80, 60, 60, 18, 16
_GRID, _GREY = (225, 225, 225), (90, 90, 90)
Colour = tuple[int, int, int]


def script_parser(purpose: str | None) -> OneLineParser:
    """A parser whose --help begins with a script's docstring, as it is."""
    return OneLineParser(
        description=purpose,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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


def listed(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """A type of flag: comma-separated values of another type."""
    return lambda typed: [kind(word) for word in typed.split(",")]


def row_count(typed: str) -> int:
    """A type of flag: a number of rows, which are guided pairs."""
    if not typed.isdecimal() or int(typed) < 2 or int(typed) % 2:
        raise argparse.ArgumentTypeError(f"{typed}: must be an even number, 2 or more")
    return int(typed)


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of flag: a whole number from `least` to `most`, or without an upper end."""

    def parse(typed: str) -> int:
        if not typed.isdecimal() or int(typed) < least or (most is not None and int(typed) > most):
            bounds = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{typed}: must be a whole number, {bounds}")
        return int(typed)

    return parse


def lookahead(typed: str) -> LookaheadSetting:
    """A type of flag: the engine's setting of that name."""
    setting = int(typed) if typed.isdecimal() else typed
    try:
        return EngineConfig(lookahead=cast(LookaheadSetting, setting)).lookahead
    except SettingError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(typed: str) -> float:
    """A type of flag: a number of seconds, or of requests a second."""
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


def add_values(
    parser: argparse.ArgumentParser, *flags: tuple[str, Callable[[str], Any], Any, str, str]
) -> None:
    """Adds flags that take a value: name, type, default, metavar and help, which then tells the
    default if there is one.
    """
    for name, kind, default, metavar, told in flags:
        shown = told if default is None else f"{told} (default: %(default)s)"
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=shown)


def add_model(parser: argparse.ArgumentParser, default: str | None, told: str = "") -> None:
    """Adds --gpt-model.

    Args:
        told: what --help says of the default; its own name if empty.
    """
    parser.add_argument(
        "--gpt-model",
        choices=list(GPT_SHAPES),
        default=default,
        metavar="NAME",
        help=f"{', '.join(GPT_SHAPES)} (default: {told or default})",
    )


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


def models_for(typed: list[str] | None, on_gpu: bool) -> list[str]:
    """What --models means: large models take hours on a CPU, where the small one shows that the
    script works.
    """
    return typed or (list(PAPER_MODELS) if on_gpu else [DEMO_MODEL])


def on_cpu(default: object) -> str:
    """How a flag's help tells the default of a CPU behind that of a GPU."""
    return f"; on a CPU {default}"


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
    """Adds flags of the engine: --deterministic, --enforce-eager, and those of quantisation. Their
    values go to `engine_flags.engine_config`.
    """
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
    add_quantization(parser)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Adds --quantization and --kv-cache-dtype, as the commands have them."""
    add_quantization_flag(parser)
    add_kv_cache_dtype_flag(parser)
    parser.set_defaults(kv_cache_dtype=EngineConfig.kv_cache_dtype)


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds --device. Its value goes to `harness.use_device`; None is a GPU if there is one."""
    parser.add_argument(
        "--device",
        default=default,
        metavar="D",
        help=f"cpu, cuda or cuda:N (default: {default or _DEVICE})",
    )


def add_output(parser: argparse.ArgumentParser, what: str = "also write the figures here") -> None:
    """Adds --output: its value goes to `give_figures` after the work."""
    parser.add_argument(
        "--output", type=output_file("--output", ".json"), metavar="FILE.json", help=what
    )


class Table:
    """Lines below a heading, printed as they come.

    Args:
        columns: title -> how a value is written: side, width and format, as ">9.3f".
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._formats = tuple(columns.values())
        self.row(*columns)

    def row(self, *values: object) -> None:
        """Prints one line. None is a dash; words take the column's width alone."""
        print(" ".join(map(_cell, values, self._formats)), flush=True)


def _cell(value: object, form: str) -> str:
    value = "-" if value is None else value
    return format(value, form.partition(".")[0] if isinstance(value, str) else form)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bar_chart(
    title: str, groups: Mapping[str, Mapping[str, float]], kinds: Mapping[str, tuple[str, Colour]]
) -> Image.Image:
    """Horizontal bars of seconds on a logarithmic scale, values beside them.

    Args:
        groups: label of a group -> kind of a bar -> seconds.
        kinds: kind of a bar -> its words in the legend, and its colour.
    """
    height = _TOP + sum(len(bars) * _BAR + _GAP for bars in groups.values()) + _BOTTOM
    image = Image.new("RGB", (_WIDTH, height), "white")
    draw, font, small = ImageDraw.Draw(image), *map(ImageFont.load_default, (15, 12))
    draw.text((_LEFT, 12), f"{title} (seconds, logarithmic)", fill="black", font=font)
    values = [seconds for bars in groups.values() for seconds in bars.values()] or [1.0]
    low, high = math.floor(math.log10(min(values) / 1.5)), math.ceil(math.log10(max(values) * 1.2))

    def x(seconds: float) -> float:
        return _LEFT + (math.log10(seconds) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    for power in range(low, high + 1):
        at = x(10.0**power)
        draw.line([(at, _TOP - 8), (at, height - 52)], fill=_GRID)
        draw.text((at, _TOP - 10), f"{10.0**power:g}", fill=_GREY, font=small, anchor="ms")
    y = _TOP
    for label, bars in groups.items():
        draw.text(
            (_LEFT - 10, y + max(len(bars), 1) * _BAR / 2),
            label,
            fill="black",
            font=font,
            anchor="rm",
        )
        for kind, seconds in bars.items():
            end = x(seconds)
            draw.rectangle([(_LEFT, y + 2), (end, y + _BAR - 2)], fill=kinds[kind][1])
            draw.text(
                (end + 5, y + _BAR / 2), f"{seconds:.3g}", fill="black", font=small, anchor="lm"
            )
            y += _BAR
        y += _GAP
    for number, (words, colour) in enumerate(kinds.values()):
        left, top = _LEFT + 140 * number, height - 28
        draw.rectangle([(left, top), (left + 12, top + 12)], fill=colour)
        draw.text((left + 18, top + 6), words, fill="black", font=small, anchor="lm")
    return image


def give_figures(figures: Mapping[str, object], path: Path | None = None) -> None:
    """Prints the figures as one line of JSON, the last of a benchmark's output, and writes them
    where --output says.
    """
    print(json.dumps(figures))
    if path is not None:
        write_whole(path, lambda part: part.write_text(json.dumps(figures, indent=1) + "\n"))
