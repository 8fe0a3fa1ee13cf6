"""A disk that becomes full in the middle of a file, or at its end: the command must notice."""

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.errors import UserError
from autoregressive.output.images import PICTURE_FORMATS, picture_grid, save_codes, save_picture

ROOM_LEFT_OUT = (1, 7, 60, 512, 3000)  # bytes that the file has and the disk does not take


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """Files can have so many bytes. The write that passes the limit is cut short, as on a full
    disk.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_noise(path: Path) -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    save_picture(path, picture_grid(pixels), "for people", {"model": "GPT-demo"})


def save_numbers(path: Path) -> None:
    save_codes(path, torch.arange(1000).reshape(1, 1000))


@pytest.mark.parametrize("left_out", ROOM_LEFT_OUT)
@pytest.mark.parametrize(
    ("suffix", "save"),
    [*((suffix, save_noise) for suffix in PICTURE_FORMATS), (".npy", save_numbers)],
)
def test_a_file_without_its_end_is_no_success(
    tmp_path: Path, suffix: str, save: Callable[[Path], None], left_out: int
) -> None:
    """Fails if a library's own writing hides that the disk took only a part of the file."""
    path = tmp_path / f"x{suffix}"
    save(path)
    whole = path.read_bytes()
    path.write_bytes(b"old")
    with room_for(len(whole) - left_out), pytest.raises(UserError, match="cannot write"):
        save(path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_codes_are_read_back_as_saved(tmp_path: Path) -> None:
    """Fails if the array in the file is another."""
    save_numbers(tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), np.arange(1000, dtype=np.int32)[None])
