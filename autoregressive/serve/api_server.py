"""Serves a model over HTTP: OpenAI's images API, codes, metrics, and a page to draw with.

The flags are read before torch is imported, so that --help and a typo are answered at once.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from autoregressive.cli.command import run_command, saying_what_to_install
from autoregressive.serve.signals import SignalWatch


def main(argv: Sequence[str] | None = None, watch: SignalWatch | None = None) -> int:
    """Reads the flags and serves until a signal; returns the exit status.

    Args:
        watch: hears the signals; None: Python's own handlers do.

    Raises:
        UserError: any error that the user can mend.
    """
    with saying_what_to_install():
        from autoregressive.serve.web.server_flags import read_arguments

        arguments = read_arguments(sys.argv[1:] if argv is None else argv, os.environ)
        from autoregressive.serve import lifecycle
    return lifecycle.run(arguments, watch)


def command() -> NoReturn:
    """Runs the command `llamagen-serve`. It hears signals before the slow imports begin."""
    watch = SignalWatch()
    run_command(lambda: main(watch=watch))


if __name__ == "__main__":
    command()
