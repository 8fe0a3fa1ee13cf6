"""Files that are whole or not there, and checks before long work that they can be written.

A file is written under another name in the same folder, forced to the disk, and moved into place.
An error, a full disk, Ctrl-C or a power cut leaves what was there before. If the process is killed,
its unfinished file stays until the same file is saved again.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from autoregressive.errors import SettingName, UserError, either


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside `path`, then moves it there; after an error `path` is as it was, or
    new and whole.

    Args:
        path: replaced if it exists; a link stays one and its target is replaced.
        write: writes into the file of the name that it is given, which is there, is empty, and ends
            like `path`.

    Raises:
        UserError: the folder or the disk does not take the file. Whatever else `write` raises
            passes through.
    """
    target = Path(os.path.realpath(path))
    try:
        with _unfinished_file(target) as unfinished:
            write(unfinished)
            sync(unfinished)
            os.replace(unfinished, target)
            sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _opened(path: Path | str, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):  # an error here would hide the first one
            os.close(descriptor)


def sync(file: Path) -> None:
    """Returns when the disk has what was written to a file."""
    with _opened(file, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Returns when the disk has the names of a folder's files, where the system can be asked for
    that.

    It cannot in a folder that may be written but not read, and on some network file systems. The
    files are in place all the same.
    """
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


def unused_name(folder: Path, suffix: str, owner: str = "") -> Path:
    """A hidden name for an unfinished file.

    Args:
        owner: what the file is to become; `_unfinished_file` finds what was left of it.
    """
    return folder / f".{_checksum(owner)}{secrets.token_hex(4)}.part{suffix}"


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> int:
    """Removes unfinished files of killed processes; how many. A file that is still being written is
    locked, and stays.
    """
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for leftover in [entry.path for entry in entries if names.fullmatch(entry.name)]:
            # It is locked, has gone, or cannot be removed: the next save tries again.
            with (
                contextlib.suppress(OSError),
                _opened(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor,
            ):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if has_name(descriptor, leftover):
                    os.unlink(leftover)
                    removed += 1
    return removed


def has_name(descriptor: int, path: Path | str) -> bool:
    """Whether an open file is still the one of this name: asked under its lock, after which nobody
    else renames or removes it.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _unfinished_file(target: Path) -> Iterator[Path]:
    """An empty file beside `target`, locked while it is written and removed at the end if it still
    has its name.
    """
    owner, suffix = _checksum(target.name), re.escape(target.suffix)
    remove_leftovers(target.parent, re.compile(rf"\.{owner}[0-9a-f]{{8}}\.part{suffix}"))
    unfinished = unused_name(target.parent, target.suffix, target.name)
    with _opened(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield unfinished
        finally:
            # It is not there after success; an error here would hide the first one.
            with contextlib.suppress(OSError):
                unfinished.unlink()


def _checksum(text: str) -> str:
    return f"{zlib.crc32(os.fsencode(text)):08x}"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits: about a second a gigabyte."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_file(setting: str | SettingName, path: Path, *suffixes: str) -> None:
    """Finds out before any long work whether `write_whole` will be able to write the file; leaves
    nothing behind.

    Args:
        setting: what names the file, for the message: a setting, or an argument of a command.
        suffixes: one of them must end the name, in any case.

    Raises:
        UserError: wrong suffix, a folder, no such folder, a link to itself, or no right to write
            there.
    """
    target = Path(os.path.realpath(path))
    if path.suffix.lower() not in suffixes:
        raise UserError(setting, f" {path}: the file's name must end in {either(suffixes)}")
    check_folder(setting, path.parent)
    if os.path.islink(target):
        raise UserError(setting, f" {path}: this link leads to itself; choose another name")
    check_folder(setting, target.parent)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(setting, f" {path}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise UserError(setting, f" {path}: this is a folder; give a file's name")
    if not os.access(target, os.W_OK):
        raise UserError(setting, f" {path}: this file is write-protected; choose another name")


def check_folder(setting: str | SettingName, folder: Path) -> None:
    """Raises `UserError` unless a file can be made in this folder."""
    if not os.path.isdir(folder):
        raise UserError(setting, f": there is no folder {folder}; make it first, or choose another")
    try:
        with _unfinished_file(folder / "check"):
            pass
    except OSError as error:
        raise UserError(
            setting,
            f": cannot write into the folder {folder}; choose another ({error.strerror})",
        ) from error


def check_own_folder(setting: str | SettingName, folder: Path) -> None:
    """Raises `UserError` unless files can be made in this folder, or it does not exist and can be
    made.
    """
    if os.path.isdir(folder):
        check_folder(setting, folder)
        return
    try:
        folder.mkdir()
        folder.rmdir()
    except FileExistsError as error:
        raise UserError(setting, f" {folder}: this is a file; name a folder") from error
    except OSError as error:
        told = f" {folder}: cannot make this folder; choose another ({error.strerror})"
        if not os.path.isdir(folder.parent):
            told = f": there is no folder {folder.parent}; make it first, or choose another"
        raise UserError(setting, told) from error
