"""What the page remembers: settings in its address, presets, and the records in pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_browser import OpenPage, drop, fill, generate, run_ends
from page_stand_in import Behaviour
from playwright.sync_api import Page, expect

from autoregressive.models.axes import GridAxes
from autoregressive.models.classes import DEMO
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.output.images import save_picture
from autoregressive.output.records import axes_record, readable

RECORD: dict[str, Any] = {
    "program": "llamagen-serve",
    "trained": True,
    "model": "GPT-demo",
    "cfg_scale": 3.5,
    "cfg_interval": 9,
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 0.75,
    "seed": 2**63 - 1,
    "images": 3,
    "image": 1,
    "label": 7,
    "class_name": "fox",
}
SENT = {
    "class_label": 7,
    "n": 3,
    "seed": 2**63 - 1,
    "cfg_scale": 3.5,
    "cfg_interval": 9,
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 0.75,
}


def query_of(page: Page) -> str:
    return str(page.evaluate("location.search"))


def test_settings_are_in_the_address_and_survive_a_reload(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if the form forgets what was filled in, or if a link does not lead to it."""
    page = open_page()
    assert query_of(page) == ""
    page.get_by_label("Guidance", exact=True).fill("3")
    fill(page, "owl", 2, 2**62 + 1)
    assert query_of(page) == f"?class=owl&pictures=2&seed={2**62 + 1}&guidance=3"
    page.reload()
    expect(page.locator("#class-id")).not_to_be_empty()
    generate(page)
    run_ends(page)
    other = open_page(query=query_of(page))
    generate(other)
    run_ends(other)
    assert behaviour.requests[0] == behaviour.requests[1]
    sent = behaviour.requests[0]
    assert [sent[name] for name in ("n", "seed", "cfg_scale")] == [2, 2**62 + 1, 3]


def test_an_address_that_makes_no_sense_is_told_at_the_fields(open_page: OpenPage) -> None:
    """Fails if a link with a slip in it draws something else, or breaks the page."""
    page = open_page(query="?class=foxx&guidance=lots&seed=-4&n=3&top_p=7")
    generate(page)
    marked = page.locator("[aria-invalid]:visible").evaluate_all("all => all.map(i => i.id)")
    assert marked[0] == "class"
    assert {"seed", "top_p"} <= set(marked)
    expect(page.locator("#class-error")).to_contain_text("Did you mean fox?")


def test_a_link_is_copied(open_page: OpenPage) -> None:
    """Fails if the link that is copied does not hold the settings, or nobody says that it was."""
    page = open_page()
    page.evaluate(
        """() => {
            navigator.clipboard.writeText = async (text) => { window.copied = text; };
        }"""
    )
    fill(page, "fox", 3, 5)
    page.get_by_role("button", name="Copy a link to these settings").click()
    expect(page.locator("#toast")).to_have_text("The link is copied")
    assert page.evaluate("copied").endswith("/?class=fox&pictures=3&seed=5")
    generate(page)
    run_ends(page)
    page.locator(".tile-open").first.click()
    page.keyboard.press("l")
    expect(page.locator("#toast")).to_have_text("The link is copied")
    assert "class=fox&pictures=3&seed=5&guidance=4" in page.evaluate("copied")
    page.keyboard.press("s")
    expect(page.locator("#toast")).to_have_text("The seed is copied")
    assert page.evaluate("copied") == "5"


