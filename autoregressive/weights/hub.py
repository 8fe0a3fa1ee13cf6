"""Fetches LlamaGen's published files from the hub: resumed where it broke off, checked, and never
half there.

A file has its name only once its SHA-256 is the one that the hub states; until then it is a hidden
`.part` beside it.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx2  # what huggingface_hub speaks HTTP with, and whose errors it passes on

from autoregressive.errors import UserError
from autoregressive.files import has_name, remove_leftovers, sync, sync_folder
from autoregressive.progress import progress_bar
from autoregressive.weights.network import unusable_variable
from autoregressive.weights.published import HUB_REPOSITORY, PublishedFile

# huggingface_hub is imported where it is used: at its import it reads variables of the environment,
# and raises ValueError if one of them is malformed. That must not end a command that downloads
# nothing.

# of a download, one after another, none of which brought a byte that was not there before
_MOST_FAILURES = 5
_PAUSE_SECONDS = 1.0  # after each of them
_MOST_OPENINGS = 5  # of a part that other processes rename or remove
_PASSING = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError)


class DownloadError(UserError):
    """A file that could not be fetched. The message is one line and says what to do."""


@dataclass(frozen=True)
class _Remote:
    """What the hub says about a file."""

    url: str
    sha256: str
    size_bytes: int


def fetch(published: PublishedFile, folder: Path, *, endpoint: str | None = None) -> Path:
    """The published file in the folder, downloaded if it is not there yet; a progress bar goes to a
    terminal's stderr.

    Args:
        folder: made if it does not exist.
        endpoint: address of a mirror of the hub; by default the hub itself, or what HF_ENDPOINT
            says.

    Raises:
        DownloadError: the hub cannot be reached, a variable of the environment is no use, the
            download breaks off (the next call goes on with it), the disk is full, or the file is
            not the one that the hub describes.
    """
    path = folder / published.file_name
    try:
        if (problem := unusable_variable(endpoint)) is not None:
            raise DownloadError(f"{published.file_name}: cannot be fetched: {problem}")
        remote = _ask_hub(published, endpoint)
        part = path.with_name(f".{published.file_name}.{remote.sha256[:12]}.part")
        if not path.exists():
            _remove_parts(path, keep=part)
            _fetch_into(path, part, remote, published)
        else:
            _check(path, remote)
            _remove_parts(path, keep=None)
    except DownloadError:
        raise
    except Exception as error:
        # The library passes on what the HTTP client, the TLS library and the system raise.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DownloadError(
            f"{published.file_name}: the download failed ({reason}) from "
            f"{_address(published, endpoint)}; "
            f"run the same command again, or put the file into {folder} by hand"
        ) from error
    return path


def _address(published: PublishedFile, endpoint: str | None) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(HUB_REPOSITORY, published.file_name, endpoint=endpoint)


def _ask_hub(published: PublishedFile, endpoint: str | None) -> _Remote:
    from huggingface_hub import get_hf_file_metadata

    url = _address(published, endpoint)
    metadata = get_hf_file_metadata(url, token=False, endpoint=endpoint)
    # For large files the hub's entity tag is the SHA-256 of the content.
    if (
        metadata.size is None
        or metadata.etag is None
        or not re.fullmatch("[0-9a-f]{64}", metadata.etag)
    ):
        raise DownloadError(
            f"{published.file_name}: the hub states no SHA-256 for it; check the address of the hub"
        )
    return _Remote(url, metadata.etag, metadata.size)


def _remove_parts(path: Path, keep: Path | None) -> None:
    """Removes unfinished downloads of the file's other versions; without `keep`, of this version
    too.
    """
    kept = f"(?!{re.escape(keep.name)})" if keep is not None else ""
    remove_leftovers(
        path.parent, re.compile(rf"{kept}\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.part")
    )


def _fetch_into(path: Path, part: Path, remote: _Remote, published: PublishedFile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(part, published) as stream:
        if path.exists():  # another process has fetched it since we looked
            part.unlink()
            _check(path, remote)
            return
        _download(remote, published, part, stream)
        if not _is(part, remote):
            part.unlink()
            raise DownloadError(
                f"{published.file_name}: came damaged (SHA-256 differs) and was thrown away; fetch "
                "again"
            )
        sync(part)
        os.replace(part, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def _locked(part: Path, published: PublishedFile) -> Iterator[BinaryIO]:
    """The part, open for appending. Its lock is held until the file has its name."""
    for _ in range(_MOST_OPENINGS):
        with part.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
            if has_name(stream.fileno(), part):
                yield stream
                return
        # Another process has renamed or removed the part between our open and our lock.
    raise DownloadError(f"{published.file_name}: is being fetched by another process; wait for it")


def _download(remote: _Remote, published: PublishedFile, part: Path, stream: BinaryIO) -> None:
    """Appends what is missing, each piece as it comes.

    The library's `http_get` gathers 10 MiB before it writes, and loses them when the connection
    breaks off.
    """
    there = os.fstat(stream.fileno()).st_size
    if there > remote.size_bytes:
        stream.truncate(0)
        there = 0
    free = shutil.disk_usage(part.parent).free
    if free < remote.size_bytes - there:
        needed = (remote.size_bytes - there) / 1e9
        raise DownloadError(
            f"{part.parent}: {needed:.1f} GB are needed and {free / 1e9:.1f} are free; make room"
        )
    furthest, failures = there, 0  # without ranges, a try may end before the one that it follows
    size = remote.size_bytes
    with progress_bar(published.file_name, "B", size, initial=there, unit_scale=True) as bar:
        while there < remote.size_bytes:
            try:
                with _content(remote, there) as (first, chunks):
                    if first != there:  # the server knows no ranges
                        stream.truncate(first)
                        bar.update(first - there)
                        there = first
                    for chunk in chunks:
                        # a longer file fails the check
                        stream.write(chunk[: remote.size_bytes - there])
                        stream.flush()
                        there = os.fstat(stream.fileno()).st_size
                        bar.update(len(chunk))
                        if there > furthest:
                            furthest, failures = there, 0
                if there < remote.size_bytes:  # a server that does not say how long its answer is
                    raise httpx2.RemoteProtocolError("the answer ended early")
            except _PASSING:
                failures += 1
                if failures == _MOST_FAILURES:
                    raise
                time.sleep(_PAUSE_SECONDS)


@contextlib.contextmanager
def _content(remote: _Remote, first: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """The file's bytes as they come, and which of them is the first: the one asked for, or 0."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    # a range counts the bytes of what is sent
    headers = build_hf_headers(token=False) | {"Accept-Encoding": "identity"}
    if first > 0:
        headers["Range"] = f"bytes={first}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff(
        "GET",
        remote.url,
        headers=headers,
        timeout=timeout,
        retry_on_exceptions=(),
        retry_on_status_codes=(408, 429),
    ) as response:
        hf_raise_for_status(response)
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(
            f"bytes {first}-"
        ):
            raise DownloadError(
                f"{remote.url}: the server sends another part than the one asked for; try again "
                "later"
            )
        yield (first if response.status_code == 206 else 0), response.iter_bytes()


def _check(path: Path, remote: _Remote) -> None:
    if not _is(path, remote):
        raise DownloadError(
            f"{path}: is not the published file (SHA-256 differs); move it away and fetch again"
        )


def _is(path: Path, remote: _Remote) -> bool:
    if path.stat().st_size != remote.size_bytes:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == remote.sha256
