"""How a command ends when something is amiss that is not its own bug: one line on stderr, no
traceback.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from autoregressive.errors import UserError, one_line, tell
from autoregressive.folders import prepare_compilers


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        if message.endswith("expected one argument"):
            message += (
                "; a value that begins with - is written behind an equals sign, as in --seed=-1"
            )
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help shows the options)\n")


@contextlib.contextmanager
def slow_imports(module: str) -> Iterator[None]:
    """Around those imports of a command that take seconds: Ctrl-C ends it there as `run_command`
    does later.

    It ends at once: nothing has begun that is to be tidied up, and an exception would hit some
    library halfway through its own imports, which may pass over it or fail in its place. The
    folders for compiled kernels are chosen before the imports, because some libraries look for them
    while they are imported.

    Args:
        module: __name__ of whoever imports. Another's module has no say: the command that imports
            it has.
    """
    if module == "__main__":
        _prepare_compilers()
    if module != "__main__" or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        os._exit(say_interrupted())

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's main function and exits.

    The status is what it returns, None being 0; 2 after a `UserError` or an error of the system,
    such as a full disk; 130 after Ctrl-C; 141 when whoever read stdout has left. Text that stdout
    cannot encode is written with backslashes.
    """
    _write_with_backslashes()
    status = 0
    try:
        _prepare_compilers()
        status = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `... --list-classes | head`: nobody is left to tell
        status = 141
    except (UserError, OSError) as error:
        tell(f"{_program()}: error: {one_line(str(error))}")
        status = 2
    except KeyboardInterrupt:
        status = say_interrupted()
    _drop_what_is_not_taken()
    sys.exit(status)


def _write_with_backslashes() -> None:
    """No work should fail over a name for which the encoding of stdout or stderr has no letters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _prepare_compilers() -> None:
    note = prepare_compilers()
    if note is not None:
        tell(f"{_program()}: {note}")


def _program() -> str:
    return os.path.basename(sys.argv[0])


def say_interrupted() -> int:
    """Prints it below what the terminal shows of the key; the exit status."""
    tell(f"\n{_program()}: interrupted")
    return 130


def _drop_what_is_not_taken() -> None:
    """Empties stdout and stderr: the interpreter would try once more at its end, complain, and
    change the status.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
