"""The page's files, which are read once at the start and served from memory.

starlette's `StaticFiles` opens a file for each request, and passes each part of it through a
thread. Slow readers then hold two descriptors each, and to begin an answer takes several
milliseconds.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_PART_BYTES = 64 * 2**10
_MEDIA_TYPES = {  # Python's and the system's tables differ from one version to the next
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}


class SharedFile(Response):
    """A file as the answer to any number of requests.

    All readers share the content. It is sent in parts, because the part that waits for a reader
    counts as held for that reader.

    Args:
        headers: of the answer, beside `ETag` and those of the content.
    """

    def __init__(self, path: Path, headers: Mapping[str, str]) -> None:
        content = path.read_bytes()
        self.etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        media_type = _MEDIA_TYPES.get(path.suffix, "application/octet-stream")
        super().__init__(content, headers={**headers, "ETag": self.etag}, media_type=media_type)
        self._unchanged = Response(status_code=304, headers={**headers, "ETag": self.etag})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the file, or a 304 if the client has it already."""
        if has_already(Request(scope), self.etag):
            await self._unchanged(scope, receive, send)
            return
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        size = len(self.body)
        for begin in range(0, max(1, size), _PART_BYTES):
            end = begin + _PART_BYTES
            part = {"body": bytes(self.body[begin:end]), "more_body": end < size}
            await send({"type": "http.response.body", **part})


class SharedFiles:
    """The files of a folder, without those of folders in it, as an ASGI application to be mounted.

    Args:
        headers: of all answers.
    """

    def __init__(self, folder: Path, headers: Mapping[str, str]) -> None:
        self._files = {
            path.name: SharedFile(path, headers) for path in folder.iterdir() if path.is_file()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request.

        Raises:
            HTTPException: no such file, or another method than GET.
        """
        if scope["method"] != "GET":
            raise HTTPException(405, headers={"Allow": "GET"})
        file = self._files.get(scope["path"].removeprefix(f"{scope['root_path']}/"))
        if file is None:
            raise HTTPException(404)
        await file(scope, receive, send)


def has_already(request: Request, etag: str) -> bool:
    """Whether the client says that it has this content, so that a 304 is enough."""
    given = request.headers.get("If-None-Match", "").split(",")
    known = [tag.strip().removeprefix("W/") for tag in given]
    return etag in known or "*" in known
