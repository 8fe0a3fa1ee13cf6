"""The page for everyone: keys, contrast, motion, small screens, screen readers."""

import re
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_browser import OpenPage, ask, fill, generate, is_firefox, run_ends
from page_stand_in import Behaviour, Refusal
from playwright.sync_api import Page, expect

CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const read = (colour) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return canvas.getImageData(0, 0, 1, 1).data;
    };
    const luminance = ([r, g, b]) => {
        const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [x, y, z] = [r, g, b].map((v) => linear(v / 255));
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const colour = read(getComputedStyle(at).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255];
    };
    const poor = [];
    for (const node of document.querySelectorAll("body *")) {
        const isText = (child) => child.nodeType === 3 && child.data.trim();
        const speaks = [...node.childNodes].some(isText);
        if (!speaks || !node.checkVisibility() || node.closest(".visually-hidden")) continue;
        const one = luminance(read(getComputedStyle(node).color));
        const other = luminance(behind(node));
        const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        const told = `${node.className || node.tagName}: ${node.textContent.slice(0, 30)}`;
        if (ratio < 4.5) poor.push(`${told} ${ratio.toFixed(2)}`);
    }
    return poor;
}"""


def test_everything_can_be_done_from_the_keyboard(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if the way from an empty form to a deleted picture needs a mouse, or the focus gets
    lost on it.
    """
    page = open_page()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "class":
            break
    page.keyboard.type("fo")
    page.keyboard.press("Enter")
    assert behaviour.requests == []  # the first Enter only chooses
    page.keyboard.press("Control+Enter")
    run_ends(page)
    assert behaviour.requests[0]["class_label"] == 7
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "tile-open":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".tile-open").first).to_be_focused()
    page.keyboard.press("Delete")
    expect(page.locator(".tile")).to_have_count(3)
    expect(page.locator(".tile-open").first).to_be_focused()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Meta+Enter")
    expect(page.locator(".tile")).to_have_count(7)


