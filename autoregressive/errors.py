"""Errors that the user can mend, and how messages are put together and told."""

import contextlib
import sys
from collections.abc import Sequence


class UserError(Exception):
    """Something that the user can mend. The message is one line and says what to do."""


def either(alternatives: Sequence[object]) -> str:
    """One or more of them as a message lists them: a, b or c."""
    *most, last = map(str, alternatives)
    return f"{', '.join(most)} or {last}" if most else last


def shortened(message: str, most: int) -> str:
    """The message in one printable line of at most so many characters, for it may quote what a
    hostile file has.
    """
    message = one_line(message[: most + 1])
    return message if len(message) <= most else f"{message[: most - 3]}..."


def one_line(message: str) -> str:
    """The message without line breaks, and without the control characters that a hostile file may
    bear in its names.
    """
    return "".join(
        character if character.isprintable() else "?" for character in " ".join(message.split())
    )


def tell(message: str) -> None:
    """Prints on stderr; nothing where it is closed or broken, for no work should fail over a
    message.
    """
    if sys.stderr is not None:  # print would take None for stdout
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)


def on_terminal() -> bool:
    """Whether somebody can see a progress bar on stderr, which may be closed."""
    return sys.stderr is not None and sys.stderr.isatty()
