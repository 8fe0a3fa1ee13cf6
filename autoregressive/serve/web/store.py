"""Pictures kept on disk for those who want a URL. The names are the service's own; none is ever taken from a request."""

import re
import secrets
import threading
from collections import deque
from pathlib import Path

from autoregressive.common.files import write_whole

_NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp)")


class Store:
    """A folder of pictures, of which the newest are kept. Any thread may use it.

    Args:
        folder: exists; files of other names in it are left alone.
        most: how many pictures are kept.
        base_url: what comes before /v1/files/NAME.
        index, count: which of so many processes with the same folder this is. Each tidies its part of the names, and lends all.
    """

    def __init__(self, folder: Path, most: int, base_url: str, index: int = 0, count: int = 1) -> None:
        self._folder, self._most, self._base_url = folder, most // count, base_url.rstrip("/")
        self._index, self._count = index, count
        there = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and self._is_mine(path.name)]
        self._names = deque(path.name for path in sorted(there, key=lambda path: path.stat().st_mtime))
        self._lock = threading.Lock()

    def save(self, picture: bytes, suffix: str) -> str:
        """Writes a picture and forgets the oldest beyond the limit; the new one's URL.

        Raises:
            UserError: the disk does not take it.
        """
        while not self._is_mine(name := f"{secrets.token_hex(16)}.{suffix}"):
            pass
        write_whole(self._folder / name, lambda path: path.write_bytes(picture))
        with self._lock:
            self._names.append(name)
            while len(self._names) > self._most:
                (self._folder / self._names.popleft()).unlink(missing_ok=True)
        return f"{self._base_url}/v1/files/{name}"

    def _is_mine(self, name: str) -> bool:
        return int(name[:8], 16) % self._count == self._index

    def path(self, name: str) -> Path | None:
        """Where the picture of that name is, if there is one."""
        path = self._folder / name
        return path if _NAME.fullmatch(name) and path.is_file() else None
