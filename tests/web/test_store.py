"""The picture store: limits that hold, a full disk, files that are no pictures, and each system
call failing once.
"""

import errno
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from system_calls import ERRORS, Killed, SystemCalls, calls_of, counted

from autoregressive.errors import UserError
from autoregressive.serve.web.openai_routes import encode_picture
from autoregressive.serve.web.store import (
    LOCK_FILE,
    Store,
    StoreClaim,
    StoredPicture,
    StoreFailed,
    largest_picture_bytes,
)

ROOT = Path(__file__).resolve().parents[2]
PICTURE = b"picture" * 100


def names(urls: list[str]) -> list[str]:
    return [url.rsplit("/", 1)[1] for url in urls]


def content(store: Store, name: str) -> bytes | None:
    found = store.read(name)
    return None if found is None else found.content


def new_store(folder: Path, most: int = 100, **keywords: Any) -> Store:
    return Store(folder, most, "http://localhost", **({"picture_bytes": len(PICTURE)} | keywords))


def log_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [
        record.__dict__["fields"] for record in caplog.records if record.name == "llamagen.store"
    ]


@pytest.fixture
def caplog_of_ours(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("llamagen")
    # another test may have set up the service's own logs
    propagates, logger.propagate = (
        logger.propagate,
        True,
    )
    yield caplog
    logger.propagate = propagates


# Limits


def test_an_answers_pictures_are_all_there_and_the_newest_are_kept(tmp_path: Path) -> None:
    """Fails if a picture is evicted for the sake of one of the same answer, or the wrong
    ones go.
    """
    store = new_store(tmp_path, 4)
    first = names(store.save([b"1", b"2"], "png"))
    second = names(store.save([b"3", b"4", b"5"], "webp"))
    assert [content(store, name) for name in first + second] == [None, b"2", b"3", b"4", b"5"]
    fourth = names(store.save([b"6", b"7", b"8", b"9"], "png"))
    assert sorted(os.listdir(tmp_path)) == sorted(fourth)
    assert store.most_of_a_request == 4


def test_limits_hold_at_the_start_and_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a quota is passed while pictures are written, or only looked at after them."""
    new_store(tmp_path, 50).save([PICTURE] * 50, "png")
    most_bytes = 7 * len(PICTURE)
    store = new_store(tmp_path, 10, most_bytes=most_bytes)
    assert (len(os.listdir(tmp_path)), store.most_of_a_request) == (7, 7)
    write_bytes = Path.write_bytes

    def write(path: Path, data: bytes) -> int:
        written = write_bytes(path, data)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= most_bytes
        return written

    monkeypatch.setattr(Path, "write_bytes", write)
    for count in (1, 3, 7, 2):
        assert all(
            content(store, name) == PICTURE for name in names(store.save([PICTURE] * count, "png"))
        )


def test_limits_hold_while_many_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if writes that overlap pass the quota together, wait for each other for ever, or lose
    pictures.
    """
    most_bytes = 6 * len(PICTURE)
    store = new_store(tmp_path, 5, most_bytes=most_bytes)
    write_bytes, too_much, at_once, most_at_once = Path.write_bytes, [], [0], [0]

    def write(path: Path, data: bytes) -> int:
        at_once[0] += 1
        most_at_once[0] = max(most_at_once[0], at_once[0])
        written = write_bytes(path, data)
        time.sleep(0.002)  # as a disk
        total = sum(sizes(tmp_path))
        if total > most_bytes:
            too_much.append(total)
        at_once[0] -= 1
        return written

    monkeypatch.setattr(Path, "write_bytes", write)

    def save(count: int) -> None:
        for _ in range(10):
            store.save([PICTURE] * count, "png")

    threads = [
        threading.Thread(target=save, args=(count,), daemon=True) for count in (1, 1, 2, 3, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not too_much
    assert most_at_once[0] > 1
    assert len(sizes(tmp_path)) <= 5
    last = names(store.save([PICTURE] * 5, "png"))  # evicts all that the store knows of
    assert sorted(os.listdir(tmp_path)) == sorted(last)


def sizes(folder: Path) -> list[int]:
    """Of the files that are there."""
    found = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # evicted meanwhile
            found.append(file.stat().st_size)
    return found


def test_the_oldest_go_first_after_a_restart_too(tmp_path: Path) -> None:
    """Fails if a restart forgets which pictures are older."""
    kept = names(new_store(tmp_path).save([PICTURE] * 4, "png"))
    for age, name in enumerate(kept):
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    store = new_store(tmp_path, 3)
    assert [content(store, name) is None for name in kept] == [False, False, False, True]
    store.save([PICTURE], "png")
    assert [content(store, name) is None for name in kept] == [False, False, True, True]


def test_shares_hold_the_limits_together(tmp_path: Path) -> None:
    """Fails if several processes keep more than was asked for, in pictures or in bytes."""
    stores = [
        new_store(tmp_path, 9, index=index, count=3, most_bytes=6 * len(PICTURE))
        for index in range(3)
    ]
    for store in stores * 4:
        assert store.most_of_a_request == 2
        store.save([PICTURE] * 2, "png")
    assert len(os.listdir(tmp_path)) == 6
    assert all(content(store, name) == PICTURE for store in stores for name in os.listdir(tmp_path))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_no_picture_is_larger_than_is_reckoned_with(output_format: Any) -> None:
    """Fails if a picture of noise, of the best quality, does not fit where a look has found room
    for it.
    """
    record: dict[str, object] = {
        "trained": True,
        "label": 1,
        "class_name": "x" * 200,
        "weights": "y" * 200,
        "model": "z" * 200,
    }
    for size in (32, 256):
        pixels = (
            np.random.default_rng(0).integers(256, size=(size, size, 3), dtype=np.uint8).tobytes()
        )
        assert len(
            encode_picture(pixels, size, output_format, 100, record)
        ) <= largest_picture_bytes(size)


# A full disk


class Disk:
    """A disk of so many bytes, as the store's calls see it."""

    def __init__(self, folder: Path, capacity: int, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.capacity, self.others = folder, capacity, 0
        write_bytes = Path.write_bytes

        def write(path: Path, data: bytes) -> int:
            self.take(len(data))
            return write_bytes(path, data)

        patch.setattr(Path, "write_bytes", write)
        patch.setattr(os, "posix_fallocate", lambda descriptor, offset, size: self.take(size))

    def take(self, size: int) -> None:
        used = sum(file.stat().st_size for file in self.folder.iterdir()) + self.others
        if used + size > self.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_the_oldest_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if nothing can be stored any more where only the store's own pictures are in
    the way.
    """
    store = new_store(tmp_path)
    kept = names(store.save([PICTURE] * 5, "png"))
    disk = Disk(tmp_path, 5 * len(PICTURE), monkeypatch)
    store.check(2)
    assert [content(store, name) is None for name in kept] == [True, True, False, False, False]
    new = names(store.save([PICTURE] * 2, "png"))
    assert [content(store, name) is None for name in kept + new] == [
        True,
        True,
        False,
        False,
        False,
        False,
        False,
    ]
    store.check(1)
    disk.others = len(PICTURE)  # another program takes the room between look and save
    assert content(store, names(store.save([PICTURE], "png"))[0]) == PICTURE
    assert len(os.listdir(tmp_path)) == 4


def test_a_disk_that_others_fill_is_told_at_once_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog_of_ours: pytest.LogCaptureFixture
) -> None:
    """Fails if the look does not notice, the log does not say why, all pictures go in vain, or the
    failure lasts.
    """
    store = new_store(tmp_path)
    store.save([PICTURE] * 50, "png")
    disk = Disk(tmp_path, 60 * len(PICTURE), monkeypatch)
    disk.others = 100 * len(PICTURE)
    for attempt in (lambda: store.check(1), lambda: store.save([PICTURE], "png")):
        with pytest.raises(StoreFailed):
            attempt()
    assert log_of(caplog_of_ours)[0] == {
        "folder": str(tmp_path),
        "errno": "ENOSPC",
        "reason": "No space left on device",
    }
    assert len(os.listdir(tmp_path)) >= 40
    disk.others = 0
    store.check(1)
    assert content(store, names(store.save([PICTURE], "png"))[0]) == PICTURE


def test_a_look_needs_the_room_of_all_images_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if ten images are drawn where there is room for nine."""
    store = new_store(tmp_path, picture_bytes=4096)
    store.check(10)
    assert os.listdir(tmp_path) == []
    Disk(tmp_path, 10 * 4096 - 1, monkeypatch)
    with pytest.raises(StoreFailed):
        store.check(10)
    store.check(9)
    assert os.listdir(tmp_path) == []


# What is no picture


def test_what_only_has_a_pictures_name_is_none(tmp_path: Path) -> None:
    """Fails if a folder, a link, a pipe or a socket of that name is read, waited for, removed, or
    ends the service.
    """
    (tmp_path / "outside").write_bytes(b"secret")
    folder = tmp_path / "store"
    folder.mkdir()
    odd = [f"{number:032x}.png" for number in range(4)]
    (folder / odd[0]).mkdir()
    (folder / odd[1]).symlink_to(tmp_path / "outside")
    os.mkfifo(folder / odd[2])
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # a socket's path must be short
        listener.bind(odd[3])
        os.chdir(here)
    store = new_store(folder, 1)
    for _ in range(3):
        store.save([PICTURE], "png")
    assert [store.read(name) for name in odd] == [None] * 4
    assert set(odd) < set(os.listdir(folder))
    for name in ("../outside", "..", "", LOCK_FILE, f"{odd[0]}/x", odd[0].upper(), f"{odd[0]}\n"):
        assert store.read(name) is None


def test_a_picture_that_is_evicted_while_it_is_read_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the file is looked up more than once; and if a descriptor stays open."""
    store = new_store(tmp_path)
    name = names(store.save([PICTURE], "webp"))[0]
    fstat, before = os.fstat, len(os.listdir("/proc/self/fd"))

    def fstat_and_evict(descriptor: int) -> os.stat_result:
        (tmp_path / name).unlink(missing_ok=True)
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", fstat_and_evict)
    found = store.read(name)
    assert isinstance(found, StoredPicture)
    assert (found.content, found.media_type, found.etag) == (
        PICTURE,
        "image/webp",
        f'"{name[:32]}"',
    )
    assert store.read(name) is None
    assert len(os.listdir("/proc/self/fd")) == before


# Leftovers, and one service a folder


def test_unfinished_pictures_are_removed_at_the_start_and_counted(
    tmp_path: Path, caplog_of_ours: pytest.LogCaptureFixture
) -> None:
    """Fails if what a killed service left stays, or somebody's file goes."""
    store = new_store(tmp_path)
    for at in (2, 3):
        with counted(SystemCalls(tmp_path, at, None)), suppress(Killed):
            store.save([PICTURE], "png")
    left = [name for name in os.listdir(tmp_path) if ".part." in name]
    assert len(left) == 2
    others = {
        "mine.part.png",
        ".mine.part.png",
        ".0123456789abcdef.part",
        ".0123456789abcdef.part.txt",
        ".cache",
    }
    for name in others:
        (tmp_path / name).touch()
    StoreClaim(tmp_path).close()
    assert set(os.listdir(tmp_path)) == others | {LOCK_FILE}
    assert log_of(caplog_of_ours) == [{"folder": str(tmp_path), "files": 2}]


def test_a_folder_is_one_services_for_as_long_as_it_lives(tmp_path: Path) -> None:
    """Fails if two services may evict each other's pictures, or a killed one keeps the folder."""
    code = "import sys, pathlib; from autoregressive.serve.web.store import StoreClaim\n"
    code += "claim = StoreClaim(pathlib.Path(sys.argv[1])); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="another service keeps its images there"):
            StoreClaim(tmp_path)
        other.kill()
    claim = StoreClaim(tmp_path)
    with pytest.raises(UserError, match="another service"):
        StoreClaim(tmp_path)
    claim.close()
    StoreClaim(tmp_path).close()


# Failing system calls


@pytest.mark.parametrize(
    "error", [*ERRORS, None], ids=lambda error: "killed" if error is None else os.strerror(error)
)
@pytest.mark.parametrize("work", ["save", "check", "start"])
def test_pictures_are_whole_or_absent_whichever_call_fails(
    tmp_path: Path, work: str, error: int | None
) -> None:
    """Fails if a failing call, or death at it, leaves half a picture or half an answer, loses
    another, or ends the service.
    """
    new = [b"a" * 1000, b"b" * 70_000, b"c" * 5]

    def begin(folder: Path) -> tuple[Store, str]:
        folder.mkdir()
        store = new_store(folder, 4)
        return store, names(store.save([b"oldest", b"old"], "png"))[1]

    def works(folder: Path, store: Store) -> Callable[[], Any]:
        return {
            "save": lambda: store.save(new, "png"),
            "check": lambda: store.check(3),
            "start": lambda: start(folder),
        }[work]

    def start(folder: Path) -> Store:
        claim = StoreClaim(folder)
        try:
            return new_store(folder, 4)
        finally:
            claim.close()

    store, _ = begin(tmp_path / "first")
    made = calls_of(tmp_path / "first", works(tmp_path / "first", store))
    seen = {
        "save": {"open", "write", "fsync", "replace", "unlink"},
        "check": {"open", "posix_fallocate", "unlink"},
        "start": {"open", "flock", "scandir"},
    }
    assert seen[work] <= set(made)
    for at in range(len(made)):
        folder = tmp_path / str(at)
        store, old = begin(folder)
        (folder / ".0123456789abcdef.part.png").touch()
        expected = Killed if error is None else UserError if work == "start" else StoreFailed
        saved: list[str] = []
        with counted(SystemCalls(folder, at, error)), suppress(expected):
            result = works(folder, store)()
            saved = names(result) if work == "save" else []
        if error is not None and work != "start":  # the same process goes on
            assert [content(store, name) for name in saved] == new[: len(saved)]
            store.save([b"next"], "png")
        again = start(folder)
        there = {name: content(again, name) for name in os.listdir(folder) if name != LOCK_FILE}
        assert set(there.values()) <= {*new, b"oldest", b"old", b"next"}, (
            f"left by a failure of call {at}, {made[at]}"
        )
        assert len(there) <= 4
        if not saved and error != errno.ENOSPC:  # nothing but the limit and a full disk evicts
            assert there.get(old) == b"old"


@pytest.mark.parametrize("error", ERRORS, ids=os.strerror)
def test_reading_is_whole_or_fails_whichever_call_fails(tmp_path: Path, error: int) -> None:
    """Fails if half a picture is delivered, or a descriptor stays open."""
    store = new_store(tmp_path)
    name = names(store.save([PICTURE], "png"))[0]
    made = calls_of(tmp_path, lambda: store.read(name))
    assert {"open", "fstat", "read", "close"} <= set(made)
    before = len(os.listdir("/proc/self/fd"))
    for at in range(len(made)):
        with counted(SystemCalls(tmp_path, at, error)), suppress(StoreFailed):
            assert content(store, name) == PICTURE
        assert content(store, name) == PICTURE
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_picture_that_cannot_be_removed_does_not_end_the_storing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if one file that stays has every later request fail."""
    store = new_store(tmp_path, 2)
    stuck = names(store.save([b"stuck", b"other"], "png"))[0]
    unlink = os.unlink

    def fail(path: Any, **keywords: Any) -> None:
        if Path(path).name == stuck:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, **keywords)

    monkeypatch.setattr(os, "unlink", fail)
    for _ in range(3):
        assert content(store, names(store.save([PICTURE], "png"))[0]) == PICTURE
    assert len(os.listdir(tmp_path)) == 3  # two, and the one that stays


def test_the_log_line_of_a_failure_is_json(
    tmp_path: Path, caplog_of_ours: pytest.LogCaptureFixture
) -> None:
    """Fails if the fields cannot be written by the service's log."""
    (tmp_path / "gone").mkdir()
    store = new_store(tmp_path / "gone", 1)
    (tmp_path / "gone").rmdir()
    with pytest.raises(StoreFailed):
        store.check(1)
    assert json.loads(json.dumps(log_of(caplog_of_ours)[0]))["errno"] == "ENOENT"
