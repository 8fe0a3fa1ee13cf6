"""Folders outside of the project: for compiled kernels, and for the weights of an installed copy.

The environment need not be a person's: in a container the user may have no name, no home and no
temporary folder. Importing this module changes nothing; a command calls `prepare_compilers` when it
starts.
"""

import contextlib
import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path

_NAME = "llamagen"
_PROJECT = Path(__file__).resolve().parents[1]
# a compiled kernel is a library, which such a file system refuses to load
_NO_EXECUTION = getattr(os, "ST_NOEXEC", 0)


def in_checkout() -> bool:
    """Whether the code runs from the repository, with its scripts and its `pretrained_models`; else
    it was installed.
    """
    return (_PROJECT / "pyproject.toml").is_file()


def pretrained_folder() -> Path:
    """Where weights are looked for and downloaded to: the repository's folder; of an installed
    copy, the user's own.
    """
    if in_checkout():
        return _PROJECT / "pretrained_models"
    return _standard_folder("XDG_DATA_HOME", ".local/share") / "pretrained_models"


def pretrained_folders() -> tuple[Path, ...]:
    """Where weights are looked for: the folder that downloads go to, and the one that ships with
    the program.
    """
    return tuple(dict.fromkeys((pretrained_folder(), _PROJECT / "pretrained_models")))


def prepare_compilers() -> str | None:
    """Tells torch's compiler and Triton, through the environment, where to keep what they compile.

    Left alone, torch's compiler asks for the user's name and makes a folder as soon as any model is
    built, and Triton writes to the home folder; either ends the command where that cannot be done.
    The first of these that can be written is taken: XDG_CACHE_HOME, `.cache` in the home folder, a
    private folder below the temporary one. What the environment names already stays. Triton is
    given a home, not a cache: the compiler's Triton kernels then stay in the compiler's own folder,
    as without this.

    Returns:
        A line for the user if it is not the first of them, else None.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # as the compiler would; OSError from Python 3.13 on
        os.environ["USER"] = f"uid-{os.getuid()}"
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ and (
        "TRITON_CACHE_DIR" in os.environ or "TRITON_HOME" in os.environ
    ):
        return None
    usual = [_standard_folder("XDG_CACHE_HOME", ".cache"), _home() / ".cache" / _NAME]
    folder = next(filter(_can_hold_libraries, usual), None) or _private_folder()
    # Without any folder, the root: the compiler accepts it because it exists, and only writing into
    # it fails.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor") if folder else os.sep)
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ.setdefault("TRITON_HOME", str(folder or os.sep))
    if folder is not None and _temporary_folder() is None:  # compilers need one as well
        with contextlib.suppress(OSError):
            (folder / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
            os.environ["TMPDIR"] = str(folder / "tmp")
    if folder == usual[0]:
        return None
    outcome = f"go to {folder}" if folder else "have no place, and what must be compiled fails"
    return (
        f"{usual[0]} cannot be used: compiled kernels {outcome}; XDG_CACHE_HOME names another "
        "folder"
    )


def command_line(path: str) -> str:
    """How a user starts a command.

    Args:
        path: of its file, from the repository's root.
    """
    started_as = os.path.basename(sys.argv[0])
    if started_as.startswith("llamagen-"):  # an installed command
        return started_as
    if in_checkout():
        return f"python {path}"
    return f"python -m {path.removesuffix('.py').replace('/', '.')}"


def can_be_written(folder: Path) -> bool:
    """Whether files can be made in a folder, or in one that does not exist yet once it is made."""
    nearest = _nearest_existing(folder)
    return os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)


def _can_hold_libraries(folder: Path) -> bool:
    return (
        can_be_written(folder) and not os.statvfs(_nearest_existing(folder)).f_flag & _NO_EXECUTION
    )


def _nearest_existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))


def _standard_folder(variable: str, default: str) -> Path:
    """Our folder in one that the XDG Base Directory Specification lets the user name; a relative
    one is to be ignored, it says.
    """
    named = os.environ.get(variable, "")
    return (Path(named) if os.path.isabs(named) else _home() / default) / _NAME


def _home() -> Path:
    """The user's home; the root folder, as in most containers, for a user without a name."""
    home = os.path.expanduser("~")
    return Path(home) if os.path.isabs(home) else Path(os.sep)


def _temporary_folder() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def _private_folder() -> Path | None:
    """The user's own folder below the temporary one, the same for every command; None if there
    cannot be one.

    Libraries are loaded from it, so it must not be a folder that somebody else made, or can write
    to.
    """
    temporary = _temporary_folder()
    if temporary is None:
        return None
    folder = temporary / f"{_NAME}-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    private = (
        stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    )
    return folder if private and _can_hold_libraries(folder) else None
