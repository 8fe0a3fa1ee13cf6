"""The classes of a bulk job's images: random, balanced, and from a file."""

from pathlib import Path

import numpy as np
import pytest

from autoregressive.errors import UserError
from autoregressive.serve.bulk.labels import make_labels


def test_random_labels_depend_on_the_seed_and_the_index_alone() -> None:
    """Fails if an image has another class in a longer job, or classes are not uniform."""
    labels = make_labels("random", 50_000, 1000, seed=3)
    assert np.array_equal(make_labels("random", 137, 1000, seed=3), labels[:137])
    assert not np.array_equal(make_labels("random", 137, 1000, seed=4), labels[:137])
    counts = np.bincount(labels, minlength=1000)
    assert abs(((counts - 50) ** 2 / 50).sum() - 999) < 5 * np.sqrt(2 * 999)
    assert (np.bincount(make_labels("balanced", 50_000, 1000, 0)) == 50).all()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("1\n2\n", "holds 2 ids; give 3 ids, one for each image"),
        ("", "holds 0 ids; give 3 ids, one for each image"),
        ("1\n2\n64\n", "image 2 has id 64; ids are 0 to 63"),
        ("1\nfox\n3\n", "line 2 is 'fox'; give an id a line"),
        ("1\n2\n" + "9" * 30, "an id has too many digits"),
        ("\x001\n2\n3", "line 1 is '\\?1'; give an id a line"),
        (None, "there is no such file; give random, balanced, or a file"),
    ],
)
def test_a_file_of_labels_is_checked(tmp_path: Path, content: str | None, told: str) -> None:
    """Fails if a slip in a file of labels shows as a traceback, or as wrong classes."""
    file = tmp_path / "labels.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=told):
        make_labels(str(file), 3, 64, 0)
    for good in ("5\n0\n63\n", "\ufeff5\r\n0\r\n\r\n63"):  # as Windows writes it, too
        file.write_bytes(good.encode())
        assert make_labels(str(file), 3, 64, 0).tolist() == [5, 0, 63]
    np.save(tmp_path / "labels.npy", np.array([7, 8, 9], dtype=np.uint8))
    assert make_labels(str(tmp_path / "labels.npy"), 3, 64, 0).tolist() == [7, 8, 9]
    np.save(tmp_path / "labels.npy", np.array([{}, 8, 9], dtype=object))
    for damaged in ((tmp_path / "labels.npy").read_bytes(), b""):
        (tmp_path / "labels.npy").write_bytes(damaged)
        with pytest.raises(UserError, match="holds no ids"):
            make_labels(str(tmp_path / "labels.npy"), 3, 64, 0)
