"""Fetches LlamaGen's published files from the hub: resumed where it broke off, checked, and never
half there.

A file has its name only once its SHA-256 is the one that the hub states; until then it is a hidden
`.part` beside it. The environment's variables by which libraries find proxies, certificates and the
hub are checked before a download: a library that reads a malformed one raises an error of any kind,
some libraries at import, and does not name the variable.
"""

import contextlib
import fcntl
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx2  # what huggingface_hub speaks HTTP with, and whose errors it passes on

from autoregressive.errors import SettingName, UserError
from autoregressive.files import file_sha256, has_name, remove_leftovers, sync, sync_folder
from autoregressive.progress import progress_bar
from autoregressive.weights.published import HUB_REPOSITORY, PublishedFile

# huggingface_hub is imported where it is used: at its import it reads variables of the environment,
# and raises ValueError if one of them is malformed. That must not end a command that downloads
# nothing.

# of a download, one after another, none of which brought a byte that was not there before
_MOST_FAILURES = 5
_PAUSE_SECONDS = 1.0  # after each of them


class DownloadError(UserError):
    """A file that could not be fetched. The message is one line and says what to do."""


@dataclass(frozen=True)
class _Remote:
    """What the hub says about a file."""

    name: str
    url: str
    sha256: str
    size_bytes: int

    def is_at(self, path: Path) -> bool:
        """Whether the file of that path has its content."""
        if path.stat().st_size != self.size_bytes:
            return False
        return file_sha256(path) == self.sha256

    def check(self, path: Path) -> None:
        """Raises `DownloadError` if the file of that path has other content."""
        if not self.is_at(path):
            raise DownloadError(
                f"{path}: is not the published file (SHA-256 differs); move it away and fetch again"
            )


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
    name, url = published.file_name, HUB_REPOSITORY
    path = folder / name
    if (problem := unusable_variable(endpoint)) is not None:
        raise DownloadError(f"{name}: cannot be fetched: ", *problem)
    try:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(HUB_REPOSITORY, name, endpoint=endpoint)
        remote = _described(name, url, endpoint)
        if path.exists():
            remote.check(path)
            _remove_parts(path)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch_into(path, remote)
    except DownloadError:
        raise
    except Exception as error:
        # The library passes on what the HTTP client, the TLS library and the system raise.
        raise DownloadError(
            f"{name}: the download failed ({_reason(error)}) from {url}; "
            f"run the same command again, or put the file into {folder} by hand"
        ) from error
    return path


def stated_sha256(published: PublishedFile, *, endpoint: str | None = None) -> str:
    """The SHA-256 that the hub states for a published file, as hexadecimal digits. Nothing is
    downloaded.

    Raises:
        DownloadError: the hub cannot be asked, or states none.
    """
    name = published.file_name
    if (problem := unusable_variable(endpoint)) is not None:
        raise DownloadError(f"{name}: the hub cannot be asked: ", *problem)
    try:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(HUB_REPOSITORY, name, endpoint=endpoint)
        return _described(name, url, endpoint).sha256
    except DownloadError:
        raise
    except Exception as error:  # as in `fetch`
        raise DownloadError(
            f"{name}: the hub cannot be asked for its SHA-256 ({_reason(error)}); try again later"
        ) from error


