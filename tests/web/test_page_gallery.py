"""The gallery of the page: what it keeps, forgets, saves and deletes."""

import csv
import io
import json
import zipfile

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_browser import OpenPage, ask, eventually, is_ready, names, run_ends, saved
from page_stand_in import SIZE, Behaviour
from PIL import Image
from playwright.sync_api import expect

_FILL = """(count) => new Promise((done) => {
    const open = indexedDB.open("llamagen", 1);
    open.onsuccess = () => {
        const transaction = open.result.transaction("pictures", "readwrite");
        const request = {class_label: 7, n: 1, cfg_scale: 2, cfg_interval: -1,
            temperature: 1, top_k: 0, top_p: 1};
        for (let k = 0; k < count; k += 1) transaction.objectStore("pictures").put({
            id: `${k}`, created: k, index: 0, className: "old", model: "m", size: 128,
            request: {...request, seed: k},
            blob: new Blob([]),
        });
        transaction.oncomplete = () => { open.result.close(); done(); };
    };
})"""
_COUNT = """() => new Promise((done) => {
    const open = indexedDB.open("llamagen", 1);
    open.onsuccess = () => {
        const count = open.result.transaction("pictures").objectStore("pictures").count();
        count.onsuccess = () => { open.result.close(); done(count.result); };
    };
})"""


def test_the_gallery_survives_a_reload_and_what_was_deleted_does_not(open_page: OpenPage) -> None:
    """Fails if a picture is lost or changes its place, or if one that was deleted comes back."""
    page = open_page()
    ask(page, "fox", 3, 7)
    run_ends(page)
    ask(page, "bee", 1, 8)
    run_ends(page, count=2)
    tiles = page.locator(".tile-open")
    before = names(page)
    assert before == ["bee, seed 8", *(f"fox, {k} of 3, seed 7" for k in (1, 2, 3))]
    page.reload()
    expect(tiles).to_have_count(4)
    assert names(page) == before
    expect(page.locator(".tile img").first).to_have_js_property("naturalWidth", SIZE)

    page.get_by_role("button", name="Delete fox, 1 of 3, seed 7").click()
    expect(tiles).to_have_count(3)
    page.get_by_role("button", name="Undo").click()
    expect(tiles).to_have_count(4)
    assert names(page) == before
    page.get_by_role("button", name="Delete bee, seed 8").click()
    expect(page.get_by_role("button", name="Show fox, 1 of 3, seed 7")).to_be_focused()
    expect(page.locator(".run")).to_have_count(1)
    page.reload()
    expect(tiles).to_have_count(3)

    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Keep them").click()
    expect(tiles).to_have_count(3)
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Delete all").click()
    expect(tiles).to_have_count(0)
    page.reload()
    is_ready(page)
    expect(page.locator("#welcome")).to_be_visible()
    expect(tiles).to_have_count(0)


def test_the_gallery_has_a_limit_and_the_oldest_go_first(open_page: OpenPage) -> None:
    """Fails if a browser's storage fills up without an end, or if what was drawn last is
    what goes.
    """
    page = open_page()
    page.evaluate(_FILL, 199)
    page.reload()
    expect(page.locator(".tile-open")).to_have_count(199)
    ask(page, "fox", 3, 7)
    run_ends(page)
    expect(page.locator(".tile-open")).to_have_count(200)
    page.reload()
    expect(page.locator(".tile-open")).to_have_count(200)
    assert names(page)[-1] == "old, seed 2"


def test_what_several_tabs_have_kept_beyond_the_limit_is_deleted(open_page: OpenPage) -> None:
    """Fails if pictures that no tab shows fill the storage, and come back when others go."""
    page = open_page()
    page.evaluate(_FILL, 203)
    page.reload()
    expect(page.locator(".tile-open")).to_have_count(200)
    assert eventually(lambda: page.evaluate(_COUNT) == 200)
    assert names(page)[-1] == "old, seed 3"


