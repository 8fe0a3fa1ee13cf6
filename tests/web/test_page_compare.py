"""Comparing on the page: grids, two pictures side by side, and the large view."""

import io
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_browser import OpenPage, ask, drop, facts, fill, names, run_ends, saved
from page_stand_in import SIZE, Behaviour
from PIL import Image
from playwright.sync_api import Page, expect


def draw_grid(page: Page, axis: str, values: str, seeds: str) -> None:
    page.locator("#grid").evaluate("grid => { grid.open = true; }")
    page.get_by_label("From row to row").select_option(axis)
    page.get_by_label("Values").fill(values)
    page.get_by_label("Seeds, from column to column").fill(seeds)
    page.get_by_role("button", name="Draw the grid").click()


@pytest.mark.parametrize(
    ("axis", "values", "field", "sent"),
    [
        ("Guidance", "1, 2.5", "cfg_scale", [1, 2.5]),
        ("Temperature", "0.5 1", "temperature", [0.5, 1]),
        ("Class", "fox, soccer ball", "class_label", [7, 62]),
    ],
)
def test_a_grid_shows_one_setting_against_seeds(
    open_page: OpenPage,
    behaviour: Behaviour,
    tmp_path: Path,
    axis: str,
    values: str,
    field: str,
    sent: list[float],
) -> None:
    """Fails if a cell is missing, stands in another row or column than its settings say, if the
    grid falls apart with a reload, or if its one picture does not lead back to it.
    """
    page = open_page()
    fill(page, "fox", 4, None)
    draw_grid(page, axis, values, "1-2, 7")
    run_ends(page)
    drawn = {(body[field], body["seed"], body["n"]) for body in behaviour.requests}
    assert drawn == {(value, seed, 1) for value in sent for seed in (1, 2, 7)}
    labels = names(page)
    page.reload()
    expect(page.locator(".tile-open")).to_have_count(6)
    assert names(page) == labels
    assert ["seed 1" in label for label in labels] == [True, False, False] * 2
    expect(page.locator(".run")).to_have_count(1)
    places = page.locator(".frame").evaluate_all(
        "all => all.map(f => f.getBoundingClientRect()).map(({x, y}) => [x, y])"
    )
    assert [x for x, _ in places[:3]] == [x for x, _ in places[3:]]
    assert len({y for _, y in places}) == 2
    name, content = saved(page, page.get_by_role("button", name="Download the grid").click)
    assert name.endswith("_grid.png")
    with Image.open(io.BytesIO(content)) as sheet:
        assert 3 * SIZE < sheet.width < 4 * SIZE
        assert 2 * SIZE < sheet.height < 3 * SIZE
    behaviour.requests.clear()
    (tmp_path / name).write_bytes(content)
    drop(page, tmp_path / name)
    expect(page.locator("#toast")).to_have_text("The form has this grid")
    page.keyboard.press("Enter")
    run_ends(page, count=1)
    assert {(body[field], body["seed"], body["n"]) for body in behaviour.requests} == drawn


