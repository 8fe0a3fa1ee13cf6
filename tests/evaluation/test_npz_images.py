"""Reading images and statistics from .npz files: whole, in a stream, and never by unpickling."""

import io
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from feature_network import random_images
from refusals import refused

from autoregressive.evaluation.npz_images import open_images, read_gaussian


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_images_come_as_they_were_saved(
    save: Callable[..., None], size: int, tmp_path: Path
) -> None:
    """Fails if an image is lost, doubled or changed, or a batch is larger than asked for."""
    images = random_images(7)
    save(tmp_path / "x.npz", images, labels=np.arange(7))
    found = open_images(tmp_path / "x.npz")
    assert found is not None
    assert found.shape == images.shape
    batches = list(found.batches(size))
    assert [len(batch) for batch in batches[:-1]] == [min(size, 7)] * (len(batches) - 1)
    assert (np.concatenate(batches) == images).all()
    batches[0][:] = 0  # torch wants arrays that can be written


def test_a_large_file_is_not_in_memory(tmp_path: Path) -> None:
    """Fails if memory grows with the number of images."""
    np.savez(tmp_path / "x.npz", np.zeros((200, 128, 128, 3), np.uint8))  # 9.8 MB
    found = open_images(tmp_path / "x.npz")
    assert found is not None
    tracemalloc.start()
    try:
        assert sum(len(batch) for batch in found.batches(4)) == 200
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2e6


def test_a_file_of_statistics_has_no_images(tmp_path: Path) -> None:
    """Fails if a reference without images is refused, or statistics come out otherwise."""
    covariance = np.array([[2.0, 1.0], [1.0, 3.0]], np.float32)
    np.savez(tmp_path / "x.npz", mu=np.array([1.0, 2.0], np.float32), sigma=covariance)
    assert open_images(tmp_path / "x.npz") is None
    assert read_gaussian(tmp_path / "x.npz", "mu_s", "sigma_s") is None
    found = read_gaussian(tmp_path / "x.npz", "mu", "sigma")
    assert found is not None
    assert found.mean.tolist() == [1, 2]
    assert found.covariance.tolist() == covariance.tolist()


WRONG_IMAGES: dict[str, tuple[np.ndarray, str]] = {
    "floats": (np.zeros((4, 8, 8, 3), np.float32), r"arr_0 is float32 \[4, 8, 8, 3\], and must be"),
    "grey": (np.zeros((4, 8, 8), np.uint8), "and must be uint8"),
    "channels first": (np.zeros((4, 3, 8, 8), np.uint8), "and must be uint8"),
    "none": (np.zeros((0, 8, 8, 3), np.uint8), "and must be uint8"),
    "signed": (np.zeros((4, 8, 8, 3), np.int8), "and must be uint8"),
    "objects": (np.array([object(), {}]), "arr_0 is object"),
    "Fortran": (np.asfortranarray(random_images(4)), "Fortran order; save numpy.ascontiguousarray"),
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_what_are_no_images_is_refused(kind: str, tmp_path: Path) -> None:
    """Fails if an hour's work begins on it, it is read the wrong way round, or it is unpickled."""
    array, told = WRONG_IMAGES[kind]
    np.savez(tmp_path / "x.npz", array)
    with refused(told):
        open_images(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 0.999])
def test_a_file_cut_off_is_refused(share: float, save: Callable[..., None], tmp_path: Path) -> None:
    """Fails if an interrupted download is a traceback."""
    save(tmp_path / "x.npz", random_images(5))
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[: int(share * len(content))])
    with refused("not an .npz file, or damaged .*; write or download it again"):
        open_images(tmp_path / "x.npz")


def test_fewer_images_than_the_header_says_are_refused(tmp_path: Path) -> None:
    """Fails if the missing images are found out after all others were looked at."""
    written = io.BytesIO()
    np.save(written, random_images(5))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", written.getvalue()[:-100])
    with refused("takes 3840 bytes, but 3740 are there"):
        open_images(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("length", [1, 100])
def test_damaged_bytes_are_found(length: int, save: Callable[..., None], tmp_path: Path) -> None:
    """Fails if figures are given of images that the disk has damaged, or decompression that fails
    is a traceback.
    """
    path = tmp_path / "x.npz"
    save(path, random_images(20))
    content = path.read_bytes()
    for place in np.linspace(200, len(content) - 300, 40, dtype=int):
        damaged = bytearray(content)
        damaged[place : place + length] = bytes(byte ^ 0xFF for byte in damaged[place:][:length])
        path.write_bytes(damaged)
        with refused("not an .npz file, or damaged"):
            found = open_images(path)
            assert found is not None
            list(found.batches(6))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Fails if a slip in a name is a traceback."""
    with refused("No such file or directory"):
        open_images(tmp_path / "x.npz")
    with refused("Is a directory"):
        open_images(tmp_path)
    np.save(tmp_path / "x.npy", random_images(2))
    with refused("not an .npz file"):
        open_images(tmp_path / "x.npy")


WRONG_STATISTICS = {
    "no sigma": ({"mu": np.zeros(2)}, "has mu, and must have both mu and sigma"),
    "no square": ({"mu": np.zeros(2), "sigma": np.zeros((2, 3))}, "must be a square of the 2"),
    "other size": ({"mu": np.zeros(2), "sigma": np.eye(3)}, "must be a square of the 2"),
    "a matrix": ({"mu": np.zeros((2, 2)), "sigma": np.eye(2)}, "must be floats of 1 dimension$"),
    "integers": ({"mu": np.zeros(2, int), "sigma": np.eye(2)}, "mu is int64"),
    "NaN": ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "sigma has values that are not"),
    "not symmetric": (
        {"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])},
        "sigma is not symmetric",
    ),
    "objects": ({"mu": np.array([{}]), "sigma": np.eye(1)}, "mu is object"),
    "too many": ({"mu": np.zeros(20_000), "sigma": np.eye(1)}, "16384 features at most"),
}


@pytest.mark.parametrize("kind", WRONG_STATISTICS)
def test_what_are_no_statistics_is_refused(kind: str, tmp_path: Path) -> None:
    """Fails if a figure is computed from what cannot be a mean and a covariance."""
    arrays, told = WRONG_STATISTICS[kind]
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with refused(told):
        read_gaussian(tmp_path / "x.npz", "mu", "sigma")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """Fails if a file from elsewhere can run a command."""

    class Command:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "made"),)

    harm = np.array([Command()], dtype=object)
    np.savez(tmp_path / "x.npz", harm, mu=harm, sigma=harm)
    with refused("object"):
        open_images(tmp_path / "x.npz")
    with refused("object"):
        read_gaussian(tmp_path / "x.npz", "mu", "sigma")
    assert not (tmp_path / "made").exists()
