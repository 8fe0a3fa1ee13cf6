"""A folder whose names cannot be forced to the disk takes files all the same; a file's own content
must reach it.
"""

import errno
import os
import stat
from pathlib import Path

import pytest

from autoregressive.errors import UserError
from autoregressive.files import write_whole
from autoregressive.serve.web.store import Store, StoreFailed

PASSED_OVER = [errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP]


def fail(monkeypatch: pytest.MonkeyPatch, call: str, number: int, *, folders: bool) -> list[str]:
    """Has `os.open` or `os.fsync` fail for folders, or for files that are open to be read; what has
    failed.
    """
    original, failed = getattr(os, call), []

    def failing(place: str | Path | int, *arguments: int) -> object:
        wanted = call == "fsync" or (arguments[0] & os.O_ACCMODE) == os.O_RDONLY
        if wanted and stat.S_ISDIR(os.stat(place).st_mode) == folders:
            failed.append(call)
            raise OSError(number, os.strerror(number))
        return original(place, *arguments)

    monkeypatch.setattr(os, call, failing)
    return failed


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("number", PASSED_OVER, ids=os.strerror)
def test_a_folder_that_cannot_be_synced_takes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Fails if a file is in place and the command says that it cannot be written, as in a folder of
    mode 0300.
    """
    failed = fail(monkeypatch, call, number, folders=True)
    write_whole(tmp_path / "x.png", lambda file: file.write_bytes(b"new"))
    assert (tmp_path / "x.png").read_bytes() == b"new"
    assert failed == [call]


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE], ids=os.strerror)
def test_an_error_of_the_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Fails if a disk that has lost the folder's names is passed over."""
    fail(monkeypatch, call, number, folders=True)
    with pytest.raises(UserError, match="cannot write"):
        write_whole(tmp_path / "x.png", lambda file: file.write_bytes(b"new"))


@pytest.mark.parametrize("number", [*PASSED_OVER, errno.EIO], ids=os.strerror)
def test_a_file_that_cannot_be_synced_does_not_replace_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Fails if a file takes its name although the disk may not have its content."""
    (tmp_path / "x.png").write_bytes(b"old")
    fail(monkeypatch, "fsync", number, folders=False)
    with pytest.raises(UserError, match="cannot write"):
        write_whole(tmp_path / "x.png", lambda file: file.write_bytes(b"new"))
    assert (tmp_path / "x.png").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.png"]


def test_the_store_treats_folders_and_files_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the store refuses pictures for a folder that cannot be synced, or passes over a file
    that cannot.
    """
    store = Store(tmp_path, 10, "http://localhost")
    with monkeypatch.context() as patch:
        failed = fail(patch, "fsync", errno.EINVAL, folders=True)
        assert len(store.save([b"picture"], "png")) == 1
        assert failed == ["fsync"]
    fail(monkeypatch, "fsync", errno.EINVAL, folders=False)
    with pytest.raises(StoreFailed):
        store.save([b"picture"], "png")
    assert len(os.listdir(tmp_path)) == 1
