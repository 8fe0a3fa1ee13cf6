"""Pictures kept on disk for clients that want a URL. The service makes their names; none comes from
a request.

A picture's file is whole or not there. It is never changed, and it is read at once through one
descriptor, so a picture that is evicted meanwhile is still delivered.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autoregressive.errors import SettingError
from autoregressive.files import remove_leftovers, sync, sync_folder, unused_name

# the system's table may lack webp
MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}
LOCK_FILE = ".llamagen.lock"
_NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp)")
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.part\.(png|jpeg|webp)")
_RECORD_BYTES = 16 * 2**10  # more than what is written into a picture beside the pixels
# also a link, or a socket, of that name
_NOT_A_PICTURE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENXIO,
)
_log = logging.getLogger("llamagen.store")
_Result = TypeVar("_Result")


def largest_picture_bytes(size: int) -> int:
    """The largest size of a picture's file: a PNG whose pixels cannot be compressed.

    Args:
        size: pixels of a side.
    """
    return 3 * size * size + _RECORD_BYTES


class StoreFailed(Exception):
    """The disk cannot store or read pictures; the log says why."""


@dataclass(frozen=True)
class StoredPicture:
    """A picture as it was when its file was opened."""

    content: bytes
    media_type: str
    modified: float  # Unix time, seconds
    etag: str


class StoreClaim:
    """Makes a folder one service's alone until `close`, or the end of the process, and removes what
    killed writes left.

    Args:
        folder: None: nothing is claimed.

    Raises:
        UserError: another service has it, or it cannot be locked.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lock_file: int | None = None
        if folder is None:
            return
        try:
            os.scandir(folder).close()
            self._lock_file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            what = (
                "another service keeps its images there"
                if isinstance(error, BlockingIOError)
                else f"cannot be read, written or locked ({error.strerror})"
            )
            raise SettingError("store_dir", folder, f"{what}; choose another folder") from error
        if removed := remove_leftovers(folder, _UNFINISHED):
            _log.warning(
                "unfinished pictures were removed",
                extra={"fields": {"folder": str(folder), "files": removed}},
            )

    def close(self) -> None:
        """Gives the folder up."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


class Store:
    """A folder of pictures, of which the newest are kept. Any thread may use it; each call waits
    for the disk.

    Args:
        folder: exists, and is claimed; files of other names in it are left alone.
        most: how many pictures are kept.
        base_url: what comes before /v1/files/NAME.
        index, count: which of so many processes with the same folder this is. Each keeps an equal
            share of the pictures and of the bytes, and reads all. A picture's name tells in whose
            share it is.
        most_bytes: how large the pictures may be together; None: no limit.
        picture_bytes: how large a picture can become.

    Raises:
        UserError: the folder cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        most: int,
        base_url: str,
        index: int = 0,
        count: int = 1,
        *,
        most_bytes: int | None = None,
        picture_bytes: int = 2**20,
    ) -> None:
        self._folder, self._most, self._base_url = folder, most // count, base_url.rstrip("/")
        self._most_bytes = (sys.maxsize if most_bytes is None else most_bytes) // count
        self._index, self._count, self._picture_bytes = index, count, picture_bytes
        self._kept = deque(self._found())  # names and sizes, the oldest first
        self._kept_bytes = sum(size for _, size in self._kept)
        self._coming = self._coming_bytes = 0  # pictures that are being written
        # guards the four; the disk is waited for outside, so that writes share its time
        self._changed = threading.Condition()
        with self._changed:
            self._make_room(0, 0)

    @property
    def most_of_a_request(self) -> int:
        """How many pictures an answer may have, so that none of them is evicted for another one's
        sake.
        """
        return min(self._most, self._most_bytes // self._picture_bytes)

    def check(self, pictures: int) -> None:
        """Finds out whether so many pictures could be saved now; where the disk is full, evicts the
        oldest to make room.

        Raises:
            StoreFailed: they could not.
        """
        size = pictures * self._picture_bytes
        self._evict_while_full(size, lambda: self._allocate(size))

    def save(self, pictures: Sequence[bytes], suffix: str) -> list[str]:
        """Writes the pictures of an answer, all or none, and evicts the oldest beyond the limits;
        their URLs.

        Args:
            pictures: `most_of_a_request` at most.

        Raises:
            StoreFailed: the disk does not take them.
        """
        size = sum(map(len, pictures))
        with self._changed:
            self._changed.wait_for(lambda: self._make_room(len(pictures), size))
            self._coming += len(pictures)
            self._coming_bytes += size
        names: list[str] = []
        try:
            names = self._evict_while_full(size, lambda: self._write(pictures, suffix))
        finally:
            with self._changed:
                self._coming -= len(pictures)
                self._coming_bytes -= size
                for name, picture in zip(names, pictures, strict=False):  # no names after a failure
                    self._kept.append((name, len(picture)))
                    self._kept_bytes += len(picture)
                self._changed.notify_all()
        return [f"{self._base_url}/v1/files/{name}" for name in names]

    def read(self, name: str) -> StoredPicture | None:
        """The picture of that name; None if there is none.

        Raises:
            StoreFailed: it cannot be read.
        """
        if not _NAME.fullmatch(name):
            return None
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    return None
                content = b"".join(iter(lambda: os.read(descriptor, max(1, found.st_size)), b""))
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in _NOT_A_PICTURE:
                return None
            raise self._log_failure("a picture cannot be read", error) from error
        stem, suffix = name.split(".")
        return StoredPicture(content, MEDIA_TYPES[suffix], found.st_mtime, f'"{stem}"')

    def _found(self) -> list[tuple[str, int]]:
        """Names and sizes of the pictures that are this process's own, the oldest first."""
        found = []
        try:
            with os.scandir(self._folder) as entries:
                for entry in filter(self._is_mine, entries):
                    # another program may remove it meanwhile
                    with contextlib.suppress(FileNotFoundError):
                        state = entry.stat(follow_symlinks=False)
                        if stat.S_ISREG(state.st_mode):
                            found.append((state.st_mtime_ns, entry.name, state.st_size))
        except OSError as error:
            raise SettingError(
                "store_dir", self._folder, f"cannot be read ({error.strerror}); choose another"
            ) from error
        return [(name, size) for _, name, size in sorted(found)]

    def _is_mine(self, entry: os.DirEntry[str]) -> bool:
        name = entry.name
        return bool(_NAME.fullmatch(name)) and int(name[:8], 16) % self._count == self._index

    def _new_name(self, suffix: str) -> str:
        share = secrets.randbelow(2**32 // self._count) * self._count + self._index
        return f"{share:08x}{secrets.token_hex(12)}.{suffix}"

    def _make_room(self, pictures: int, size: int) -> bool:
        """Evicts the oldest for so many pictures and bytes to come; returns whether they fit then.

        They may not fit while others are being written, which can only be evicted later. The lock
        is held.
        """
        while (
            len(self._kept) + self._coming + pictures > self._most
            or self._kept_bytes + self._coming_bytes + size > self._most_bytes
        ):
            if not self._kept:
                return self._coming == 0
            self._evict_oldest()
        return True

    def _evict_while_full(self, size: int, work: Callable[[], _Result]) -> _Result:
        """Calls `work`, which needs `size` bytes of the disk. While the disk is full it evicts the
        oldest pictures, but not many times as much.
        """
        freed = 0
        while True:
            try:
                return work()
            except OSError as error:
                with self._changed:
                    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                    if not full or not self._kept or freed > 2 * size:
                        raise self._log_failure("pictures cannot be stored", error) from error
                    freed += self._evict_oldest()

    def _evict_oldest(self) -> int:
        """Removes a picture; its bytes. The lock is held."""
        name, size = self._kept.popleft()
        self._kept_bytes -= size
        try:
            os.unlink(self._folder / name)
        except FileNotFoundError:  # another program has removed it
            pass
        except OSError as error:  # it is found again, and counts, after the next start
            self._log_failure("a picture cannot be removed", error)
        return size

    def _allocate(self, size: int) -> None:
        """Has the disk reserve so many bytes, which writes nothing, and gives them back."""
        place = unused_name(self._folder, ".png")
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
            os.unlink(place)

    def _write(self, pictures: Sequence[bytes], suffix: str) -> list[str]:
        """Writes files, all or none; the disk has them when this returns."""
        names = [self._new_name(suffix) for _ in pictures]
        unfinished = [unused_name(self._folder, f".{suffix}") for _ in pictures]
        try:
            for place, picture in zip(unfinished, pictures, strict=True):
                place.write_bytes(picture)
                sync(place)
            for place, name in zip(unfinished, names, strict=True):
                os.replace(place, self._folder / name)
            sync_folder(self._folder)
        except OSError:
            for place in (*unfinished, *(self._folder / name for name in names)):
                with contextlib.suppress(OSError):
                    os.unlink(place)
            raise
        return names

    def _log_failure(self, what: str, error: OSError) -> StoreFailed:
        """Logs the disk's error; returns the exception for callers, who must not see the reason."""
        fields = {
            "folder": str(self._folder),
            "errno": errno.errorcode.get(error.errno or 0, "unknown"),
            "reason": error.strerror,
        }
        _log.error(what, extra={"fields": fields})
        return StoreFailed(what)