def _described(name: str, url: str, endpoint: str | None) -> _Remote:
    from huggingface_hub import get_hf_file_metadata

    metadata = get_hf_file_metadata(url, token=False, endpoint=endpoint)
    # For large files the hub's entity tag is the SHA-256 of the content.
    if metadata.size is None or not re.fullmatch("[0-9a-f]{64}", metadata.etag or ""):
        raise DownloadError(
            f"{name}: the hub states no SHA-256 for it; check the address of the hub"
        )
    return _Remote(name, url, str(metadata.etag), metadata.size)


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _remove_parts(path: Path) -> None:
    """Removes unfinished downloads of the file that nobody goes on with."""
    remove_leftovers(path.parent, re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.part"))


def _fetch_into(path: Path, remote: _Remote) -> None:
    part = path.with_name(f".{remote.name}.{remote.sha256[:12]}.part")
    with _locked(part, remote) as stream:
        _remove_parts(path)  # of other versions: this one is locked
        if path.exists():  # another process has fetched it since we looked
            part.unlink()
            remote.check(path)
            return
        _download(remote, part, stream)
        if not remote.is_at(part):
            part.unlink()
            raise DownloadError(
                f"{remote.name}: came damaged (SHA-256 differs) and was thrown away; fetch again"
            )
        sync(part)
        os.replace(part, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def _locked(part: Path, remote: _Remote) -> Iterator[BinaryIO]:
    """The part, open for appending. Its lock is held until the file has its name."""
    for _ in range(5):  # other processes may rename or remove the part meanwhile
        with part.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
            if has_name(stream.fileno(), part):
                yield stream
                return
        # Another process has renamed or removed the part between our open and our lock.
    raise DownloadError(f"{remote.name}: is being fetched by another process; wait for it")


def _download(remote: _Remote, part: Path, stream: BinaryIO) -> None:
    """Appends what is missing. The library's `http_get` gathers 10 MiB before it writes, and loses
    them when the connection breaks off.
    """
    size, there = remote.size_bytes, part.stat().st_size
    if there > size:
        stream.truncate(0)
        there = 0
    needed, free = size - there, shutil.disk_usage(part.parent).free
    if free < needed:
        raise DownloadError(
            f"{part.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} are free; make "
            "room"
        )
    furthest, failures = there, 0  # without ranges, a try may end before the one that it follows
    with progress_bar(remote.name, "B", size, initial=there, unit_scale=True) as bar:
        while there < size:
            try:
                _append_rest(remote, there, stream, bar)
            except (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError):
                failures = failures + 1 if part.stat().st_size <= furthest else 1
                if failures == _MOST_FAILURES:
                    raise
                time.sleep(_PAUSE_SECONDS)
            there = part.stat().st_size
            furthest = max(furthest, there)


def _append_rest(remote: _Remote, first: int, stream: BinaryIO, bar: Any) -> None:
    """Appends the content from its byte `first` on, each piece as it comes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    # A range counts the bytes of what is sent.
    headers = build_hf_headers(token=False) | {"Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={first}-"} if first else {}
    with http_stream_backoff(
        "GET",
        remote.url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
        retry_on_status_codes=(408, 429),
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # the server knows no ranges
            stream.truncate(0)
            bar.update(-first)
            first = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            raise DownloadError(
                f"{remote.url}: the server sends another part than the one asked for; try again "
                "later"
            )
        for chunk in response.iter_bytes():
            wanted = chunk[: remote.size_bytes - first]  # a longer file fails the check
            stream.write(wanted)
            stream.flush()
            first += len(wanted)
            bar.update(len(wanted))
    if first < remote.size_bytes:  # a server that does not say how long its answer is
        raise httpx2.RemoteProtocolError("the answer ended early")


# --- variables of the environment ---

_ADDRESS_ADVICE = "is no web address; give one such as https://huggingface.co"
_MOST_DIGITS = 9  # of seconds; a socket takes no timeout of ten digits


def unusable_variable(endpoint: str | None) -> tuple[str | SettingName, ...] | None:
    """The first variable that no download can work with, and what to do, as the parts of a message;
    None: there is none.

    The message has no value in it: a proxy's address may hold a password.

    Args:
        endpoint: the hub's address, where it was given as a setting.
    """
    if endpoint is not None and not _is_address(endpoint):
        return SettingName("endpoint"), f": {_ADDRESS_ADVICE}"
    for names, is_usable, advice in _CHECKS:
        for name in names:
            value = os.environ.get(name)
            overruled = is_usable is _is_proxy and name.isupper() and name.lower() in os.environ
            if value and not overruled and not is_usable(value):
                return (f"{name}: {advice}",)
    return None


def _is_proxy(value: str) -> bool:
    address = value if "://" in value else f"http://{value}"
    with contextlib.suppress(ValueError, httpx2.InvalidURL):
        httpx2.Proxy(address)  # knows which schemes there are
        return bool(urlsplit(address).hostname) and urlsplit(address).port != 0
    return False


def _is_address(value: str) -> bool:
    with contextlib.suppress(ValueError):
        parts = urlsplit(value)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and _is_header_text(value)
        )
    return False


def _has_certificates(value: str) -> bool:
    with contextlib.suppress(OSError):  # also OpenSSL's own errors
        ssl.create_default_context(cafile=value)
        return True
    return False


def _has_folder(value: str) -> bool:
    # OpenSSL passes over the others
    return any(os.path.isdir(folder) for folder in value.split(os.pathsep))


def _is_seconds(value: str) -> bool:
    return value.isdecimal() and len(value) <= _MOST_DIGITS and int(value) > 0


def _is_header_text(value: str) -> bool:
    return value.isascii() and value.isprintable() and " " not in value


_CHECKS: tuple[tuple[tuple[str, ...], Callable[[str], bool], str], ...] = (
    (
        ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
        _is_proxy,
        "is no proxy that can be used; give http://, https://, socks5:// or socks5h://HOST:PORT, "
        "or unset it",
    ),
    (
        ("SSL_CERT_FILE",),
        _has_certificates,
        "names no file with certificates; correct it, or unset it",
    ),
    (("SSL_CERT_DIR",), _has_folder, "names no folder; correct it, or unset it"),
    (("HF_ENDPOINT",), _is_address, _ADDRESS_ADVICE),
    (
        ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"),
        _is_seconds,
        f"must be a whole number of seconds, of at most {_MOST_DIGITS} digits; correct it, or "
        "unset it",
    ),
    (("HF_HUB_USER_AGENT_ORIGIN",), _is_header_text, "must be ASCII without spaces"),
)
