"""A download whose part another process finishes, or throws away, just before its lock is taken."""

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_stand_in import CONTENT, FILE, Hub, running_hub

from autoregressive.files import remove_leftovers
from autoregressive.weights.hub import DownloadError, fetch

PART = f".{FILE.file_name}.{hashlib.sha256(CONTENT).hexdigest()[:12]}.part"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_hub() as hub:
        yield hub


def before_the_first_lock(
    module: str, monkeypatch: pytest.MonkeyPatch, other: Callable[[], None]
) -> None:
    """Has another process do something between a module's `open` and its first `flock`."""
    to_do = [other]

    def flock(stream: int, operation: int) -> None:
        if to_do:
            to_do.pop()()
        fcntl.flock(stream, operation)

    monkeypatch.setattr(
        f"{module}.fcntl",
        SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB),
    )


def test_a_file_that_another_process_finishes_is_taken(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the finished file is fetched again, or its part is missed under the old name."""

    def finish() -> None:
        (tmp_path / PART).write_bytes(CONTENT)
        os.replace(tmp_path / PART, tmp_path / FILE.file_name)

    before_the_first_lock("autoregressive.weights.hub", monkeypatch, finish)
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == CONTENT
    assert hub.downloads() == []
    assert os.listdir(tmp_path) == [FILE.file_name]


def test_a_part_that_another_process_throws_away_is_begun_anew(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the download goes on in a file that has no name any more."""
    (tmp_path / PART).write_bytes(b"damaged")
    before_the_first_lock("autoregressive.weights.hub", monkeypatch, (tmp_path / PART).unlink)
    assert fetch(FILE, tmp_path, endpoint=hub.endpoint).read_bytes() == CONTENT
    assert hub.downloads() == [None]
    assert os.listdir(tmp_path) == [FILE.file_name]


def test_another_file_that_comes_meanwhile_stays(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a file that appears during the start is overwritten, or passes without a look at its
    digest.
    """

    def put_by_hand() -> None:
        (tmp_path / FILE.file_name).write_text("mine")

    before_the_first_lock("autoregressive.weights.hub", monkeypatch, put_by_hand)
    with pytest.raises(DownloadError, match="is not the published file"):
        fetch(FILE, tmp_path, endpoint=hub.endpoint)
    assert os.listdir(tmp_path) == [FILE.file_name]
    assert (tmp_path / FILE.file_name).read_text() == "mine"


def test_tidying_up_leaves_a_part_that_another_process_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the lock of a finished part is taken for the right to remove the next part of that
    name.
    """
    (tmp_path / PART).write_bytes(b"finished")

    def finish_and_begin() -> None:
        os.replace(tmp_path / PART, tmp_path / FILE.file_name)
        (tmp_path / PART).write_bytes(b"begun")

    before_the_first_lock("autoregressive.files", monkeypatch, finish_and_begin)
    assert remove_leftovers(tmp_path, re.compile(re.escape(PART))) == 0
    assert (tmp_path / PART).read_bytes() == b"begun"
