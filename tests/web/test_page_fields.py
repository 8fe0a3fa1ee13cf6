"""The form of the page: classes, numbers and their limits, and what is wrong with them."""

import re

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_browser import OpenPage, ask, fill, generate, run_ends, words
from page_stand_in import Behaviour, Refusal
from playwright.sync_api import expect

LABELS = {
    "class_label": "Class",
    "n": "Pictures",
    "seed": "Seed",
    "cfg_scale": "Guidance",
    "cfg_interval": "Guidance interval",
    "temperature": "Temperature",
    "top_k": "Top-k",
    "top_p": "Top-p",
}


def test_the_field_that_the_server_objects_to_is_marked_by_its_name_on_the_page(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if somebody has to guess which of the fields is wrong, the hidden ones included."""
    page = open_page()
    for param, label in LABELS.items():
        page.locator("#more").evaluate("more => { more.open = false; }")
        behaviour.refusal = Refusal(400, f"{param} must be less", param)
        ask(page)
        marked = page.locator("[aria-invalid]")
        expect(marked).to_be_focused()
        expect(marked).to_have_attribute("id", "class" if param == "class_label" else param)
        expect(marked).to_have_accessible_description(words(f"{label} must be less"))
        expect(page.locator(".run")).to_have_count(0)
        marked.fill("1")
        expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_what_cannot_be_right_is_not_sent(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if the page sends what it could see to be wrong by the server's limits, or marks it
    without a word.
    """
    page = open_page()
    page.locator("#more summary").click()
    for label, value, told in (
        ("Class", "", "Choose a class."),
        ("Class", "unicorn", "There is no class like “unicorn”."),
        ("Class", "dgo", "There is no class like “dgo”. Did you mean dog?"),
        ("Class", "p", "classes fit “p”: choose one."),
        ("Pictures", "11", "From 1 to 10."),
        ("Pictures", "", "A number is needed here."),
        ("Seed", "1.5", "A whole number is needed here."),
        ("Seed", str(2**63), f"From 0 to {2**63 - 1}."),
        ("Guidance", "1001", "From 0 to 1000."),
        ("Guidance interval", "-2", f"From -1 to {2**31 - 1}."),
        ("Temperature", "-1", "From 0 to 1e+38."),
        ("Top-p", "0", "Above 0 and at most 1."),
        ("Top-k", "2.5", "A whole number is needed here."),
    ):
        page.get_by_role("button", name="Back to the model's settings").click()
        fill(page, "fox", 1, 7)
        field = page.get_by_label(label, exact=True)
        field.fill(value)
        field.press("Escape")
        generate(page)
        expect(field).to_be_focused()
        expect(field).to_have_accessible_description(words(told))
    assert behaviour.requests == []


def test_everything_that_is_wrong_is_told_at_once(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if somebody mends one field only to be told of the next."""
    page = open_page()
    fill(page, "dgo", 99)
    page.get_by_label("Guidance", exact=True).fill("-3")
    page.locator("#more summary").click()
    page.get_by_label("Top-p", exact=True).fill("2")
    page.locator("#more summary").click()
    generate(page)
    marked = page.locator("[aria-invalid]:visible").evaluate_all("all => all.map(i => i.id)")
    assert marked == ["class", "n", "cfg_scale", "top_p"]
    expect(page.get_by_label("Class", exact=True)).to_be_focused()
    page.get_by_label("Pictures", exact=True).fill("3")
    expect(page.locator("[aria-invalid]")).to_have_count(3)  # only its own error has gone
    assert behaviour.requests == []


def test_a_service_without_a_description_decides_itself(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if the page wants the description, which --disable-docs removes; or links to it."""
    behaviour.described = False
    page = open_page()
    expect(page.locator("#api-link")).to_be_hidden()
    page.get_by_label("Guidance", exact=True).fill("2000")
    ask(page)
    run_ends(page)
    assert behaviour.requests[0]["cfg_scale"] == 2000


def test_a_class_is_found_by_name_and_by_id(open_page: OpenPage) -> None:
    """Fails if the combobox leaves the ARIA pattern, or the closest match is not the first."""
    page = open_page()
    field = page.get_by_role("combobox", name="Class")
    field.click()
    expect(field).to_have_attribute("aria-expanded", "true")
    expect(page.locator("#class-list [role=option]")).to_have_count(64)
    for typed, first in (
        ("ele", "elephant"),
        ("BALL", "balloon"),
        ("7", "fox"),
        ("  Soccer_b", "soccer ball"),
    ):
        field.fill(typed)
        option = page.locator("#class-list [role=option]").first
        expect(option.locator(".option-name")).to_have_text(first)
        expect(field).to_have_attribute("aria-activedescendant", option.get_attribute("id") or "")
    field.fill("zzz")
    expect(page.locator("#class-empty")).to_have_text("No class like “zzz”")
    field.fill("p")
    field.press("ArrowDown")
    field.press("ArrowUp")
    field.press("ArrowUp")  # from the first to the last
    last = page.locator("#class-list [role=option]").last
    expect(field).to_have_attribute("aria-activedescendant", last.get_attribute("id") or "")
    name = last.locator(".option-name").inner_text()
    field.press("Enter")
    expect(field).to_have_value(name)
    expect(field).to_have_attribute("aria-expanded", "false")
    field.press("ArrowDown")
    expect(page.locator("[role=option][aria-selected=true]")).to_have_text(re.compile(name))
    field.press("Escape")
    expect(field).to_have_value(name)


def test_near_misses_of_a_class_are_offered(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if a slip of the finger finds nothing, or is drawn as something else unasked."""
    page = open_page()
    field = page.get_by_role("combobox", name="Class")
    for typed, meant in (("dgo", "dog"), ("elepant", "elephant"), ("socer", "soccer ball")):
        field.fill(typed)
        expect(
            page.locator("#class-list [role=option]").locator(".option-name").first
        ).to_have_text(meant)
        expect(page.locator("#class-empty")).to_contain_text("Did you mean one of these?")
    field.fill("dgo")
    field.press("Enter")
    expect(field).to_have_value("dgo")
    field.press("ArrowDown")
    field.press("ArrowDown")
    field.press("Enter")
    expect(field).to_have_value("dog")


def test_the_distance_of_words_is_right(open_page: OpenPage) -> None:
    page = open_page()
    pairs = [["", "ab"], ["dgo", "dog"], ["fox", "fox"], ["kitten", "sitting"], ["abc", "ca"]]
    code = """async (pairs) => {
        const { distance } = await import("/static/combobox.js");
        return pairs.map(([one, other]) => distance(one, other));
    }"""
    assert page.evaluate(code, pairs) == [2, 1, 0, 3, 3]


def test_classes_that_were_drawn_have_a_picture_in_the_list(open_page: OpenPage) -> None:
    """Fails if the list shows no picture, a broken one, or that of another class."""
    page = open_page()
    ask(page, "fox", 1)
    run_ends(page)
    page.get_by_role("combobox", name="Class").fill("o")
    pictures = page.locator(".option-picture:visible")
    expect(pictures).to_have_count(1)
    expect(page.locator("#class-list [role=option]").filter(has=pictures)).to_contain_text("fox")
    source = page.locator(".tile img").get_attribute("src")
    expect(pictures).to_have_css("background-image", f'url("{source}")')


def test_the_demo_classes_have_a_picture_in_the_list(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a class of the demo model is shown by no picture, or by another class's."""
    behaviour.class_pictures = "static/demo_classes.webp"
    page = open_page()
    chips = page.locator(".chip")
    expect(chips.locator(".option-picture:visible")).to_have_count(6)
    page.get_by_role("combobox", name="Class").fill("snowman")
    picture = page.locator("#class-list .option-picture:visible")
    style = picture.evaluate(
        """node => {
            const style = getComputedStyle(node);
            const numbers = (text) => text.match(/[0-9.]+/g).map(Number);
            const [size, place] = [style.backgroundSize, style.backgroundPosition].map(numbers);
            return { size, place, image: style.backgroundImage };
        }"""
    )
    assert style["image"].endswith('/static/demo_classes.webp")')
    assert style["size"] == [1600, 400]
    # class 59 is the 12th of 16 from the left, and in the last of four rows
    assert style["place"] == pytest.approx([100 * 11 / 15, 100], abs=0.01)
