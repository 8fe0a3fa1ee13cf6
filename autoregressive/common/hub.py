"""Fetches LlamaGen's published files from the hub: resumed where it broke off, checked, and never half there.

A file has its name only once its SHA-256 is the one that the hub states; until then it is a hidden `.part` beside it.
"""

import fcntl
import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx2  # what huggingface_hub speaks HTTP with, and whose errors it passes on
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from autoregressive.common.errors import UserError
from autoregressive.common.published import HUB_REPOSITORY, PublishedFile


class DownloadError(UserError):
    """A file that could not be fetched. The message is one line and says what to do."""


@dataclass(frozen=True)
class _Remote:
    """What the hub says about a file."""

    url: str
    sha256: str
    size_bytes: int


def fetch(published: PublishedFile, folder: Path, *, endpoint: str | None = None) -> Path:
    """The published file in the folder, downloaded if it is not there yet; a progress bar goes to a terminal's stderr.

    Args:
        folder: made if it does not exist.
        endpoint: address of a mirror of the hub; by default the hub itself, or what HF_ENDPOINT says.

    Raises:
        DownloadError: the hub cannot be reached, the download breaks off (the next call goes on with it), the disk is full,
            or the file, there already or just fetched, is not the one that the hub describes.
    """
    path = folder / published.file_name
    try:
        remote = _ask_hub(published, endpoint)
        if path.exists():
            if not _is(path, remote):
                raise DownloadError(f"{path}: is not the published file (SHA-256 differs); move it away and fetch again")
            return path
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{published.file_name}.{remote.sha256[:12]}.part"
        with part.open("ab") as stream:
            _download(remote, published, part, stream)
        if not _is(part, remote):
            part.unlink()
            raise DownloadError(f"{published.file_name}: came damaged (SHA-256 differs) and was thrown away; fetch again")
        os.replace(part, path)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DownloadError(
            f"{published.file_name}: the download failed ({reason}); run the same command again, "
            f"or put the file into {folder} by hand"
        ) from error
    return path


def _ask_hub(published: PublishedFile, endpoint: str | None) -> _Remote:
    url = hf_hub_url(HUB_REPOSITORY, published.file_name, endpoint=endpoint)
    metadata = get_hf_file_metadata(url, token=False, endpoint=endpoint)
    # For large files the hub's entity tag is the SHA-256 of the content.
    if metadata.size is None or metadata.etag is None or not re.fullmatch("[0-9a-f]{64}", metadata.etag):
        raise DownloadError(f"{published.file_name}: the hub states no SHA-256 for it; check the address of the hub")
    return _Remote(url, metadata.etag, metadata.size)


def _download(remote: _Remote, published: PublishedFile, part: Path, stream: BinaryIO) -> None:
    """Appends what is missing. hf_hub_download() would start anew, so the library's lower function does it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DownloadError(f"{published.file_name}: is being fetched by another process; wait for it") from error
    there = part.stat().st_size
    if there > remote.size_bytes:
        stream.truncate(0)
        there = 0
    free = shutil.disk_usage(part.parent).free
    if free < remote.size_bytes - there:
        needed = (remote.size_bytes - there) / 1e9
        raise DownloadError(f"{part.parent}: {needed:.1f} GB are needed and {free / 1e9:.1f} are free; make room")
    http_get(
        remote.url,
        stream,
        resume_size=there,
        headers=build_hf_headers(token=False),
        expected_size=remote.size_bytes,
        displayed_filename=published.file_name,
    )


def _is(path: Path, remote: _Remote) -> bool:
    if path.stat().st_size != remote.size_bytes:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == remote.sha256
