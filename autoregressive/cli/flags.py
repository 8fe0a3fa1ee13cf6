"""The flags that the plain and the fast command share: LlamaGen's, and ours for choosing classes
and saving pictures.

argparse is told no defaults, so that what was typed can be told from what was not. Nothing here
imports torch: --help and a typo are answered at once.
"""

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields
from numbers import Integral
from pathlib import Path

from autoregressive.cli.command import OneLineParser, add_version_flag
from autoregressive.errors import SettingName, UserError
from autoregressive.folders import command_line, in_checkout, pretrained_folder
from autoregressive.models.axes import MOST_PICTURES, GridAxes
from autoregressive.models.config import GPT_SHAPES
from autoregressive.models.defaults import DEMO_DEFAULTS, DEMO_MODEL, LLAMAGEN_DEFAULTS
from autoregressive.models.sampling_params import BOUNDS, SamplingParams
from autoregressive.weights.options import (
    ModelOptions,
    check_options,
    chosen_classes,
    resolve_labels,
)
from autoregressive.weights.published import DEMO_GPT, DEMO_VQ
from tokenizer.tokenizer_image.vq_config import VQ_CONFIGS

_EXAMPLES = """\
examples:
  {command} --gpt-model GPT-demo --captions
      eight pictures from the model that ships with the repository
  {command} --gpt-model GPT-XL --gpt-ckpt c2i_XL_384.pt --vq-ckpt vq_ds16_c2i.pt
      LlamaGen's eight classes, with weights that you have
  {command} --gpt-model GPT-B --download --class-labels "golden retriever" 417 --seed 7
      weights from the hub, classes by name or id
  {command} --gpt-model GPT-demo --class-labels owl --grid guidance=1,2,4,8 seed=1..4
      one class, with each pair of these settings
  {command} --gpt-model GPT-B --list-classes fox
      which classes there are
"""
PRECISION_HELP = (
    "of the transformer: none (float32), fp16 or bf16 (default: bf16 on a GPU; fp16 below compute "
    "capability 8.0, where "
    "bf16 is refused; none on a CPU)"
)


def build_parser(purpose: str, command: str) -> OneLineParser:
    """The parser; a command may add flags of its own before it parses.

    Args:
        purpose: what the command does, the first paragraph of --help.
        command: its path from the repository root, for the examples.
    """
    parser = OneLineParser(
        description=purpose,
        usage=f"{command_line(command)} [flags]",
        epilog=_EXAMPLES.format(command=command_line(command)),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=110
        ),
    )
    add_version_flag(parser)
    _add_drawing(parser.add_argument_group("what to draw"))
    add_sampling_flags(parser, _default)
    _add_output(parser.add_argument_group("output"))
    add_model_flags(parser)
    return parser


def model_options(arguments: argparse.Namespace) -> ModelOptions:
    """What was typed about the model.

    Args:
        arguments: what a parser with `add_model_flags` parsed.
    """
    return ModelOptions(
        **{field.name: getattr(arguments, field.name) for field in fields(ModelOptions)}
    )


