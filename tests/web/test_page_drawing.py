"""Runs on the page: pictures appear row by row, are kept, cancelled, and refused."""

import re

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_browser import OpenPage, ask, eventually, facts, names, run_ends
from page_stand_in import GRID, SIZE, Behaviour, Refusal
from playwright.sync_api import Page, expect

ALPHAS = """(canvas) => {
    const offscreen = new OffscreenCanvas(canvas.width, canvas.height);
    const copy = offscreen.getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(canvas.width / 2, 0, 1, canvas.height);
    return [...data].filter((_, at) => at % 4 === 3);
}"""


def rows_in_sight(page: Page, tile: int = 0) -> int:
    """How many token rows of a tile's canvas are opaque, read from its pixels; what is below them
    has to be clear.
    """
    alphas = page.locator(".tile canvas").nth(tile).evaluate(ALPHAS)
    lines = sum(alpha == 255 for alpha in alphas)
    assert alphas == [255] * lines + [0] * (SIZE - lines)
    return lines * GRID // SIZE


def test_every_picture_appears_once_and_is_kept_with_its_settings(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a picture is lost between the stream and the gallery, stands on the page twice, or
    is shown with other settings than its own.
    """
    page = open_page()
    page.locator("#more summary").click()
    page.get_by_label("Temperature", exact=True).fill("0.9")
    page.get_by_label("Top-k", exact=True).fill("50")
    ask(page, "fox", 3, 7)
    run_ends(page)
    widths = page.locator(".tile img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert widths == [SIZE] * 3
    sent = {
        "class_label": 7,
        "n": 3,
        "seed": 7,
        "cfg_scale": 4,
        "cfg_interval": -1,
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 1,
    }
    assert behaviour.requests == [sent]
    assert names(page) == [f"fox, {k} of 3, seed 7" for k in (1, 2, 3)]
    assert page.locator("main img:visible").count() == 3
    assert page.locator("img:not([alt])").count() == 0

    page.locator(".tile-open").nth(1).click()
    expected = {
        "Class": "fox (7)",
        "Seed": "7",
        "Picture": "2 of 3",
        "Guidance": "4",
        "Temperature": "0.9",
        "Top-k": "50",
        "Model": "GPT-demo",
    }
    assert expected.items() <= facts(page).items()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer dl")).to_contain_text("3 of 3")


def test_rows_appear_as_they_are_drawn_and_nothing_below_them(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a preview is not shown, if the filler below the drawn rows is, or if the page jumps
    when a picture is whole.
    """
    page = open_page()
    ask(page, "bee", 1)
    run_ends(page)
    behaviour.hold_at_row = 3
    ask(page, "volcano", 2)
    seen = []
    for row in (3, 8, 13):
        behaviour.hold_at_row = row
        expect(page.locator(f'.tile[data-rows="{row}"]')).to_have_count(2)
        seen.append((rows_in_sight(page, 0), rows_in_sight(page, 1)))
        state = page.locator(".run[data-state=drawing] .run-state")
        expect(state).to_contain_text(f"Row {row} of {GRID}")
    assert seen == [(3, 3), (8, 8), (13, 13)]
    expect(state).to_contain_text("left")
    assert page.locator(".run[data-state=drawing] progress").evaluate("b => b.value") == 13 / GRID
    assert page.title().startswith("81 %")

    places = ".frame, .run-facts, #gallery-title"
    boxes = "all => all.map(e => e.getBoundingClientRect().toJSON())"
    before = page.locator(places).evaluate_all(boxes)
    behaviour.hold_at_row = None
    run_ends(page, count=2)
    assert page.locator(places).evaluate_all(boxes) == before
    assert page.title() == "LlamaGen"


def test_rows_are_counted_by_tokens_where_previews_are_rare(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a run says "Row 1" because that was its last preview, where all pictures are at row
    5, as on a CPU.
    """
    behaviour.preview_every, behaviour.hold_at_row = 16, 5
    page = open_page()
    ask(page, "fox", 3)
    expect(page.locator(".run-state")).to_contain_text(f"Row 5 of {GRID}")
    assert page.locator('.tile[data-rows="0"]').count() == 3


def test_how_many_wait_ahead_is_told(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if somebody in the server's queue is shown nothing, or if the live region does not say
    so.
    """
    behaviour.ahead = 3
    page = open_page()
    ask(page)
    expect(page.locator(".run-state")).to_have_text("Waiting: 3 requests ahead")
    expect(page.locator("#announcer")).to_have_text("fox: Waiting: 3 requests ahead")
    behaviour.ahead = 0
    run_ends(page)


@pytest.mark.parametrize("way", ["button", "escape"])
def test_cancel_reaches_the_server_and_leaves_no_empty_frames(
    open_page: OpenPage, behaviour: Behaviour, way: str
) -> None:
    """Fails if a cancelled drawing goes on at the server, if the page does not say that it was
    cancelled, or if frames without a picture stay.
    """
    page = open_page()
    behaviour.hold_at_image = 1
    ask(page, "owl", 3)
    expect(page.locator(".tile-open")).to_have_count(1)
    cancel = page.get_by_role("button", name="Cancel: owl")
    if way == "button":
        cancel.click()
        expect(page.get_by_role("button", name="Again with another seed")).to_be_focused()
    else:
        page.get_by_label("Class", exact=True).focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Escape")  # closes the list, and nothing else
        expect(page.locator("#class-popup")).to_be_hidden()
        assert cancel.is_visible()
        page.keyboard.press("Escape")
    assert eventually(lambda: behaviour.cancelled == ["job-1"] and behaviour.disconnects == 1)
    run_ends(page, "cancelled")
    expect(page.locator(".frame")).to_have_count(1)
    expect(page.locator(".run-state")).to_have_text("Cancelled · 1 picture complete")


def test_a_run_that_is_cancelled_without_a_picture_leaves_nothing(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if an empty strip stays, or the focus is lost with the button that was pressed."""
    behaviour.hold_at_row = 2
    page = open_page()
    ask(page, "owl", 3)
    page.get_by_role("button", name="Cancel: owl").click()
    expect(page.locator(".run")).to_have_count(0)
    expect(page.locator("#generate")).to_be_focused()
    expect(page.locator("#welcome")).to_be_visible()


PERMANENT = (
    (Refusal(400, "this cannot be drawn"), "does not accept these settings.*This cannot be drawn"),
    (Refusal(500, "out of memory"), "The server failed.*Out of memory"),
    (Refusal(502, html=True), "The server failed.*only the number 502"),
    (Refusal(413, "the body is too long"), "The server refused this.*The body is too long"),
)


def test_a_refusal_is_told_in_words(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if an error is silent, or shown as the JSON or HTML that it came in; if there is no way
    on from it; or if it stays when that way was taken.
    """
    page = open_page()
    for count, (refusal, told) in enumerate(PERMANENT):
        behaviour.refusal = refusal
        ask(page)
        alert = page.locator(".run [role=alert]:visible")
        expect(alert).to_be_visible()
        assert re.search(told, alert.inner_text(), re.DOTALL)
        assert not re.search(r"[{}<>]", page.locator("main").inner_text())
        behaviour.refusal = None
        alert.get_by_role("button", name="Try again").click()
        run_ends(page, count=count + 1)
        expect(alert).to_have_count(0)
    assert all(body == behaviour.requests[0] for body in behaviour.requests)
    behaviour.refusal = PERMANENT[0][0]
    ask(page)
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator(".run[data-state=failed]")).to_have_count(0)


def test_a_stream_that_breaks_off_keeps_what_was_whole(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a lost connection looks like a drawing that goes on for ever."""
    page = open_page()
    behaviour.cut_at_row = 5
    ask(page)
    run_ends(page, "failed")
    alert = page.locator(".run [role=alert]")
    expect(alert).to_contain_text("The connection was lost while drawing.")
    expect(page.locator(".run-state")).to_have_text("Not finished")


def test_a_connection_that_breaks_off_once_is_taken_up_again(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a network that is away for a moment costs a drawing that the server goes on with."""
    page = open_page()
    behaviour.cut_at_row, behaviour.cuts_left = 5, 1
    ask(page)
    run_ends(page)
    assert behaviour.followed == ["job-1"]
    assert len(behaviour.requests) == 1


def test_a_failure_in_the_stream_is_told(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if what the server says at the end of a drawing is lost."""
    page = open_page()
    behaviour.fail_at_row = 5
    ask(page)
    alert = page.locator(".run [role=alert]")
    expect(alert).to_contain_text("The drawing failed.Logits were not finite.")


def test_again_draws_the_same_with_another_seed(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if "again" forgets a setting, keeps the seed, or takes what happens to stand in the
    form.
    """
    page = open_page()
    page.get_by_label("Guidance", exact=True).fill("3.5")
    ask(page, "fox", 2, 7)
    run_ends(page)
    page.get_by_label("Guidance", exact=True).fill("1")
    page.get_by_role("button", name="Again with another seed").click()
    run_ends(page, count=2)
    page.locator(".tile-open").last.click()
    page.locator("#viewer").get_by_role("button", name="Again with another seed").click()
    expect(page.locator("#viewer")).to_be_hidden()
    run_ends(page, count=3)
    assert len({body.pop("seed") for body in behaviour.requests}) == 3
    assert behaviour.requests[0] == behaviour.requests[1] == behaviour.requests[2]
    assert behaviour.requests[0]["cfg_scale"] == 3.5


def test_an_empty_seed_is_another_one_each_time(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if the page leaves the seed to the server, and so could not say it before the end."""
    page = open_page()
    for count in (1, 2):
        ask(page, seed=None)
        run_ends(page, count=count)
    seeds = [body["seed"] for body in behaviour.requests]
    assert len(set(seeds)) == 2
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_largest_seed_is_never_cut(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if a seed of 63 bits is rounded, as JavaScript's numbers are, or shown in part."""
    page = open_page()
    largest = 2**63 - 1
    ask(page, "fox", 1, largest)
    run_ends(page)
    page.reload()
    expect(page.locator(".run-facts")).to_have_text(f"guidance 4 · seed {largest}")
    cut = page.locator(".run-facts").evaluate("f => f.scrollWidth > f.clientWidth")
    assert not cut
    page.get_by_role("button", name="Generate").click()
    run_ends(page)
    page.locator(".tile-open").first.click()
    assert facts(page)["Seed"] == str(largest)
    assert [body["seed"] for body in behaviour.requests] == [largest, largest]
