"""Downloads go on from any byte, through any proxy, and whatever fails is one line; the network is
the loopback address.
"""

import hashlib
import os
import select
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_stand_in import CONTENT, FILE, Hub, running_hub
from system_calls import ERRORS, Killed, SystemCalls, calls_of, counted

from autoregressive.weights.hub import DownloadError, fetch, unusable_variable

ROOT = Path(__file__).resolve().parents[2]
LARGE = os.urandom(5 * 2**20 + 7)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("autoregressive.weights.hub._PAUSE_SECONDS", 0)
    with running_hub(LARGE) as hub:
        yield hub


def part_of(folder: Path, content: bytes = LARGE) -> Path:
    return folder / f".{FILE.file_name}.{hashlib.sha256(content).hexdigest()[:12]}.part"


def error_of(hub: Hub, folder: Path) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch(FILE, folder, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Resuming


def test_each_try_goes_on_from_the_last_byte_of_the_one_before(hub: Hub, tmp_path: Path) -> None:
    """Fails if what came before a cut is lost, or fetched again."""
    cuts = [1, 2, 70_000, 2**20, 2**20 + 1, 3 * 2**20 + 5, len(LARGE) - 1]
    for cut in cuts:
        hub.cut_at = cut
        assert "run the same command again" in error_of(hub, tmp_path)
        assert part_of(tmp_path).read_bytes() == LARGE[:cut]
    hub.cut_at = None
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == LARGE
    assert set(hub.downloads()) == {None, *(f"bytes={cut}-" for cut in cuts)}
    assert os.listdir(tmp_path) == [FILE.file_name]


def test_one_try_survives_cuts_while_bytes_arrive(hub: Hub, tmp_path: Path) -> None:
    """Fails if a connection that breaks off often ends a download that gets on."""
    hub.cut_after = len(LARGE) // 12
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == LARGE
    assert len(hub.downloads()) == 13


def test_a_part_of_a_file_that_has_changed_is_not_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    """Fails if two versions are joined, or the part of the old one stays for ever."""
    hub.cut_at = 1000
    error_of(hub, tmp_path)
    changed = LARGE[::-1]
    hub.content, hub.cut_at = changed, None
    hub.describe(changed)
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == changed
    assert os.listdir(tmp_path) == [FILE.file_name]


def test_a_file_that_changes_unannounced_is_noticed(hub: Hub, tmp_path: Path) -> None:
    """Fails if the digest of the whole is not looked at after a resumed download."""
    hub.cut_at = 1000
    error_of(hub, tmp_path)
    hub.content, hub.cut_at = LARGE[::-1], None
    assert "SHA-256 differs" in error_of(hub, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_server_without_ranges_starts_anew(hub: Hub, tmp_path: Path) -> None:
    """Fails if a whole file is appended to a part."""
    hub.ranges = False
    part_of(tmp_path).write_bytes(LARGE[:1000])
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == LARGE


@pytest.mark.parametrize("there", [0, 2000])
def test_a_server_without_ranges_that_always_breaks_off_ends_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int
) -> None:
    """Fails if the same bytes, received again and again, count as progress."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        assert len(pauses) < 50, "the download goes on for ever"

    monkeypatch.setattr("autoregressive.weights.hub.time", SimpleNamespace(sleep=pause))
    hub.ranges, hub.cut_at = False, 1000
    part_of(tmp_path).write_bytes(LARGE[:there])
    assert "run the same command again" in error_of(hub, tmp_path)
    assert len(hub.downloads()) == 5


def test_another_range_than_asked_for_is_refused(hub: Hub, tmp_path: Path) -> None:
    """Fails if bytes are put in the wrong place, or the part is lost to a server's mistake."""
    part_of(tmp_path).write_bytes(LARGE[:1000])
    hub.shift = 1
    assert "another part" in error_of(hub, tmp_path)
    assert part_of(tmp_path).read_bytes() == LARGE[:1000]


def test_a_file_longer_than_stated_does_not_fill_the_disk(hub: Hub, tmp_path: Path) -> None:
    """Fails if more than the stated size is written."""
    hub.content = LARGE + bytes(10 * 2**20)
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == LARGE


# Failing system calls


@pytest.mark.parametrize(
    "error", [*ERRORS, None], ids=lambda error: "killed" if error is None else os.strerror(error)
)
def test_a_download_is_whole_or_absent_whichever_call_fails(
    tmp_path: Path, error: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a failing call, or death at it, leaves a file that is not whole, or something that
    the next try does not remove.
    """
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = CONTENT[:1000]
    with running_hub(content) as hub:

        def get(folder: Path) -> Path:
            part_of(folder, b"what the hub had before").touch()
            return fetch(FILE, folder, endpoint=hub.endpoint)

        (tmp_path / "first").mkdir()
        made = calls_of(tmp_path, lambda: get(tmp_path / "first"))
        assert {"open", "write", "read", "fsync", "replace", "scandir", "unlink", "flock"} <= set(
            made
        )
        for at in range(len(made)):
            folder = tmp_path / str(at)
            folder.mkdir()
            with (
                counted(SystemCalls(folder, at, error)),
                suppress(Killed if error is None else DownloadError),
            ):
                fetch(FILE, folder, endpoint=hub.endpoint)
            assert (
                not (folder / FILE.file_name).exists()
                or (folder / FILE.file_name).read_bytes() == content
            )
            assert get(folder).read_bytes() == content
            assert os.listdir(folder) == [FILE.file_name], (
                f"left by a failure of call {at}, {made[at]}"
            )


# Proxies and other variables


class _Socks(socketserver.BaseRequestHandler):
    """SOCKS 5 without a password, RFC 1928: CONNECT to an IPv4 address or a name."""

    reached: list[int]

    def handle(self) -> None:
        client = self.request
        _, methods = client.recv(2)
        client.recv(methods)
        client.sendall(b"\x05\x00")
        kind = client.recv(4)[3]
        host = (
            socket.inet_ntoa(client.recv(4))
            if kind == 1
            else client.recv(client.recv(1)[0]).decode()
        )
        port = int.from_bytes(client.recv(2), "big")
        with socket.create_connection((host, port)) as server:
            client.sendall(b"\x05\x00\x00\x01" + bytes(6))
            self.reached.append(port)
            while True:
                for source, sink in ((client, server), (server, client)):
                    if select.select([source], [], [], 0.01)[0]:
                        if not (content := source.recv(2**16)):
                            return
                        sink.sendall(content)


@contextmanager
def socks_proxy() -> Iterator[tuple[int, list[int]]]:
    """Its port, and the ports that it has connected clients to."""
    reached: list[int] = []
    handler = type("Handler", (_Socks,), {"reached": reached})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1], reached
        server.shutdown()
        thread.join()


NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def download(folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, with these variables and no other proxy."""
    names = {*NAMES, *(name.upper() for name in NAMES)}
    environment = {
        name: value for name, value in os.environ.items() if name not in names
    } | variables
    command = [
        sys.executable,
        "scripts/download_models.py",
        "VQ-16",
        "--folder",
        str(folder),
        *flags,
    ]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_a_download_goes_through_a_socks_proxy(tmp_path: Path, scheme: str) -> None:
    """Fails if the package that speaks SOCKS is no dependency, or the proxy is gone round."""
    with running_hub() as hub, socks_proxy() as (port, reached):
        done = download(
            tmp_path, "--endpoint", hub.endpoint, ALL_PROXY=f"{scheme}://127.0.0.1:{port}"
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / FILE.file_name).read_bytes() == CONTENT
    assert len(set(reached)) == 2  # the hub, and where it keeps content


BAD_VARIABLES = [
    ("ALL_PROXY", "socks://127.0.0.1:1080"),
    ("all_proxy", "socks4://user:secret@127.0.0.1:1080"),
    ("HTTP_PROXY", "http://["),
    ("https_proxy", "http://127.0.0.1:99999999"),
    ("HTTPS_PROXY", "://"),
    ("http_proxy", "http://\u00fc\u00df\ufffd"),
    ("SSL_CERT_FILE", "/nowhere"),
    ("SSL_CERT_FILE", "/etc/passwd"),
    ("SSL_CERT_DIR", "/nowhere"),
    ("SSL_CERT_DIR", "/nowhere:"),
    ("HF_ENDPOINT", "nonsense"),
    ("HF_ENDPOINT", "http://["),
    ("HF_ENDPOINT", "http://127.0.0.1:99999999"),
    ("HF_ENDPOINT", "http://a b/"),
    ("HF_HUB_ETAG_TIMEOUT", "ten"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "9" * 5000),  # int() takes 4300 digits
    ("HF_HUB_ETAG_TIMEOUT", "9" * 10),  # more nanoseconds than a socket's timeout can be
    ("HF_HUB_USER_AGENT_ORIGIN", "\u00fc"),
]


@pytest.mark.parametrize(("name", "value"), BAD_VARIABLES, ids=lambda text: ascii(text[:50]))
def test_a_variable_that_cannot_be_used_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails if it ends in a traceback, or in a line from which nobody learns what to change; or if
    a password is shown.
    """
    for proxy in NAMES:
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(
        DownloadError, match=rf"^{FILE.file_name}: cannot be fetched: {name}: "
    ) as caught:
        fetch(FILE, tmp_path)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "value",
    [
        "127.0.0.1:3128",
        "http://user:pass@proxy:3128",
        "https://[::1]:3128",
        "socks5h://127.0.0.1:1080",
    ],
)
def test_proxies_that_can_be_used_pass(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a proxy is refused that works; the lower-case name counts, as for the library."""
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080")
    monkeypatch.setenv("all_proxy", value)
    assert unusable_variable(None) is None
    assert unusable_variable("ftp://mirror") is not None


@pytest.mark.parametrize("pattern", ["{}:/nowhere", "/nowhere:{}", "{}:", "{}"])
def test_one_folder_of_certificates_is_enough(
    pattern: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails if a list of folders is refused that OpenSSL takes."""
    monkeypatch.setenv("SSL_CERT_DIR", pattern.format(tmp_path))
    assert unusable_variable(None) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HUB_ETAG_TIMEOUT", "ten"), ("HF_ENDPOINT", "http://["), ("ALL_PROXY", "socks://x")],
)
def test_a_command_that_downloads_nothing_does_not_mind(name: str, value: str) -> None:
    """Fails if an import reads the variables of what is not used."""
    command = [sys.executable, "scripts/download_models.py", "--list"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, name: value},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_malformed_variable_ends_the_command_with_status_2(tmp_path: Path) -> None:
    """Fails if something reads the variables before they are checked."""
    for name, value in (
        ("HF_HUB_ETAG_TIMEOUT", "ten"),
        ("HF_ENDPOINT", "http://["),
        ("ALL_PROXY", "socks://127.0.0.1:1"),
    ):
        done = download(tmp_path, **{name: value})
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert name in done.stderr
