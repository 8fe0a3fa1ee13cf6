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
from typing import Any, NoReturn

from autoregressive.errors import UserError, did_you_mean, missing_extra, one_line, tell
from autoregressive.folders import prepare_compilers
from autoregressive.version import PROGRAM, program_version


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage in front. It takes no
    abbreviations: a typed part of a flag would mean another flag once there are two.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses, and suggests the closest flag for one that is unknown."""
        parsed, unknown = self.parse_known_args(args, namespace)
        for typed in unknown:
            if typed.startswith("-"):
                flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
                self.error(
                    f"there is no flag {typed}{did_you_mean(typed.partition('=')[0], flags)}"
                )
        if unknown:
            self.error(f"unexpected argument: {' '.join(unknown)}")
        return parsed

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Lets a `UserError` of a type through, which argparse would reword as a ValueError."""
        convert = self._registry_get("type", action.type, action.type)
        try:
            return convert(arg_string)
        except UserError:
            raise
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Suggests the closest choice for a value that is none."""
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            told = did_you_mean(str(value), choices) or f": choose from {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"there is no {value}{told}")

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        if message.endswith("expected one argument"):
            message += (
                "; a value that begins with - is written behind an equals sign, as in --seed=-1"
            )
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help shows the options)\n")


def add_version_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --version, which prints the program's name and version and stops."""
    parser.add_argument(
        "--version",
        action="version",
        version=f"{PROGRAM} {program_version()}",
        help="show the version and stop",
    )


@contextlib.contextmanager
def slow_imports(module: str) -> Iterator[None]:
    """Around those imports of a command that take seconds: Ctrl-C ends it there as `run_command`
    does later.

    It ends at once: nothing has begun that is to be tidied up, and an exception would hit some
    library halfway through its own imports, which may pass over it or fail in its place. The
    folders for compiled kernels are chosen before the imports, because some libraries look for them
    while they are imported.

    Args:
        module: __name__ of the module that imports. Nothing changes unless that is the command
            itself.
    """
    if module != "__main__":
        yield
        return
    _prepare_compilers()
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(say_interrupted()))
    try:
        with saying_what_to_install():
            yield
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def saying_what_to_install() -> Iterator[None]:
    """Ends the process with one line where an optional package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        tell_error(missing_extra(error))
        sys.exit(2)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command's main function and exits.

    The status is what it returns, None being 0; 1 when a process that it needs has died; 2 after a
    `UserError` or an error of the system, such as a full disk; 130 after Ctrl-C; 141 when the
    reader of stdout has left. Text that stdout cannot encode is written with backslashes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    status = 0
    try:
        _prepare_compilers()
        status = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # as in `... --list-classes | head`: nobody is left to tell
        status = 141
    except (UserError, OSError) as error:
        tell_error(error)
        status = 1 if isinstance(error, ChildProcessError) else 2
    except KeyboardInterrupt:
        status = say_interrupted()
    # What is not taken is dropped: the interpreter would try once more at its end, complain, and
    # change the status.
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def flag_of(setting: str) -> str | None:
    """How a command line spells a setting; None for those that no command has."""
    # Only the engine's requests have these two.
    return None if setting in ("n", "first_image") else f"--{setting.replace('_', '-')}"


def tell_error(error: UserError | OSError) -> None:
    """Tells of an error in one line, with settings spelled as flags."""
    message = error.spelled(flag_of) if isinstance(error, UserError) else str(error)
    tell(f"{_program()}: error: {one_line(message)}")


def _prepare_compilers() -> None:
    note = prepare_compilers()
    if note is not None:
        tell(f"{_program()}: {note}")


def _program() -> str:
    return os.path.basename(sys.argv[0])


def say_interrupted() -> int:
    """Says that the command was interrupted; returns the exit status."""
    tell(f"\n{_program()}: interrupted")
    return 130
