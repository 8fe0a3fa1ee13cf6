"""Each system call of saving and storing fails once, or is the last of a process that is killed:
files are whole or absent.
"""

import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from system_calls import ERRORS, Killed, SystemCalls, calls_of, counted

from autoregressive.errors import UserError
from autoregressive.files import check_file, check_folder, write_whole
from autoregressive.output.images import save_codes, save_picture

PICTURE = torch.arange(3 * 32 * 32).view(3, 32, 32).to(torch.uint8)
CODES = torch.arange(1000).view(10, 100)


def is_png(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return bool((np.asarray(image) == PICTURE.permute(1, 2, 0).numpy()).all())


def is_jpeg(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        image.load()  # an error, if its end is missing
        return image.size == (32, 32)


def is_codes(content: bytes) -> bool:
    return bool((np.load(io.BytesIO(content)) == CODES.numpy()).all())


def write_text(path: Path) -> None:
    write_whole(path, lambda part: part.write_text(json.dumps({"figure": 1})))


SAVERS: dict[str, tuple[str, Callable[[Path], None], Callable[[bytes], bool]]] = {
    "picture": ("x.png", lambda path: save_picture(path, PICTURE, "a dog", {"label": 0}), is_png),
    "photo": ("x.jpg", lambda path: save_picture(path, PICTURE, "a dog", {"label": 0}), is_jpeg),
    "codes": ("x.npy", lambda path: save_codes(path, CODES), is_codes),
    "figures": ("x.json", write_text, lambda content: json.loads(content) == {"figure": 1}),
}
OLD = b"what was there before"


def expected(error: int | None) -> type[BaseException]:
    """What a failing call ends in."""
    return Killed if error is None else UserError


def check_outcome(path: Path, *, old: bool, is_whole: Callable[[bytes], bool]) -> None:
    """The file is what it was, or new and whole."""
    if not path.exists():
        assert not old, "the old file is lost"
        return
    content = path.read_bytes()
    assert (old and content == OLD) or is_whole(content)


@pytest.mark.parametrize(
    "error", [*ERRORS, None], ids=lambda error: "killed" if error is None else os.strerror(error)
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("saver", SAVERS)
def test_a_file_is_whole_or_absent_whichever_call_fails(
    tmp_path: Path, saver: str, old: bool, error: int | None
) -> None:
    """Fails if a call's failure, or death at it, leaves half a file, loses the old one, or leaves
    rubbish after the next save.
    """
    name, save, is_whole = SAVERS[saver]
    made = calls_of(tmp_path, partial(save, tmp_path / name))
    assert {"open", "write", "fsync", "replace", "scandir", "unlink", "flock"} <= set(made)
    for at in range(len(made)):
        folder = tmp_path / str(at)
        folder.mkdir()
        path = folder / name
        if old:
            path.write_bytes(OLD)
        with counted(SystemCalls(folder, at, error)), suppress(expected(error)):
            save(path)
            assert is_whole(path.read_bytes())  # that call did not matter
        check_outcome(path, old=old, is_whole=is_whole)
        save(path)
        assert is_whole(path.read_bytes())
        assert os.listdir(folder) == [name], f"left by a failure of call {at}, {made[at]}"


@pytest.mark.parametrize(
    "error", [*ERRORS, None], ids=lambda error: "killed" if error is None else os.strerror(error)
)
def test_a_check_before_the_work_leaves_nothing_whichever_call_fails(
    tmp_path: Path, error: int | None
) -> None:
    """Fails if a failing check ends in a traceback, touches the picture, or leaves a probe after
    the next check.
    """
    (tmp_path / "x.png").write_bytes(OLD)

    def check() -> None:
        check_file("--output", tmp_path / "x.png", ".png")
        check_folder("--save-individual", tmp_path)

    for at in range(len(calls_of(tmp_path, check))):
        with counted(SystemCalls(tmp_path, at, error)), suppress(expected(error)):
            check()
        check()
        assert os.listdir(tmp_path) == ["x.png"]
        assert (tmp_path / "x.png").read_bytes() == OLD


def test_what_another_process_is_writing_is_no_leftover(tmp_path: Path) -> None:
    """Fails if two commands that save the same file remove each other's unfinished one."""

    def write_slowly(part: Path) -> None:
        part.write_bytes(b"slow")
        write_whole(tmp_path / "x.png", lambda other: other.write_bytes(b"quick"))
        assert (tmp_path / "x.png").read_bytes() == b"quick"

    write_whole(tmp_path / "x.png", write_slowly)
    assert (tmp_path / "x.png").read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["x.png"]


def test_only_unfinished_files_of_this_name_are_removed(tmp_path: Path) -> None:
    """Fails if a user's file, or the unfinished one of another picture, is taken for a leftover."""
    others = {".hidden.part.png", "part.png", ".0123456789abcdef.part.png", ".cache"}
    for name in others:
        (tmp_path / name).touch()
    write_whole(tmp_path / "x.png", lambda part: part.write_bytes(b"new"))
    assert set(os.listdir(tmp_path)) == others | {"x.png"}
