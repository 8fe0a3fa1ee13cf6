"""Errors that the user can mend, and how messages are put together and told."""

import contextlib
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A setting's name -> how the user writes it; None: the user has no such setting.
Spelling = Callable[[str], str | None]


@dataclass(frozen=True)
class SettingName:
    """A setting's name within a message. It is left out where the user has no such setting."""

    name: str  # as in Python: max_num_seqs
    told: str = "{}"  # the name and the words around it, which are left out with it


@dataclass(frozen=True)
class Change:
    """What to do about a setting: "lower max_num_seqs", "lower num_pages to 40 or less"."""

    verb: str
    setting: str
    extent: str = ""


class UserError(ValueError):
    """Something that the user can mend. The message is one line and says what to do.

    The text of the exception names settings as Python does. A command spells them as flags.

    Args:
        parts: of the message.
        remedies: what the user can do, one of which is enough; the end of the message.
    """

    def __init__(self, *parts: str | SettingName, remedies: Sequence[str | Change] = ()) -> None:
        self.parts, self.remedies = parts, tuple(remedies)

    def __str__(self) -> str:
        # Only commands have the setting `list_classes`.
        return self.spelled(lambda name: None if name == "list_classes" else name)

    def spelled(self, spell: Spelling) -> str:
        """The message with settings' names as the user writes them.

        Remedies that the user has no way to apply are left out.
        """
        told = "".join(filter(None, (_spelled(part, spell) for part in self.parts)))
        ways = list(filter(None, (_spelled(remedy, spell) for remedy in self.remedies)))
        return f"{told}: {either(ways)}" if ways else told


class SettingError(UserError):
    """A setting whose value cannot be used, or is in the way.

    Args:
        setting: its name in Python.
        value: what it was set to.
        problem: what is wrong with it, or what it must be.
        remedies: as of `UserError`.
    """

    def __init__(
        self,
        setting: str,
        value: object,
        problem: str | Sequence[str | SettingName],
        remedies: Sequence[str | Change] = (),
    ) -> None:
        self.setting, self.value = setting, value
        parts = [problem] if isinstance(problem, str) else problem
        super().__init__(SettingName(setting), f" {value}: ", *parts, remedies=remedies)


def _spelled(part: str | SettingName | Change, spell: Spelling) -> str | None:
    if isinstance(part, str):
        return part
    if isinstance(part, SettingName):
        name = spell(part.name)
        return name and part.told.format(name)
    name = spell(part.setting)
    return name and " ".join(filter(None, (part.verb, name, part.extent)))


# Packages that not all users need, and the extra that brings them.
_EXTRAS = {
    "tqdm": "progress",
    "httpx2": "download",
    "huggingface_hub": "download",
    "socksio": "download",
    "fastapi": "serve",
    "fastapi_offline": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "h11": "serve",
    "pydantic": "serve",
    "prometheus_client": "serve",
    "yaml": "serve",
    "opentelemetry.sdk": "otlp",  # its API may be there without it
    "opentelemetry": "otlp",
    "ray": "ray",
    "torch_fidelity": "eval",
}


def missing_extra(error: ModuleNotFoundError) -> UserError:
    """What to install where an optional package is missing. Raises the error if it is another."""
    for package, extra in _EXTRAS.items():
        if f"{error.name}.".startswith(f"{package}."):
            return UserError(f"{package} is not installed: pip install 'llamagen-serve[{extra}]'")
    raise error


def either(alternatives: Sequence[object]) -> str:
    """One or more of them as a message lists them: a, b or c."""
    *most, last = map(str, alternatives)
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(typed: str, known: Sequence[str]) -> str:
    """The end of a message about a name that is unknown: the closest known one, if any is close."""
    by_lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(typed.lower(), by_lower_case, n=1)
    return f": did you mean {by_lower_case[close[0]]}?" if close else ""


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
