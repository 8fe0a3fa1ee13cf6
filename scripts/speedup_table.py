"""How much faster the engine is: for each model LlamaGen's plain loop, the same compiled, and the
engine. A table, a chart, JSON.

    python scripts/speedup_table.py --models GPT-B,GPT-L,GPT-XL,GPT-XXL,GPT-3B --image-size 384

The job is that of the commands: the tokens of LlamaGen's eight labels, guided, with each model's
defaults; bf16 on a GPU. Weights are random where none are found: speed does not depend on them.
Each method of each model runs in a fresh process. Times are medians after one warm-up: 16 tokens of
the plain loop, which compiles nothing, and the whole job for the others, compiled anew each time.
The floor and its share are those of autoregressive/serve/floor.py, at the highest bandwidth that
the models' processes have measured. The table goes to speedup.md in --output-dir, the chart to
speedup.png. What is finished is kept in speedup.json there, so a run that was broken off, or in
which something failed (exit status 1), goes on where it was. On a CPU the demo model takes the
others' place.

With the method lookahead the table has two columns more: the seconds of the engine with lookahead
auto, and the tokens that a pass kept. What is kept depends on the weights: random ones keep little.
--quantization and --kv-cache-dtype are of the engine; both plain loops stay what they are.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from autoregressive.cli.command import run_command, slow_imports

with slow_imports(__name__):
    from autoregressive.benchmarks.script import (
        HEADLINE_METHODS,
        METHODS,
        add_device,
        add_image_size,
        add_models,
        add_quantization,
        add_repeats,
        names,
        script_parser,
        whole_number,
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_models(parser)
    parser.add_argument(
        "--methods",
        type=names(METHODS),
        default=list(HEADLINE_METHODS),
        metavar="NAMES",
        help=(
            "of naive (the plain loop), compile (the same compiled), paged (the engine) and "
            "lookahead (the engine with lookahead auto, in columns of its own), with commas "
            f"(default: {','.join(HEADLINE_METHODS)})"
        ),
    )
    add_image_size(parser)
    parser.add_argument(
        "--images",
        type=whole_number(1),
        metavar="N",
        help="how many of the eight labels (default: all)",
    )
    add_repeats(parser, 3)
    parser.add_argument(
        "--naive-repeats",
        type=whole_number(1),
        metavar="N",
        help="the same of the plain loop, which takes long (default: as --repeats)",
    )
    add_quantization(parser)
    add_device(parser)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("speedup"),
        metavar="DIR",
        help=("where the table, the chart and the JSON go; made if need be (default: %(default)s)"),
    )
    # in the fresh process
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    arguments = parse_arguments(argv)
    with slow_imports("__main__" if argv is None else __name__):
        from autoregressive.benchmarks import speedup
    speedup.run(arguments, __file__)


if __name__ == "__main__":
    run_command(main)