def sampling_of(arguments: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The sampling parameters that were typed, and the defaults for the others.

    Raises:
        SettingError: a value is out of range.
    """
    return defaults.updated(**{name: getattr(arguments, name) for name in BOUNDS if name != "n"})


def grid_axes(arguments: argparse.Namespace) -> GridAxes | None:
    """The axes of --grid, which are checked; None where there is no grid.

    Args:
        arguments: what a parser of `build_parser` parsed.

    Raises:
        UserError: an axis cannot be used, or a flag says what one of them says or leaves open what
            is drawn.
    """
    if arguments.grid is None:
        return None
    axes = GridAxes.parse(arguments.grid, chosen_classes(model_options(arguments)))
    axes.check_said_once(vars(arguments))
    if len(arguments.class_labels or ()) > 1:
        raise UserError(
            SettingName("class_labels"),
            ": a grid draws one class; give several as an axis, such as ",
            SettingName("grid"),
            f" {shlex.quote('class=' + ','.join(arguments.class_labels[:2]))}",
        )
    return axes


def read_arguments(parser: OneLineParser, argv: Sequence[str] | None) -> argparse.Namespace | None:
    """Parses the flags and checks what can be checked without torch, so that a slip is told at
    once.

    Args:
        parser: of `build_parser`.

    Returns:
        None where it has listed classes and the command is done.

    Raises:
        UserError: a value that cannot be used.
    """
    arguments = parser.parse_args(argv)
    options = model_options(arguments)
    if arguments.list_classes is not None:
        print(chosen_classes(options).listing(arguments.list_classes))
        return None
    sampling_of(arguments, SamplingParams())
    check_options(options)
    resolve_labels(options, arguments.class_labels)
    grid_axes(arguments)
    return arguments


def add_model_flags(
    parser: OneLineParser,
    if_none: str = "they are drawn at random: the picture is noise, the speed is real",
) -> None:
    """Adds the flags that say which model runs, with which weights, and where.

    Args:
        if_none: for --help, what happens where there are no weights.
    """
    _add_weights(
        parser.add_argument_group(
            "weights",
            "Looked for in this order: the flag; the folder of pretrained models, under the "
            "published name; with "
            f"--download, the\nhub. If there are none, {if_none}.",
        )
    )
    _add_shapes(
        parser.add_argument_group(
            "model", "Flags that are left out take the values that suit the chosen --gpt-model."
        )
    )
    _add_running(parser.add_argument_group("running"))


def add_sampling_flags(parser: OneLineParser, default: Callable[[str], str]) -> None:
    """Adds the flags that say how tokens are drawn, all but the seed.

    Args:
        default: how --help states the default of a parameter.
    """
    group = parser.add_argument_group("sampling")
    for setting, told in (
        ("cfg_scale", "strength of classifier-free guidance; 1 and below: none"),
        ("cfg_interval", "guide the first N + 2 tokens only; -1: all"),
        ("temperature", "0 takes the likeliest token"),
        ("top_k", "draw from the N likeliest tokens; 0, or more than there are: from all"),
        ("top_p", "draw from the likeliest tokens that make up this probability; 1: from all"),
    ):
        whole = BOUNDS[setting].kind is Integral
        group.add_argument(
            f"--{setting.replace('_', '-')}",
            type=int if whole else float,
            metavar="N" if whole else "X",
            help=f"{told} {default(setting)}",
        )


def _default(field: str) -> str:
    """How --help states a default that the two families may not share."""
    llamagen, demo = (
        getattr(defaults.sampling if field in BOUNDS else defaults, field)
        for defaults in (LLAMAGEN_DEFAULTS, DEMO_DEFAULTS)
    )
    return (
        f"(default: {llamagen})" if llamagen == demo else f"(default: {llamagen}; GPT-demo: {demo})"
    )


def _add_drawing(group: argparse._ArgumentGroup) -> None:
    eight = " ".join(map(str, LLAMAGEN_DEFAULTS.class_labels))
    group.add_argument(
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help=f"ids or names, any number (default: {eight}; GPT-demo: 0 to 7)",
    )
    group.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        metavar="AXIS",
        help="compare settings: one class with each value of an axis, or with each pair of values "
        "of two, from left to right and from top to bottom. An axis is NAME=VALUES: class, "
        "guidance, seed, or another sampling flag; values with commas, or whole numbers a..b "
        f"(at most {MOST_PICTURES} pictures; default: no grid)",
    )
    group.add_argument(
        "--list-classes",
        nargs="?",
        const="",
        metavar="WORD",
        help="show ids and names of the model's classes, or of those with WORD in the name, and "
        "stop",
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="same seed, same machine: same picture (default: 0)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the pictures as one grid, in the format that the suffix names: .png, .jpg, .jpeg or "
        ".webp (default: "
        "sample_c2i.png, or sample_c2i_untrained.png without trained weights)",
    )
    group.add_argument(
        "--captions",
        action="store_true",
        help="write the class name under each picture of the grid",
    )
    group.add_argument(
        "--save-individual",
        type=Path,
        metavar="DIR",
        help="also save each picture in its own file, in the format of --output",
    )
    group.add_argument(
        "--save-codes",
        type=Path,
        metavar="FILE.npy",
        help="also save the tokens: int32, one row a picture",
    )


def _add_weights(group: argparse._ArgumentGroup) -> None:
    in_repository = "pretrained_models of the repository"
    folder = in_repository if in_checkout() else str(pretrained_folder()).replace("%", "%%")
    group.add_argument(
        "--gpt-ckpt",
        type=Path,
        metavar="PATH",
        help="the transformer's: a file or FSDP directory, or the bare name of one in the folder "
        "of pretrained models",
    )
    group.add_argument("--vq-ckpt", type=Path, metavar="PATH", help="the tokenizer's, likewise")
    for flag, told in (
        ("--download", "fetch published weights that are not there yet"),
        ("--random-weights", "use no trained weights even if they are there"),
        ("--ema", "use the averaged weights that training kept in --gpt-ckpt"),
        (
            "--from-fsdp",
            "assert that the transformer's checkpoint is FSDP's (found out anyway; a .safetensors "
            "file cannot tell)",
        ),
    ):
        group.add_argument(flag, action="store_true", help=told)
    group.add_argument(
        "--pretrained-dir",
        type=Path,
        metavar="DIR",
        help=f"where weights are looked for and downloaded to, {DEMO_GPT} and {DEMO_VQ} among them "
        f"(default: {folder})",
    )


def _add_shapes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gpt-model",
        choices=list(GPT_SHAPES),
        metavar="NAME",
        help=f"{', '.join(GPT_SHAPES)} (default: what --gpt-ckpt is named after; GPT-B with "
        "another --gpt-ckpt, "
        "with --download, or if its weights are there; else GPT-demo)",
    )
    group.add_argument(
        "--gpt-type",
        choices=["c2i", "t2i"],
        metavar="TYPE",
        help="c2i, class to image; not t2i (default: c2i)",
    )
    group.add_argument(
        "--vq-model",
        choices=list(VQ_CONFIGS),
        metavar="NAME",
        help=f"{', '.join(VQ_CONFIGS)} {_default('vq_model')}",
    )
    for flag, metavar, told in (
        (
            "--image-size",
            "PIXELS",
            f"256, 384 or 512; {DEMO_MODEL}: {DEMO_DEFAULTS.image_size} (default: what --gpt-ckpt "
            "is named after, else 384, or 256 if only those weights are there)",
        ),
        ("--downsample-size", "PIXELS", "a token's side (default: the tokenizer's)"),
        ("--codebook-size", "N", "number of tokens (default: the tokenizer's)"),
        ("--codebook-embed-dim", "N", "size of a code (default: the tokenizer's)"),
        ("--num-classes", "N", _default("num_classes").strip("()")),
        ("--cls-token-num", "N", "tokens of a class: 1, nothing else (default: 1)"),
    ):
        group.add_argument(flag, type=int, metavar=metavar, help=told)


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--precision",
        choices=["none", "fp16", "bf16"],
        metavar="P",
        help=f"{PRECISION_HELP}; the tokenizer runs in float32",
    )
    group.add_argument(
        "--device",
        metavar="D",
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer; the first run waits for it (default: no)",
    )
