"""Downloads against a stand-in of the hub on loopback: nothing damaged or partial ever gets a
file's name.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hub_stand_in import CONTENT, FILE, Hub, running_hub

from autoregressive.weights.hub import DownloadError, fetch
from autoregressive.weights.published import PUBLISHED_FILES, published_file

ROOT = Path(__file__).resolve().parents[2]
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_hub() as hub:
        yield hub


def part_of(folder: Path) -> Path:
    return folder / f".{FILE.file_name}.{SHA256[:12]}.part"


def error_of(hub: Hub, folder: Path) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch(FILE, folder, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_fetched_file_is_the_published_one_and_nothing_else_is_left(
    hub: Hub, tmp_path: Path
) -> None:
    path = fetch(FILE, tmp_path / "new folder", endpoint=hub.endpoint)
    assert path == tmp_path / "new folder" / FILE.file_name
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_a_closed_stderr_does_not_cost_the_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the progress bar, which nobody can see, ends the download."""
    monkeypatch.setattr(sys, "stderr", None)
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == CONTENT


def test_what_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    path = fetch(FILE, tmp_path, endpoint=hub.endpoint)
    written = path.stat().st_mtime_ns
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint) == path
    assert len(hub.downloads()) == 1
    assert path.stat().st_mtime_ns == written


def test_a_file_of_other_content_is_neither_taken_nor_overwritten(hub: Hub, tmp_path: Path) -> None:
    for other in (b"mine", bytes(len(CONTENT))):
        (tmp_path / FILE.file_name).write_bytes(other)
        assert "is not the published file" in error_of(hub, tmp_path)
        assert (tmp_path / FILE.file_name).read_bytes() == other
    assert hub.downloads() == []


def test_a_part_is_gone_on_with_and_not_fetched_twice(hub: Hub, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(CONTENT[:100_000])
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == CONTENT
    assert hub.downloads() == ["bytes=100000-"]


def test_a_part_is_dropped_when_the_server_knows_no_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    part_of(tmp_path).write_bytes(CONTENT[:100_000])
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 5])
def test_a_part_as_long_as_the_file_or_longer_is_no_dead_end(
    hub: Hub, tmp_path: Path, size: int
) -> None:
    part_of(tmp_path).write_bytes((CONTENT + bytes(5))[:size])
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == CONTENT


def test_a_download_that_breaks_off_keeps_its_part_for_the_next_call(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoregressive.weights.hub._PAUSE_SECONDS", 0)
    hub.cut_at = 200_000
    assert "run the same command again" in error_of(hub, tmp_path)
    assert list(tmp_path.iterdir()) == [part_of(tmp_path)]
    assert part_of(tmp_path).read_bytes() == CONTENT[:200_000]
    hub.cut_at = None
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == CONTENT
    assert hub.downloads()[-1] == "bytes=200000-"


def test_content_of_another_digest_is_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.content = CONTENT[:-1] + b"x"
    assert "SHA-256 differs" in error_of(hub, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_a_stated_digest_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.stated_etag = '"' + "a" * 40 + '"'  # a git object's name, as of small files
    assert "states no SHA-256" in error_of(hub, tmp_path)
    assert hub.downloads() == []


def test_two_processes_do_not_write_one_part(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(part_of(tmp_path))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert "by another process" in error_of(hub, tmp_path)
        other.communicate("\n")
    assert hub.downloads() == []


def test_no_hub_and_an_unknown_file_are_one_line(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="404"):
        fetch(PUBLISHED_FILES[1], tmp_path, endpoint=hub.endpoint)
    with pytest.raises(
        DownloadError, match=r"the download failed \(.*\) from http://127\.0\.0\.1:9/"
    ):
        fetch(FILE, tmp_path, endpoint="http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


def test_no_token_is_sent(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Public files need none, and a mirror must not learn the user's."""
    seen: list[str] = []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    respond = BaseHTTPRequestHandler.parse_request

    def listen(handler: BaseHTTPRequestHandler) -> bool:
        parsed = respond(handler)
        seen.append(str(handler.headers["Authorization"]))
        return parsed

    monkeypatch.setattr(BaseHTTPRequestHandler, "parse_request", listen)
    fetch(FILE, tmp_path, endpoint=hub.endpoint)
    assert set(seen) == {"None"}


# --- the table of published files ---


def test_published_names_are_those_of_the_hub() -> None:
    """Fails if a model's weights are looked for under another name than the hub's, or weights
    that do not exist under any.
    """

    def name(model: str, *sizes: int) -> str | None:
        file = published_file(model, *sizes)
        return None if file is None else file.file_name

    for model in ("B", "L", "XL", "XXL", "3B"):
        assert name(f"GPT-{model}", 384, 16) == f"c2i_{model}_384.pt"
        small = f"c2i_{model}_256.pt" if model in ("B", "L") else None
        assert name(f"GPT-{model}", 256, 16) == small
        assert name(f"GPT-{model}", 512, 16) is None
        assert name(f"GPT-{model}", 384, 8) is None
    assert [name(model) for model in ("VQ-16", "VQ-8")] == ["vq_ds16_c2i.pt", "vq_ds8_c2i.pt"]


# --- the command ---


def download(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/download_models.py", *arguments]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )


def test_command_fetches_once_and_says_what_it_did(hub: Hub, tmp_path: Path) -> None:
    for told in ("fetched, and is", "was there, and is"):
        done = download(
            "vq-16", FILE.file_name, "--folder", str(tmp_path), "--endpoint", hub.endpoint
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("\n") == 1  # one file, though named twice
        assert told in done.stdout
    assert len(hub.downloads()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["GPT-XL", "--image-size", "256"], "have no published weights"),
        (["GPT-B", "--image-size", "512"], "have no published weights"),
        (["c2i_XL_256.pt"], "have no published weights"),
        ([], "name a model or a file"),
        (["VQ-16", "--endpoint", "http://127.0.0.1:9"], "the download failed"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: list[str], told: str, tmp_path: Path
) -> None:
    done = download(*arguments, "--folder", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_list_shows_every_file_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "c2i_B_256.pt").touch()
    done = download("--list", "--folder", str(tmp_path))
    rows = {
        line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()[1:] if line.strip()
    }
    assert {file.file_name for file in PUBLISHED_FILES} <= rows.keys()
    assert (rows["c2i_B_256.pt"], rows["c2i_L_256.pt"]) == ("yes", "no")


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("long" * 100, "File name too long"),
        ("file", "Not a directory"),
        (os.fsdecode(b"\xff"), "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("what", ["--list", "VQ-16"])
def test_an_impossible_folder_is_one_line_and_status_2(
    what: str, folder: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = download(what, "--folder", str(tmp_path / folder), "--endpoint", "http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
