"""How a command ends when the mistake is the user's: one line on stderr, exit status 2, no traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something that the user can mend. The message is one line and says what to do."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help shows the options)\n")


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command's main function and exits: 0, 2 after a `UserError`, 130 after Ctrl-C, 141 when a reader left."""
    program = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # as in `... --list-classes | head`: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted, nothing was written", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
