"""Files that are whole or not there, and checks before long work that they can be written.

A file is written under another name in the same folder and moved into place, so that an error, a full disk or Ctrl-C
leaves what was there before.
"""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from autoregressive.common.errors import UserError, either


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside `path`, then moves it there; after any error `path` is as it was.

    Args:
        path: replaced if it exists; a link stays one and its target is replaced.
        write: makes the file that it is given the name of, which is new and ends like `path`.

    Raises:
        UserError: the folder or the disk does not take the file. Whatever else `write` raises passes through.
    """
    target = Path(os.path.realpath(path))
    unfinished = _unused_name(target.parent, target.suffix)
    try:
        write(unfinished)
        os.replace(unfinished, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # not there after success; an error here would hide the first one
            unfinished.unlink()


def check_file(flag: str, path: Path, *suffixes: str) -> None:
    """Finds out before any long work whether `write_whole` will be able to write the file; leaves nothing behind.

    Args:
        flag: which the message is to name.
        suffixes: one of them must end the name, in any case.

    Raises:
        UserError: wrong suffix, a folder, no such folder, a link to itself, or no right to write there.
    """
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path}: the file's name must end in {either(suffixes)}")
    check_folder(flag, path.parent)
    target = Path(os.path.realpath(path))
    if os.path.islink(target):
        raise UserError(f"{flag} {path}: this link leads to itself; choose another name")
    check_folder(flag, target.parent)
    try:
        os.stat(target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from error
    if target.is_dir():
        raise UserError(f"{flag} {path}: this is a folder; give a file's name")
    if not os.access(target, os.W_OK):
        raise UserError(f"{flag} {path}: this file is write-protected; choose another name")


def check_folder(flag: str, folder: Path) -> None:
    """Raises `UserError` unless a file can be made in this folder."""
    if not os.path.isdir(folder):
        raise UserError(f"{flag}: there is no folder {folder}; make it first, or choose another")
    probe = _unused_name(folder, "")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag}: cannot write into the folder {folder}; choose another ({error.strerror})") from error


def check_own_folder(flag: str, folder: Path) -> None:
    """Raises `UserError` unless files can be made in this folder, or it does not exist and can be made."""
    try:
        folder.mkdir()
        folder.rmdir()
    except FileExistsError as error:
        if not os.path.isdir(folder):
            raise UserError(f"{flag} {folder}: this is a file; name a folder") from error
        check_folder(flag, folder)
    except FileNotFoundError as error:
        raise UserError(f"{flag}: there is no folder {folder.parent}; make it first, or choose another") from error
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot make this folder; choose another ({error.strerror})") from error


def _unused_name(folder: Path, suffix: str) -> Path:
    return folder / f".{secrets.token_hex(8)}.part{suffix}"