def test_presets_are_saved_chosen_and_deleted(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if settings under a name are lost with the page, or are not those that were saved."""
    page = open_page()
    page.get_by_label("Guidance", exact=True).fill("6.5")
    fill(page, "bee", 3, None)
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_label("Name", exact=True).fill("loud bees")
    page.keyboard.press("Enter")
    expect(page.locator("#preset-dialog")).to_be_hidden()
    expect(page.locator("#preset")).to_have_value("loud bees")
    other = open_page(beside=page)
    expect(other.locator("#preset")).to_have_value("")
    other.locator("#preset").select_option("loud bees")
    generate(other)
    run_ends(other)
    sent = behaviour.requests[0]
    assert [sent[name] for name in ("class_label", "n", "cfg_scale")] == [33, 3, 6.5]
    other.get_by_label("Guidance", exact=True).fill("2")
    other.get_by_label("Seed", exact=True).fill("9")
    expect(other.locator("#preset")).to_have_value("")  # so that it can be chosen again
    other.locator("#preset").select_option("loud bees")
    expect(other.get_by_label("Guidance", exact=True)).to_have_value("6.5")
    expect(other.get_by_label("Seed", exact=True)).to_have_value("")
    assert query_of(other) == "?class=bee&pictures=3&guidance=6.5"
    other.get_by_role("button", name="Delete this preset").click()
    other.reload()
    expect(other.locator("#preset option")).to_have_count(1)


def test_a_preset_is_chosen_again_after_an_edit_of_what_it_does_not_name(
    open_page: OpenPage,
) -> None:
    """Fails if the preset is still named, so that choosing it changes nothing."""
    page = open_page()
    fill(page, "bee", 4, None)
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_label("Name", exact=True).fill("bees")
    page.keyboard.press("Enter")
    for name, value, before in (("Seed", "9", ""), ("Guidance", "7", "4")):
        expect(page.locator("#preset")).to_have_value("bees")
        page.get_by_label(name, exact=True).fill(value)
        expect(page.locator("#preset")).to_have_value("")
        page.locator("#preset").select_option("bees")
        expect(page.get_by_label(name, exact=True)).to_have_value(before)


def test_presets_of_two_tabs_are_all_kept(open_page: OpenPage) -> None:
    """Fails if the tab that saves last deletes what the other one has saved."""
    page = open_page()
    other = open_page(beside=page)
    for tab, name in ((page, "one"), (other, "two")):
        tab.get_by_role("button", name="Save", exact=True).click()
        tab.get_by_label("Name", exact=True).fill(name)
        tab.keyboard.press("Enter")
        expect(tab.locator("#preset")).to_have_value(name)
    page.reload()
    assert page.locator("#preset option").all_inner_texts() == ["Choose", "one", "two"]


@pytest.mark.parametrize("event", ["drop", "paste"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_of_the_program_gives_its_settings_back(
    open_page: OpenPage, behaviour: Behaviour, tmp_path: Path, suffix: str, event: str
) -> None:
    """Fails if the page cannot read what the program wrote into a picture's file, or rounds its
    seed.
    """
    file = tmp_path / f"picture{suffix}"
    picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
    save_picture(file, picture, readable(RECORD), RECORD)
    page = open_page()
    drop(page, file, event)
    expect(page.locator("#toast")).to_have_text("The form has the settings of this picture")
    expect(page.locator("#generate")).to_be_focused()
    generate(page)
    run_ends(page)
    assert behaviour.requests == [SENT]


def test_a_file_without_a_record_changes_nothing(open_page: OpenPage, tmp_path: Path) -> None:
    """Fails if a picture of another program, or half a file, breaks the page or empties the
    form.
    """
    page = open_page()
    fill(page, "owl", 2, 5)
    whole = tmp_path / "whole.png"
    save_picture(whole, torch.zeros(3, 8, 8, dtype=torch.uint8), readable(RECORD), RECORD)
    contents = {
        "half.png": whole.read_bytes()[:90],
        "text.txt": b"no picture",
        "empty.jpg": b"\xff\xd8\xff\xe1\x00\x10Exif\x00\x00II*\x00\xff\xff\xff\xff",
        "short.webp": b"RIFF\x00\x00\x00\x00WEBPEXIF\xff\xff\xff\x7f",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        page.evaluate("document.getElementById('toast').replaceChildren()")
        drop(page, tmp_path / name)
        expect(page.locator("#toast")).to_have_text("There are no settings in this file")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("5")


def test_a_picture_of_another_model_keeps_its_class_by_name(
    open_page: OpenPage, tmp_path: Path
) -> None:
    """Fails if class 7 of another model is taken for this one's."""
    file = tmp_path / "cock.png"
    record = RECORD | {"model": "GPT-XL", "label": 7, "class_name": "cock"}
    save_picture(file, torch.zeros(3, 8, 8, dtype=torch.uint8), readable(record), record)
    page = open_page()
    drop(page, file)
    expect(page.locator("#class-error")).to_have_text("This model has no class “cock”.")
    expect(page.get_by_label("Class", exact=True)).to_have_value("")
    record |= {"class_name": "owl"}
    save_picture(file, torch.zeros(3, 8, 8, dtype=torch.uint8), readable(record), record)
    drop(page, file)
    expect(page.get_by_label("Class", exact=True)).to_have_value("owl")


@pytest.mark.parametrize(
    ("axes", "sent"),
    [
        (["seed=3..4", "guidance=1,2.5"], [(7, s, g) for g in (1, 2.5) for s in (3, 4)]),
        (["guidance=1,2.5"], [(7, 2**63 - 1, g) for g in (1, 2.5)]),
        ([f"seed={2**62},5", "class=owl,8"], [(c, s, 3.5) for c in (17, 8) for s in (2**62, 5)]),
    ],
)
def test_a_grid_of_the_program_gives_its_axes_back(
    open_page: OpenPage,
    behaviour: Behaviour,
    tmp_path: Path,
    axes: list[str],
    sent: list[tuple[int, int, float]],
) -> None:
    """Fails if a grid that the command has drawn is taken for one picture, or if one of its values
    is lost on the way through the form.
    """
    params = SamplingParams(cfg_scale=3.5, top_k=50, seed=2**63 - 1)
    grid = GridAxes.parse(axes, DEMO)
    record = axes_record({"trained": True}, params, grid, label=7, class_name="fox")
    file = tmp_path / "grid.png"
    save_picture(file, torch.zeros(3, 64, 64, dtype=torch.uint8), readable(record), record)
    page = open_page()
    drop(page, file)
    expect(page.locator("#toast")).to_have_text("The form has this grid")
    expect(page.get_by_role("button", name="Draw the grid")).to_be_focused()
    page.keyboard.press("Enter")
    run_ends(page)
    drawn = [(body["class_label"], body["seed"], body["cfg_scale"]) for body in behaviour.requests]
    assert sorted(drawn) == sorted(sent)
    assert {body["top_k"] for body in behaviour.requests} == {50}


def test_a_grid_that_the_form_cannot_hold_gives_its_first_picture(
    open_page: OpenPage, tmp_path: Path
) -> None:
    """Fails if a grid of two settings breaks the page, or fills the form with lists."""
    params = SamplingParams(top_k=50, seed=6)
    grid = GridAxes.parse(["guidance=2,3", "temperature=0.5,1"], DEMO)
    record = axes_record({"trained": True}, params, grid, label=7, class_name="fox")
    file = tmp_path / "grid.png"
    save_picture(file, torch.zeros(3, 64, 64, dtype=torch.uint8), readable(record), record)
    page = open_page()
    drop(page, file)
    expect(page.locator("#toast")).to_have_text("The form has the settings of this picture")
    assert query_of(page).startswith("?class=fox&pictures=1&seed=6&guidance=2&")
    expect(page.locator("#grid")).not_to_have_attribute("open", "")
