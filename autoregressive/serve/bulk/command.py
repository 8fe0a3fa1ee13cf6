"""The bulk command: its flags, and the process of each GPU."""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import NoReturn

from autoregressive.cli.command import (
    OneLineParser,
    add_version_flag,
    run_command,
    slow_imports,
)
from autoregressive.errors import SettingError, SettingName, UserError

_BEGAN = time.perf_counter()

with slow_imports(__name__):
    from autoregressive.cli.flags import (
        add_model_flags,
        add_sampling_flags,
        model_options,
        sampling_of,
    )
    from autoregressive.folders import command_line
    from autoregressive.models.sampling_params import SamplingParams
    from autoregressive.serve.bulk.options import (
        BULK_BOUNDS,
        CPU_IMAGES,
        IMAGE_SIZE_EVAL,
        NAIVE_BATCH,
        NUM_FID_SAMPLES,
        RANDOM,
    )
    from autoregressive.serve.engine.engine_config import EngineConfig
    from autoregressive.serve.engine_flags import MOST_ROWS, add_engine_flags
    from autoregressive.weights.options import check_options

COMMAND = "autoregressive/sample/sample_c2i_ddp.py"
PURPOSE = """\
Draws many images for an evaluation such as FID, on one GPU or on many, and goes on where it was
interrupted. On Hopper, or with --deterministic, image k depends on --global-seed and k alone,
however many processes there are. Flags, file names and pixels are those of LlamaGen's bulk command.
Under torchrun each process takes a GPU; alone, the command starts a process for each GPU."""
_EXAMPLES = """\
examples:
  {command} --gpt-model GPT-XL --download --cfg-scale 1.75
      50,000 images of 384 px, resized to 256: the npz file that an FID is computed of
  torchrun --nproc_per_node=8 {path} --gpt-model GPT-3B --cfg-scale 1.65
      the same of the largest model, on eight GPUs
  {command} --gpt-model GPT-demo --num-fid-samples 64
      the model that ships with the repository
"""
# LlamaGen's bulk command has other defaults than its command for single pictures.
DEFAULTS = SamplingParams(cfg_scale=1.5, top_k=0)


def build_bulk_parser() -> OneLineParser:
    """The job's own flags, the model's, and the engine's."""
    command = command_line(COMMAND)
    parser = OneLineParser(
        description=PURPOSE,
        usage=f"{command} [flags]",
        epilog=_EXAMPLES.format(command=command, path=COMMAND),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=110
        ),
    )
    add_version_flag(parser)
    _add_job(parser.add_argument_group("the job"))
    add_sampling_flags(parser, lambda name: f"(default: {getattr(DEFAULTS, name)})")
    add_model_flags(parser, "the command ends; --random-weights draws noise, whose speed is real")
    add_engine_flags(parser, max_num_seqs=f"what the images need, at most {MOST_ROWS}")
    parser.add_argument_group("the plain loop").add_argument(  # in the place of the engine's
        "--compile",
        action="store_true",
        help="with --naive: compile the transformer; the engine has no use for it",
    )
    return parser


def _add_job(group: argparse._ArgumentGroup) -> None:
    for flag, default, told in (
        ("--num-fid-samples", NUM_FID_SAMPLES, "how many images"),
        ("--global-seed", 0, "chooses the images, and with --labels random their classes"),
    ):
        group.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{told} (default: %(default)s)"
        )
    group.add_argument(
        "--labels",
        default=RANDOM,
        metavar="HOW",
        help="the classes: random (independent, as LlamaGen draws them), balanced (all in turn), "
        "or a file with an id for each image, .npy or a line each (default: %(default)s)",
    )
    group.add_argument(
        "--image-size-eval",
        type=int,
        metavar="PIXELS",
        help=f"images are resized to it (default: {IMAGE_SIZE_EVAL}, or --image-size where that is "
        "less)",
    )
    group.add_argument(
        "--sample-dir",
        default="samples",
        metavar="DIR",
        help="the npz file and the job's folder go there; made if need be; several machines share "
        "it (default: %(default)s)",
    )
    group.add_argument(
        "--save-png", action="store_true", help="also save each image in the job's folder"
    )
    group.add_argument(
        "--per-proc-batch-size",
        type=int,
        metavar="N",
        help="images that a process draws at once (default: what memory allows, at most "
        f"{MOST_ROWS} rows; on a CPU {CPU_IMAGES}; with --naive {NAIVE_BATCH})",
    )
    group.add_argument(
        "--naive", action="store_true", help="draw with LlamaGen's plain loop: for comparison, slow"
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Checks what can be checked without torch.

    Raises:
        UserError: a value that cannot be used.
    """
    for name, bounds in BULK_BOUNDS.items():
        value = getattr(arguments, name)
        if value is not None:
            bounds.check(name, value)
    if arguments.per_proc_batch_size is not None and arguments.max_num_seqs is not None:
        raise UserError(
            SettingName("per_proc_batch_size"),
            " and ",
            SettingName("max_num_seqs"),
            " say the same, in images and in rows: leave one out",
        )
    for name in ("sample_dir", "labels"):
        if not getattr(arguments, name):
            raise SettingError(name, "''", "is empty: name one, or leave it out")
    if arguments.naive:
        _check_no_engine(arguments)
    _sampling(arguments)
    check_options(model_options(arguments))


def _check_no_engine(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for the first flag of the engine that was typed."""
    for field in fields(EngineConfig):
        typed = getattr(arguments, field.name, None)
        if typed is not None and typed is not False:
            raise UserError(
                SettingName(field.name),
                ": the engine's, and ",
                SettingName("naive"),
                " draws without it: leave one out",
            )


def _sampling(arguments: argparse.Namespace) -> SamplingParams:
    seed = arguments.global_seed
    try:
        SamplingParams(seed=seed)
    except SettingError as error:
        raise SettingError("global_seed", seed, "must be 0 to 2**63 - 1") from error
    return sampling_of(argparse.Namespace(**vars(arguments), seed=seed), DEFAULTS)


@contextmanager
def _quiet_unless_first() -> Iterator[None]:
    """Lets a mistake end every rank, and rank 0 alone tell it."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        except UserError:
            sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags (the process's own if None), draws what is missing, and prints how fast it
    went. Returns the exit status.

    Raises:
        UserError: anything that the user can mend.
    """
    with _quiet_unless_first():
        arguments = build_bulk_parser().parse_args(argv)
        check_arguments(arguments)
    with slow_imports("__main__" if argv is None else __name__):
        import torch

        from autoregressive.serve.bulk import on_rank, ranks
    gpus = torch.cuda.device_count() if arguments.device is None else 1
    count = gpus // max(1, arguments.tensor_parallel_size or 1)
    if count > 1 and not ranks.under_torchrun():
        typed = sys.argv[1:] if argv is None else argv
        return ranks.run_ranks(count, [os.path.abspath(sys.argv[0]), *typed])
    with ranks.joined_ranks() as joined:
        return on_rank.run(arguments, _sampling(arguments), joined, _BEGAN)


def command() -> NoReturn:
    """Runs the installed command `llamagen-bulk`."""
    run_command(main)
