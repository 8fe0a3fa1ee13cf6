"""Draws pictures of classes with the engine: the naive command's flags, files and output lines, and
how fast it went.

All pictures are requests of one engine, which runs as many rows at once as --max-num-seqs and its
memory allow.
"""

from collections.abc import Sequence
from typing import NoReturn

from autoregressive.cli.command import OneLineParser, run_command, slow_imports

with slow_imports(__name__):
    from autoregressive.cli.flags import build_parser, check_arguments, model_options
    from autoregressive.serve.engine_flags import MOST_ROWS, add_engine_flags
    from autoregressive.weights.options import list_classes

COMMAND = "autoregressive/serve/sample_c2i.py"
PURPOSE = """\
Draws pictures of classes, token by token, with LlamaGen's models: the fast engine.
From the same seed it draws other pictures than the plain loop, autoregressive/sample/sample_c2i.py:
here a draw depends on the seed, the picture's number and the step alone, there on one generator
that all pictures share, as LlamaGen has it. Both draw from the same probabilities."""


def build_engine_parser() -> OneLineParser:
    """The naive command's flags and the engine's."""
    parser = build_parser(PURPOSE, COMMAND)
    add_engine_flags(parser, max_num_seqs=f"what the pictures need, at most {MOST_ROWS}")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags (the process's own if None), draws, saves.

    Raises:
        UserError: anything that the user can mend.
    """
    arguments = build_engine_parser().parse_args(argv)
    if arguments.list_classes is not None:
        print(list_classes(model_options(arguments), arguments.list_classes))
        return
    check_arguments(arguments)
    with slow_imports("__main__" if argv is None else __name__):
        from autoregressive.serve import paged
    paged.run(arguments)


def command() -> NoReturn:
    """Runs the installed command `llamagen-sample`."""
    run_command(main)


if __name__ == "__main__":
    command()
