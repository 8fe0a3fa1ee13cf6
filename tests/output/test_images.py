"""Pictures on disk: LlamaGen's layout, captions that fit, parameters inside, whole files only."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from autoregressive.errors import UserError
from autoregressive.files import check_file, check_folder, write_whole
from autoregressive.output.images import (
    JSON_KEY,
    fitted_text,
    individual_file,
    picture_grid,
    save_codes,
    save_picture,
)


def constant_images(*values: float, side: int = 8) -> torch.Tensor:
    """One image for each value, all its pixels equal to it."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, side, side)


def test_the_grid_has_four_a_row_and_llamagens_two_black_pixels_between() -> None:
    """Fails if images are out of order, or the layout is not that of LlamaGen's
    save_image(nrow=4).
    """
    values = (-1.0, -0.5, 0.0, 0.5, 1.0)
    grid = picture_grid(constant_images(*values))
    assert grid.shape == (3, 2 + 2 * 10, 2 + 4 * 10)
    assert grid.dtype == torch.uint8
    expected = [0, 64, 128, 191, 255]
    for image, value in enumerate(expected):
        top, left = 2 + image // 4 * 10, 2 + image % 4 * 10
        assert (grid[:, top : top + 8, left : left + 8] == value).all()
    assert (grid[:, :2] == 0).all()
    assert (grid[:, 12:, 12:] == 0).all()


def test_values_beyond_the_range_are_clipped() -> None:
    """Fails if a bright pixel wraps around to a dark one."""
    assert picture_grid(constant_images(1.7)).unique().tolist() == [255]
    assert picture_grid(constant_images(-1.7)).unique().tolist() == [0]


def test_bfloat16_pixels_are_taken() -> None:
    """Fails if a decoder in low precision cannot be saved."""
    assert picture_grid(constant_images(1.0).bfloat16()).unique().tolist() == [255]


def test_captions_stand_under_their_images_and_leave_them_alone() -> None:
    """Fails if a caption covers pixels, is missing, or stands under another image."""
    images = constant_images(0.0, 0.0, side=64)
    grid = picture_grid(images, ["", "dog"])
    assert grid.shape[1] > 64 + 4
    assert (grid[:, 2:66, 2:66] == 128).all()
    assert (grid[:, 2:66, 68:132] == 128).all()
    assert (grid[:, 66:, :67] == 0).all()
    assert (grid[:, 66:, 67:] > 200).any()


@pytest.mark.parametrize("width", [20, 60, 200])
def test_a_caption_never_exceeds_its_width(width: int) -> None:
    """Fails if a long name runs into its neighbour, or a short one is cut."""
    font = ImageFont.load_default(size=12)
    text = fitted_text("American Staffordshire terrier", font, width)
    assert font.getlength(text) <= width
    assert text.endswith("...") == (width < 190)
    assert fitted_text("dog", font, 60) == "dog"


def test_the_png_holds_its_parameters_for_people_and_as_json(tmp_path: Path) -> None:
    """Fails if the record is lost on the way to disk, names in other scripts included."""
    record: dict[str, object] = {"model": "GPT-demo", "labels": [0, 1], "name": "Hündin 犬"}
    save_picture(tmp_path / "x.png", picture_grid(constant_images(0.5)), "a Hündin 犬", record)
    with Image.open(tmp_path / "x.png") as image:
        image.load()
        assert image.text["parameters"] == "a Hündin 犬"  # type: ignore[attr-defined]
        assert json.loads(image.text[JSON_KEY]) == record  # type: ignore[attr-defined]
        assert np.asarray(image).shape == (8, 8, 3)
        assert (np.asarray(image) == 191).all()


def test_codes_are_int32_rows(tmp_path: Path) -> None:
    """Fails if a reader finds another dtype or shape."""
    codes = torch.arange(6).view(2, 3)
    save_codes(tmp_path / "codes.npy", codes)
    loaded = np.load(tmp_path / "codes.npy")
    assert loaded.dtype == np.int32
    assert loaded.tolist() == codes.tolist()


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), ValueError("bug"), KeyboardInterrupt()]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, failure: BaseException
) -> None:
    """Fails if an error, a full disk or Ctrl-C half-way destroys an existing picture or leaves
    rubbish.
    """
    path = tmp_path / "x.png"
    path.write_bytes(b"old")

    def write(file: Path) -> None:
        assert (file.parent, file.suffix) == (tmp_path, ".png")
        file.write_bytes(b"half")
        raise failure

    with pytest.raises(UserError if isinstance(failure, OSError) else type(failure)):
        write_whole(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.png"]


def test_a_link_stays_a_link_and_the_file_is_readable_by_others(tmp_path: Path) -> None:
    """Fails if a link is replaced by a file, or the temporary file's private mode leaks."""
    (tmp_path / "link.png").symlink_to(tmp_path / "target.png")
    umask = os.umask(0o022)
    try:
        write_whole(tmp_path / "link.png", lambda file: file.write_bytes(b"new"))
    finally:
        os.umask(umask)
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "target.png").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "target.png").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("x.jpg", "must end in .png"),
        ("x", "must end in .png"),
        ("missing/x.png", "no folder"),
        ("file/x.png", "no folder"),
        ("folder.png", "is a folder"),
        ("n" * 300 + ".png", "too long"),
    ],
)
def test_an_unwritable_output_is_found_before_the_work(
    tmp_path: Path, name: str, complaint: str
) -> None:
    """Fails if minutes of sampling could end in an error that was there from the start."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=complaint):
        check_file("--output", tmp_path / name, ".png")


def test_a_link_to_itself_is_found_before_the_work(tmp_path: Path) -> None:
    """Fails if a ring of links ends in a traceback, or is silently replaced."""
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(UserError, match="leads to itself"):
        check_file("--output", tmp_path / "loop.png", ".png")


@pytest.mark.parametrize("name", ["n" * 300 + ".png", "x." + "n" * 300, "n" * 300 + "/x.png"])
def test_a_name_that_the_disk_refuses_is_one_line(tmp_path: Path, name: str) -> None:
    """Fails if tidying up after the error raises another one."""
    with pytest.raises(UserError, match="cannot write"):
        write_whole(tmp_path / name, lambda file: file.write_bytes(b"new"))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_write_protection_is_found_before_the_work(tmp_path: Path) -> None:
    """Fails if a folder or file without the right to write passes the check."""
    (tmp_path / "x.png").touch(mode=0o444)
    with pytest.raises(UserError, match="write-protected"):
        check_file("--output", tmp_path / "x.png", ".png")
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="cannot write"):
        check_folder("--save-individual", tmp_path)


def test_the_check_leaves_nothing_behind(tmp_path: Path) -> None:
    """Fails if a probe is left, or an existing picture is touched."""
    (tmp_path / "x.png").write_bytes(b"old")
    check_file("--output", tmp_path / "x.png", ".png")
    check_file("--output", tmp_path / "new.PNG", ".png")
    assert os.listdir(tmp_path) == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"old"


def test_individual_files_are_told_apart_and_own_up_to_noise(tmp_path: Path) -> None:
    """Fails if two images share a file, a name escapes the folder, or noise is not called
    untrained.
    """
    files = {
        individual_file(tmp_path, image, 0, "dog", trained=True, suffix=".png")
        for image in range(3)
    }
    assert len(files) == 3
    odd = individual_file(tmp_path, 0, 5, "../a/b c", trained=False, suffix=".png")
    assert odd == tmp_path / "0000_5_a_b_c_untrained.png"