def test_while_pictures_are_selected_a_click_on_one_selects_it(open_page: OpenPage) -> None:
    """Fails if whoever selects pictures has to hit the small box in their corner."""
    page = open_page()
    ask(page, "fox", 2, 7)
    run_ends(page)
    page.get_by_role("button", name="Select", exact=True).click()
    for tile in page.locator(".tile-open").all():
        tile.click()
    expect(page.locator("#selection-count")).to_have_text("2 selected")
    page.locator(".tile-open").first.click()
    expect(page.locator("#selection-count")).to_have_text("1 selected")
    expect(page.locator("#viewer")).to_be_hidden()


def test_a_browser_without_storage_draws_all_the_same(open_page: OpenPage) -> None:
    """Fails if private browsing or switched-off storage stops the page."""
    page = open_page()
    page.add_init_script(
        """for (const name of ["indexedDB", "localStorage", "sessionStorage"]) {
            const refuse = () => { throw new DOMException("no", "SecurityError"); };
            Object.defineProperty(window, name, { get: refuse });
        }"""
    )
    page.reload()
    ask(page)
    run_ends(page)
    expect(page.locator(".tile-open")).to_have_count(2)
    expect(page.locator("#gallery-facts")).to_contain_text("only until the page is closed")
    page.get_by_role("button", name="Theme: as the system").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_settings_of_a_picture_can_be_taken_up(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    page = open_page()
    page.locator("#more summary").click()
    page.get_by_label("Top-p", exact=True).fill("0.5")
    ask(page, "fox", 2, 7)
    run_ends(page)
    page.reload()
    page.locator(".tile-open").first.click()
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    page.keyboard.press("Enter")
    run_ends(page)
    assert behaviour.requests[0] == behaviour.requests[1]


def test_a_download_is_the_servers_file(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if the page writes the picture anew, which would lose the settings in it, or gives it a
    name that says nothing.
    """
    page = open_page()
    ask(page, "soccer ball", 2, 7)
    run_ends(page)
    for index, button in enumerate(
        (
            page.get_by_role("button", name="Download soccer ball, 1 of 2, seed 7"),
            page.locator("#viewer").get_by_role("button", name="Download"),
        )
    ):
        if index == 1:
            page.locator(".tile-open").nth(1).click()
        name, content = saved(page, button.click)
        assert name == f"GPT-demo_soccer-ball_62_seed-7_guidance-4_{index + 1}-of-2.png"
        assert content == behaviour.sent[index]
        with Image.open(io.BytesIO(content)) as picture:
            assert json.loads(picture.info["parameters"])["seed"] == 7


def test_several_pictures_are_saved_as_one_archive_with_their_parameters(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a picture of the selection is missing, another one is in it, or the table does not
    say how each was made.
    """
    page = open_page()
    ask(page, "fox", 2, 2**60)
    run_ends(page)
    ask(page, "soccer ball", 2, 7)
    run_ends(page, count=2)
    page.get_by_role("button", name="Select", exact=True).click()
    for name in ("soccer ball, 2 of 2, seed 7", f"fox, 1 of 2, seed {2**60}"):
        page.get_by_label(f"Select {name}").check()
    expect(page.locator("#selection-count")).to_have_text("2 selected")
    _, content = saved(page, page.get_by_role("button", name="Download zip").click)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("parameters.csv").decode())))
        files = [archive.read(row["file"]) for row in rows]
    assert files == [behaviour.sent[3], behaviour.sent[0]]
    assert [row["seed"] for row in rows] == ["7", str(2**60)]
    assert [(row["class"], row["image"]) for row in rows] == [("soccer ball", "1"), ("fox", "0")]
    assert rows[0]["cfg_scale"] == "4"

    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator(".tile-open")).to_have_count(2)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".tile-open")).to_have_count(4)
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#selection")).to_be_hidden()


def test_a_run_is_saved_as_one_picture(open_page: OpenPage) -> None:
    """Fails if the sheet of a run lacks a picture."""
    page = open_page()
    ask(page, "fox", 3, 7)
    run_ends(page)
    sheet_button = page.get_by_role("button", name="Download as one picture: fox")
    with Image.open(io.BytesIO(saved(page, sheet_button.click)[1])) as sheet:
        assert sheet.width > 2 * SIZE
        assert sheet.height > 2 * SIZE
        colours = [sheet.getpixel((x, y)) for x, y in ((12, 40), (150, 40), (12, 200))]
    assert all(colour != (255, 255, 255, 255) for colour in colours)
