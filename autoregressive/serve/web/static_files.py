"""The page's files, which are read once at the start and served from memory.

starlette's `StaticFiles` opens a file for each request, and passes each part of it through a
thread. Slow readers then hold two descriptors each, and to begin an answer takes several
milliseconds.
"""

import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

_PART_BYTES = 64 * 2**10
_MEDIA_TYPES = {  # Python's and the system's tables differ from one version to the next
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}


def add_file(app: FastAPI, path: str, file: Path, headers: Mapping[str, str]) -> None:
    """Serves a file.

    Args:
        headers: of the answer, beside `ETag` and those of the content.
    """
    content = file.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**headers, "ETag": etag}
    whole = {**headers, "Content-Length": str(len(content))}
    media_type = _MEDIA_TYPES.get(file.suffix, "application/octet-stream")

    async def parts() -> AsyncIterator[bytes]:
        # All readers share the content. Only the part that waits for a reader counts as held.
        for start in range(0, len(content), _PART_BYTES):
            yield content[start : start + _PART_BYTES]

    async def send_file(request: Request) -> Response:
        if has_already(request, etag):
            return Response(status_code=304, headers=headers)
        return StreamingResponse(parts(), headers=whole, media_type=media_type)

    app.add_route(path, send_file, methods=["GET"], include_in_schema=False)


def add_folder(app: FastAPI, path: str, folder: Path, headers: Mapping[str, str]) -> None:
    """Serves the files of a folder below a path, without those of folders in it; arguments as of
    `add_file`.
    """
    for file in folder.iterdir():
        if file.is_file():
            add_file(app, f"{path}/{file.name}", file, headers)


def has_already(request: Request, etag: str) -> bool:
    """Whether the client says that it has this content, so that a 304 is enough."""
    given = request.headers.get("If-None-Match", "").split(",")
    known = [tag.strip().removeprefix("W/") for tag in given]
    return etag in known or "*" in known
