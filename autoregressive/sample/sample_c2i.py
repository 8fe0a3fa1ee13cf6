"""Draws pictures of classes with LlamaGen's plain loop: one step a token, a dense cache, and math
attention.

The honest baseline that the fast command is compared with. Flags, defaults and output lines are
LlamaGen's.
"""

from collections.abc import Sequence

from autoregressive.cli.command import run_command, slow_imports

with slow_imports(__name__):
    from autoregressive.cli.flags import build_parser, read_arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags (the process's own if None), draws, saves.

    Raises:
        UserError: anything that the user can mend.
    """
    parser = build_parser(
        "Draws pictures of classes, token by token, with LlamaGen's models: the plain loop.",
        "autoregressive/sample/sample_c2i.py",
    )
    arguments = read_arguments(parser, argv)
    if arguments is not None:
        with slow_imports("__main__" if argv is None else __name__):
            from autoregressive.sample import naive
        naive.run(arguments)


if __name__ == "__main__":
    run_command(main)
