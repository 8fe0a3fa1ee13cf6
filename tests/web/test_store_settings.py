"""The store's flags: sizes are read plainly, and what cannot keep a single image is refused at the
start.
"""

import pytest
from test_service_settings import refusal, settings


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000000", 10**6),
        ("500M", 500 * 2**20),
        ("10g", 10 * 2**30),
        ("2T", 2**41),
        ("300K", 300 * 2**10),
    ],
)
def test_a_size_is_bytes_or_has_a_unit(text: str, size: int) -> None:
    """Fails if a unit is another power, or its case counts."""
    assert settings("--store-dir=.", "--store-max-size", text).stored_bytes == size
    assert settings().stored_bytes is None


@pytest.mark.parametrize(
    "text", ["", "G", "1.5G", "10 G", "10GB", "-1", "0x10", "1e9", "ten", "10P", "\u0661\u0660"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """Fails if a typing error passes for a quota."""
    assert f"--store-max-size {text}: must be a number of bytes, or of K, M, G or T" in refusal(
        f"--store-max-size={text}"
    )


def test_the_quota_has_room_for_an_image_of_each_process() -> None:
    """Fails if a service starts that can store nothing."""
    # 128 x 128 pixels, and what is said about them
    settings("--store-dir=.", "--store-max-size", "64K")
    assert "--store-max-size 63K: must be at least 64K" in refusal("--store-max-size", "63K")
    assert "must be at least 128K" in refusal("--store-max-size", "100K", "--api-server-count", "2")


@pytest.mark.parametrize("typed", ["--store-images=5", "--store-max-size=1G"])
def test_a_limit_of_a_store_that_is_not_there_is_refused(typed: str) -> None:
    """Fails if somebody believes that images are stored where none are."""
    assert f"{typed.partition('=')[0]} goes with --store-dir" in refusal(typed)
    settings("--store-dir=.", typed)