@pytest.mark.parametrize("width", [320, 360])
def test_nothing_is_wider_than_a_phone(
    open_page: OpenPage, behaviour: Behaviour, width: int
) -> None:
    """Fails if the page scrolls sideways at any stage, or a control is too small for a thumb."""
    page = open_page(viewport={"width": width, "height": 720}, has_touch=True, is_mobile=True)

    def fits() -> bool:
        return bool(
            page.evaluate("document.documentElement.scrollWidth <= innerWidth && innerWidth")
            == width
        )

    assert fits()
    page.locator("#more summary").click()
    assert fits()
    heights = page.locator("#composer button:visible, .chip").evaluate_all(
        "all => all.map(b => b.getBoundingClientRect().height)"
    )
    assert min(heights) >= 32
    behaviour.hold_at_row = 5
    ask(page, "fox", 4)
    expect(page.locator('.tile[data-rows="5"]')).to_have_count(4)
    expect(page.get_by_role("button", name="Cancel: fox")).to_be_in_viewport()
    assert fits()
    behaviour.hold_at_row = None
    run_ends(page)
    assert fits()
    page.locator(".tile-open").first.click()
    assert fits()
    assert page.locator("#viewer").evaluate("v => v.scrollWidth <= v.clientWidth")
    page.keyboard.press("Escape")
    behaviour.refusal = Refusal(500, "x" * 200)
    ask(page, "bee")
    expect(page.locator(".run [role=alert]:visible")).to_be_visible()
    assert fits()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_dark(
    open_page: OpenPage, behaviour: Behaviour, scheme: str
) -> None:
    """Fails below WCAG AA's contrast of 4.5, and if the page does not follow the system."""
    page = open_page(color_scheme=scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.locator("#more summary").click()
    assert page.evaluate(CONTRASTS) == []
    ask(page)
    run_ends(page)
    assert page.evaluate(CONTRASTS) == []
    page.locator(".tile-open").first.click()
    assert page.evaluate(CONTRASTS) == []
    page.keyboard.press("Escape")
    behaviour.refusal = Refusal(400, "top_p is wrong", "top_p")
    ask(page)
    expect(page.locator("#top_p-error")).to_be_visible()
    assert page.evaluate(CONTRASTS) == []
    behaviour.refusal = Refusal(429, "full")
    ask(page)
    expect(page.locator("#queue")).to_be_visible()
    assert page.evaluate(CONTRASTS) == []


def test_the_chosen_theme_is_remembered(open_page: OpenPage) -> None:
    """Fails if a choice is lost, or if there is no way back to what the system has."""
    page = open_page(color_scheme="light")
    root = page.locator("html")
    page.get_by_role("button", name="Theme: as the system").click()
    expect(root).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(root).to_have_attribute("data-theme", "dark")
    page.get_by_role("button", name="Theme: dark").click()
    page.emulate_media(color_scheme="dark")
    expect(root).to_have_attribute("data-theme", "light")
    page.get_by_role("button", name="Theme: light").click()
    page.get_by_role(
        "button", name="Theme: dark"
    ).click()  # the last of the three: as the system again
    expect(root).to_have_attribute("data-theme", "dark")
    page.emulate_media(color_scheme="light")
    expect(root).to_have_attribute("data-theme", "light")


def test_nothing_moves_for_those_who_asked_for_calm(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    page = open_page(reduced_motion="reduce")
    behaviour.hold_at_row = 5
    ask(page)
    expect(page.locator('.tile[data-rows="5"]')).to_have_count(2)
    assert page.evaluate("document.getAnimations().length") == 0


def test_every_control_has_a_name(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if a screen reader would say no more than "button" or "edit"."""
    page = open_page()
    ask(page)
    run_ends(page)
    page.locator("#more summary").click()
    controls = page.locator("button:visible, input:visible, progress:visible, canvas:visible").all()
    assert len(controls) > 25
    for control in controls:
        expect(control).to_have_accessible_name(re.compile(r"\w"))


AXE = Path(__file__).resolve().parents[1] / "axe" / "axe.min.js"
RUN_AXE = """async () => {
    const { violations } = await axe.run(document, { resultTypes: ["violations"] });
    return violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html.slice(0, 120))]);
}"""


def test_axe_finds_nothing(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if axe-core finds what hinders people, in any state of the page."""
    page = open_page()
    if is_firefox(page):
        pytest.skip("Firefox ESR under BiDi ends while axe-core runs")
    page.evaluate(AXE.read_text())

    def check() -> None:
        assert page.evaluate(RUN_AXE) == []

    check()
    page.locator("#more summary").click()
    page.locator("#grid summary").click()
    fill(page, "dgo", 99)
    check()  # with an open list
    generate(page)
    check()
    page.get_by_role("button", name="Back to the model's settings").click()
    behaviour.hold_at_row = 3
    for name in ("fox", "owl", "bee", "cat", "dog"):
        ask(page, name, 1)
    expect(page.locator(".run[data-state=drawing]")).to_have_count(4)
    check()
    behaviour.hold_at_row = None
    run_ends(page, count=5)
    page.get_by_role("button", name="Select", exact=True).click()
    for box in page.locator("[data-action=select]").all()[:2]:
        box.check()
    check()
    page.get_by_role("button", name="Side by side").click()
    check()
    page.keyboard.press("Escape")
    page.locator(".tile-open").first.click()
    check()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Help").click()
    check()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Save", exact=True).click()
    check()
    page.keyboard.press("Escape")
    behaviour.refusal = Refusal(500, "out of memory")
    ask(page, "pig", 1)
    expect(page.locator(".run [role=alert]:visible")).to_be_visible()
    check()