def test_a_grid_that_cannot_be_is_told_at_its_fields(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a slip in a list draws something else, or a thousand pictures are asked for."""
    page = open_page()
    fill(page, "fox", 1, None)
    for axis, values, seeds, field, told in (
        ("Guidance", "1, 2000", "1", "Values", "2000: From 0 to 1000."),
        ("Guidance", "", "1", "Values", "Values with commas between them."),
        ("Class", "fox, dgo", "1", "Values", "Did you mean dog?"),
        ("Guidance", "1", "4-1", "Seeds, from column to column", "Seeds such as 1-4"),
        ("Guidance", "1", "x", "Seeds, from column to column", "A number is needed here."),
        ("Guidance", "1 2 3", "1-30", "Seeds, from column to column", "at most 64"),
    ):
        draw_grid(page, axis, values, seeds)
        marked = page.get_by_label(field)
        expect(marked).to_have_attribute("aria-invalid", "true")
        description = marked.get_attribute("aria-describedby") or ""
        expect(page.locator(f"#{description}")).to_contain_text(told)
    assert behaviour.requests == []


def test_a_grid_waits_its_turn_and_can_be_cancelled(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a grid takes more than four streams, or goes on when it was cancelled."""
    behaviour.hold_at_row = 2
    page = open_page()
    fill(page, "fox", 1, None)
    draw_grid(page, "Guidance", "1 2 3", "1-4")
    expect(page.locator(".frame")).to_have_count(12)
    ask(page, "owl", 1)
    expect(page.locator(".queue-line")).to_contain_text("owl")
    assert len(behaviour.requests) == 4
    expect(page.locator(".run-state")).to_have_text("0 of 12 complete")
    page.get_by_role("button", name="Cancel: fox").click()
    expect(page.locator(".queue-line")).to_have_count(0)
    behaviour.hold_at_row = None
    run_ends(page)
    assert len(behaviour.requests) == 5


def test_two_pictures_stand_side_by_side_with_what_differs(open_page: OpenPage) -> None:
    """Fails if the pair is not the one that was selected, or equal facts are marked."""
    page = open_page()
    ask(page, "fox", 1, 7)
    run_ends(page)
    page.get_by_label("Guidance", exact=True).fill("2")
    ask(page, "fox", 1, 7)
    run_ends(page, count=2)
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("s")
    for box in page.get_by_label("Select fox").all():
        expect(page.locator("#selection-compare")).to_be_disabled()
        box.check()
    page.keyboard.press("v")
    expect(page.locator("#pair")).to_be_visible()
    expect(page.locator("#pair img")).to_have_count(2)
    terms = page.locator("#pair .differs dt").all_inner_texts()
    assert "Guidance" in terms
    assert not {"Class", "Seed", "Model"} & set(terms)


def test_the_large_view_zooms_to_the_pixel(open_page: OpenPage) -> None:
    """Fails if 1:1 is not one pixel for one, or is blurred."""
    page = open_page()
    ask(page, "fox", 2, 7)
    run_ends(page)
    page.locator(".tile-open").first.click()
    image = page.locator("#viewer-image")
    width = "image => image.getBoundingClientRect().width"
    assert image.evaluate(width) > 2 * SIZE
    page.keyboard.press("1")
    assert image.evaluate(width) == SIZE / page.evaluate("devicePixelRatio")
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    expect(page.locator("#viewer-zoom")).to_have_attribute("aria-pressed", "true")
    image.click()
    assert image.evaluate(width) > 2 * SIZE


def test_pictures_are_swiped_and_walked_through(open_page: OpenPage) -> None:
    """Fails if a finger or the arrows do not get to the next picture."""
    page = open_page()
    ask(page, "fox", 3, 7)
    run_ends(page)
    page.locator(".tile-open").first.click()
    swipe = """(image, by) => {
        const at = (kind, clientX) => image.dispatchEvent(
            new PointerEvent(kind, { clientX, pointerType: "touch", bubbles: true }));
        at("pointerdown", 200);
        at("pointerup", 200 + by);
    }"""
    image = page.locator("#viewer-image")
    for act, place in (
        (lambda: image.evaluate(swipe, -90), "2 of 3"),
        (lambda: page.keyboard.press("ArrowRight"), "3 of 3"),
        (lambda: image.evaluate(swipe, 90), "2 of 3"),
        (lambda: image.evaluate(swipe, -10), "2 of 3"),
        (lambda: page.keyboard.press("ArrowLeft"), "1 of 3"),
    ):
        act()
        assert facts(page)["Picture"] == place


def test_a_picture_is_copied(open_page: OpenPage) -> None:
    """Fails if what is copied is not the picture, or if a refusal is silent."""
    page = open_page()
    ask(page, "fox", 1, 7)
    run_ends(page)
    page.locator(".tile-open").first.click()
    page.evaluate(
        """() => {
            navigator.clipboard.write = async ([item]) => {
                const blob = await item.getType("image/png");
                window.copied = (await createImageBitmap(blob)).width;
            };
        }"""
    )
    page.keyboard.press("c")
    expect(page.locator("#toast")).to_have_text("The picture is copied")
    assert page.evaluate("copied") == SIZE
    page.evaluate("() => { navigator.clipboard.write = () => Promise.reject(new Error('no')); }")
    page.get_by_role("button", name="Copy picture").click()
    expect(page.locator("#toast")).to_contain_text("download it instead")
