"""Checks LlamaGen's published weights with this program, and measures it with them. Ends in JSON, a
report to send in.

    llamagen-download GPT-B VQ-16
    python scripts/verify_published.py --ask-hub
    python scripts/verify_published.py --models GPT-XL --fid 50000 \\
        --reference VIRTUAL_imagenet256_labeled.npz

For each model whose weights are found it reports four things. The SHA-256 of both checkpoints, with
--ask-hub beside the hub's. How many tokens of temperature 0 are equal to the plain loop's, in
float32 and in the default precision. How many tokens a pass keeps with lookahead, and whether the
codes are those without it. The seconds of LlamaGen's eight labels, with lookahead off and auto.

With --fid it also generates images by autoregressive/sample/sample_c2i_ddp.py, with the guidance of
the published figure, and evaluates them by scripts/evaluate.py. On an H200 50,000 images take from
minutes to an hour. The images stay in --sample-dir, and a run that broke off goes on there.

The report has no names of folders, hosts or users. Exit status 1 if something that must be equal is
not, or a check could not be carried out; the others are carried out all the same.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from autoregressive.cli.command import run_command, slow_imports

with slow_imports(__name__):
    from autoregressive.benchmarks.script import (
        add_device,
        add_output,
        add_repeats,
        names,
        script_parser,
        whole_number,
    )
    from autoregressive.models.config import GPT_SHAPES


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--models",
        type=names(list(GPT_SHAPES)),
        metavar="NAMES",
        help=f"of {', '.join(GPT_SHAPES)}, with commas (default: all whose weights are found)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="256 or 384; GPT-demo: 128 (default: all whose weights are found)",
    )
    parser.add_argument(
        "--pretrained-dir",
        type=Path,
        metavar="DIR",
        help="where the weights are (default: as the commands')",
    )
    parser.add_argument(
        "--ask-hub",
        action="store_true",
        help="compare the SHA-256 of the files with those that the hub states",
    )
    parser.add_argument(
        "--images",
        type=whole_number(1),
        metavar="N",
        help="how many of the eight labels (default: all)",
    )
    add_repeats(parser, 3)
    parser.add_argument(
        "--fid",
        type=whole_number(2),
        metavar="N",
        help="also generate so many images of each model and evaluate them; the published figures "
        "are of 50000",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE.npz", help="what --fid compares with"
    )
    parser.add_argument(
        "--sample-dir",
        type=Path,
        default=Path("samples"),
        metavar="DIR",
        help="where the images of --fid go (default: %(default)s)",
    )
    add_device(parser)
    add_output(parser, "the report (default: verify_published.json)")
    parser.set_defaults(output="verify_published.json")  # checked as if it were typed
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    arguments = parse_arguments(argv)
    with slow_imports("__main__" if argv is None else __name__):
        from autoregressive.benchmarks import published_report
        from autoregressive.evaluation.reference import open_reference
    if arguments.fid is not None and arguments.reference is not None:
        open_reference(arguments.reference)  # hours of drawing would come before it is needed
    published_report.run(arguments)


if __name__ == "__main__":
    run_command(main)