def test_every_action_has_a_key_that_the_help_lists(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a key does nothing, does something while somebody types, or is not listed."""
    page = open_page()
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    shown = page.locator("#key-list dt").all_inner_texts()
    assert {"?", "/", "r", "Esc", "Ctrl+Enter", "Del", "1"} <= set(shown)
    marked = set(
        page.locator("[data-action]").evaluate_all("all => all.map(n => n.dataset.action)")
    )
    listed = page.evaluate(
        """async () => (await import("/static/shortcuts.js")).KEYS
            .flatMap(([, keys]) => keys.map(([action]) => action))"""
    )
    assert marked <= set(listed)
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    field = page.get_by_label("Class", exact=True)
    expect(field).to_be_focused()
    page.keyboard.type("r?")  # is typed
    expect(field).to_have_value("r?")
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("r")
    expect(page.locator("#class-id")).not_to_be_empty()
    page.keyboard.press("Control+Enter")
    run_ends(page)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Delete")  # no picture is in focus
    expect(page.locator(".tile-open")).to_have_count(4)
    page.keyboard.press("a")
    run_ends(page, count=2)
    assert behaviour.requests[0]["class_label"] == behaviour.requests[1]["class_label"]
    page.locator(".tile-open").nth(1).focus()
    page.keyboard.press("x")
    expect(page.locator("[data-action=select]").nth(1)).to_be_checked()
    page.keyboard.press("Backspace")
    expect(page.locator(".tile-open")).to_have_count(7)
    page.keyboard.press("u")
    expect(page.locator(".tile-open")).to_have_count(8)


def test_no_button_is_without_a_key(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if a button has no action, so that no key presses it, or if these keys do nothing."""
    page = open_page()
    ask(page, "owl", 2)
    run_ends(page)
    behaviour.refusal = Refusal(500, "out of memory")
    ask(page, "pig", 1)
    trouble = page.locator(".run [role=alert]:visible")
    expect(trouble).to_be_visible()
    # Enter and Escape press these: what is shown itself, and what is in lists, forms and dialogs.
    others = ".closes, .tile-open, .chip, .combobox-open, dialog form *, #key-form *, #clear-all"
    for kind in ("button", "summary", "a.button"):
        without = page.locator(f"{kind}:not([data-action], {others})")
        assert without.evaluate_all("all => all.map(b => b.outerHTML)") == []
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("n")
    expect(trouble).to_have_count(0)
    page.keyboard.press("+")
    expect(page.get_by_label("Pictures", exact=True)).to_have_value("2")
    page.keyboard.press("g")
    expect(page.get_by_role("button", name="Draw the grid")).to_be_visible()
    page.keyboard.press("c")
    expect(page.locator("#preset")).to_be_focused()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("D")
    expect(page.get_by_role("button", name="Delete all", exact=True)).to_be_visible()


def test_a_screen_reader_hears_progress_and_results(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if somebody who sees nothing does not hear how far a drawing is, and its end."""
    page = open_page()
    page.evaluate(
        """() => {
            window.heard = [];
            const region = document.getElementById("announcer");
            new MutationObserver(() => heard.push(region.textContent))
                .observe(region, { childList: true });
        }"""
    )
    behaviour.row_seconds = 0.02
    ask(page, "fox", 2)
    run_ends(page)
    heard = " | ".join(page.evaluate("heard"))
    assert re.search("Drawing 2 pictures of fox.*25 percent.*50 percent.*2 pictures of fox.", heard)


def overlaps(page: Page) -> list[str]:
    """Labels and hints of the form that Generate lies over."""
    found: list[str] = page.evaluate(
        """() => {
            const button = document.querySelector(".generate").getBoundingClientRect();
            const list = document.querySelector(".settings").getBoundingClientRect();
            const covered = (box) => box.bottom > button.top + 1 && box.top < button.bottom - 1;
            return [...document.querySelectorAll(".settings label, .settings .hint")]
                .filter((node) => node.checkVisibility())
                .filter((node) => covered(node.getBoundingClientRect()))
                .filter(() => list.bottom > button.top + 1)
                .map((node) => node.textContent);
        }"""
    )
    return found


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (844, 390), (390, 844), (1920, 1080)])
def test_generate_lies_over_nothing(open_page: OpenPage, width: int, height: int) -> None:
    """Fails if the button covers a field, cuts a label of the form as it is opened, or leaves no
    room for the fields.
    """
    page = open_page(viewport={"width": width, "height": height})
    assert overlaps(page) == []
    if height >= 800:
        expect(page.locator("#generate")).to_be_in_viewport(ratio=1)
        cut = page.locator(".settings").evaluate("box => box.scrollHeight > box.clientHeight + 1")
        assert not cut
    page.locator("#more summary").click()
    assert overlaps(page) == []
    page.evaluate("scrollTo(0, 300)")
    assert overlaps(page) == []


@pytest.mark.parametrize("width", [1280, 1920])
def test_the_header_and_the_panel_share_their_edges(open_page: OpenPage, width: int) -> None:
    """Fails if the header runs over the whole of a wide window, and what is below it does not."""
    page = open_page(viewport={"width": width, "height": 900})
    left = "node => node.getBoundingClientRect().left"
    right = "node => node.getBoundingClientRect().right"
    assert page.locator(".brand").evaluate(left) == page.locator("#composer").evaluate(left)
    edges = [page.locator(name).evaluate(right) for name in (".top-actions", ".content")]
    assert abs(edges[0] - edges[1]) < 1


def test_small_runs_stand_beside_each_other(open_page: OpenPage) -> None:
    """Fails if four runs of one picture take a screen each."""
    page = open_page(viewport={"width": 1280, "height": 800})
    for count, name in enumerate(("fox", "owl", "bee", "cat")):
        ask(page, name, 1)
        run_ends(page, count=count + 1)
    height = page.locator("#runs").evaluate("runs => runs.getBoundingClientRect().height")
    assert height < 400
