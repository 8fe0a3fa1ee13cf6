"""The program's name and version."""

from importlib.metadata import PackageNotFoundError, version

PROGRAM = "llamagen-serve"


def program_version() -> str:
    """Of the installed package."""
    try:
        return version(PROGRAM)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "not installed"
