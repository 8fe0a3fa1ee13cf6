"""Has one system call fail, or the process die at it: for tests of what is left on the disk.

Calls are counted where Python makes them: in `os`, in `fcntl.flock`, and in the files that `open`
gives. Counted are those of one thread, and only on paths below one folder and on descriptors of
such paths, so that nothing else is disturbed.
"""

import builtins
import errno
import fcntl
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_CALLS = (
    "open", "read", "write", "fsync", "fstat", "stat", "lstat", "statvfs", "replace", "rename",
    "unlink", "remove", "mkdir",
    "rmdir", "ftruncate", "posix_fallocate", "scandir", "utime",
)  # fmt: skip
_MOST_CALLS = 1000  # of one piece of work; more means that it never ends


class Killed(BaseException):
    """The process is no more. What was to tidy up makes no call either."""


@dataclass
class SystemCalls:
    """Those of a piece of work.

    Args:
        folder: where calls count.
        at: which one fails, from 0; None: none.
        error: what it fails with; None: the process dies before it.
    """

    folder: Path
    at: int | None = None
    error: int | None = None
    made: list[str] = field(default_factory=list)
    _descriptors: set[int] = field(default_factory=set)
    _held: set[int] = field(default_factory=set)  # by os.open, and not closed yet
    _thread: int = field(default_factory=threading.get_ident)

    def count(self, name: str, place: object) -> None:
        """A call is about to be made."""
        if threading.get_ident() != self._thread or not self._counts(place):
            return
        number = len(self.made)
        self.made.append(name)
        assert number < _MOST_CALLS, "the work does not end"
        if self.at is None or number < self.at:
            return
        if self.error is None:
            raise Killed(f"before call {number}, {name}")
        if number == self.at:
            raise OSError(self.error, os.strerror(self.error))

    def opened(self, descriptor: int, path: object) -> None:
        """A descriptor of this path is the work's."""
        if threading.get_ident() == self._thread and self._counts(path):
            self._descriptors.add(descriptor)

    def _counts(self, place: object) -> bool:
        if isinstance(place, int):
            return place in self._descriptors
        try:
            return Path(os.fsdecode(place)).is_relative_to(self.folder)  # type: ignore[arg-type]
        except TypeError:
            return False


class _CountedFile(io.FileIO):
    calls: SystemCalls

    def write(self, content: Any, /) -> int:
        self.calls.count("write", self.fileno())
        return super().write(content)

    def readinto(self, buffer: Any, /) -> int | None:
        self.calls.count("read", self.fileno())
        return super().readinto(buffer)

    def readall(self) -> bytes | None:  # type: ignore[override]
        self.calls.count("read", self.fileno())
        return super().readall()

    def truncate(self, size: int | None = None, /) -> int:
        self.calls.count("ftruncate", self.fileno())
        return super().truncate(size)


@contextmanager
def counted(calls: SystemCalls) -> Iterator[SystemCalls]:
    """Within it, calls count and may fail."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, _counting(calls, name, getattr(os, name)))
        patch.setattr(os, "close", _closing(calls, os.close))
        patch.setattr(fcntl, "flock", _counting(calls, "flock", fcntl.flock))
        opener = _counting_open(calls, builtins.open)
        patch.setattr(builtins, "open", opener)
        patch.setattr(io, "open", opener)
        try:
            yield calls
        finally:
            patch.undo()
            for (
                descriptor
            ) in calls._held:  # as the end of a process does, which also gives up its locks
                os.close(descriptor)


def _closing(calls: SystemCalls, close: Callable[[int], None]) -> Callable[[int], None]:
    def call(descriptor: int) -> None:
        # in any case: the system frees a descriptor also where it reports an error
        close(descriptor)
        calls._held.discard(descriptor)
        if descriptor in calls._descriptors:
            calls.count("close", descriptor)
            calls._descriptors.discard(descriptor)

    return call


def _counting(calls: SystemCalls, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(place: Any, *arguments: Any, **keywords: Any) -> Any:
        number = place.fileno() if hasattr(place, "fileno") else place
        calls.count(name, number)
        result = function(place, *arguments, **keywords)
        if name == "open":
            calls.opened(result, place)
            calls._held |= calls._descriptors & {result}
        return result

    return call


def _counting_open(calls: SystemCalls, original: Callable[..., Any]) -> Callable[..., Any]:
    def open_file(
        file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **keywords: Any
    ) -> Any:
        if (
            isinstance(file, int)
            or not calls._counts(file)
            or threading.get_ident() != calls._thread
        ):
            return original(file, mode, buffering, *arguments, **keywords)
        calls.count("open", file)
        raw = _CountedFile(file, mode.replace("b", "").replace("t", ""))
        raw.calls = calls
        calls.opened(raw.fileno(), file)
        if buffering == 0:
            return raw
        buffered: Any = (
            io.BufferedRandom(raw)
            if "+" in mode
            else io.BufferedReader(raw)
            if "r" in mode
            else io.BufferedWriter(raw)
        )
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *arguments, **keywords)

    return open_file


def calls_of(folder: Path, work: Callable[[], object]) -> list[str]:
    """What the work calls when nothing fails."""
    with counted(SystemCalls(folder)) as calls:
        work()
    return calls.made


ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE)
