"""The web page in a real browser, against a stand-in of the service that draws, waits and fails as
it is told.
"""

import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the stand-in of the service needs FastAPI")
pytest.importorskip("uvicorn", reason="the stand-in of the service needs uvicorn")
pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_stand_in import GRID, SIZE, STATIC, Behaviour, Refusal, StandIn
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    expect,
    sync_playwright,
)

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

PATIENCE = 8000  # ms
# motion takes the time of a core
DESKTOP: dict[str, Any] = {
    "viewport": {"width": 1280, "height": 900},
    "reduced_motion": "reduce",
}


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    service = StandIn()
    yield service
    service.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--no-sandbox"]
        )
        yield started
        started.close()


@pytest.fixture
def behaviour(stand_in: StandIn) -> Iterator[Behaviour]:
    stand_in.reset()
    yield stand_in.behaviour
    stand_in.reset()


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, stand_in: StandIn, behaviour: Behaviour) -> Iterator[OpenPage]:
    """Opens the page in a browser of its own; fails if anything is said on the console, or asked of
    another server.
    """
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        # Chromium reports every status of 400 and above, which the page cannot prevent.
        if message.type in ("error", "warning") and not message.text.startswith(
            "Failed to load resource"
        ):
            wrong.append(message.text)

    def opened(*, wait: bool = True, beside: Page | None = None, **options: Any) -> Page:
        context = beside.context if beside else browser.new_context(**(DESKTOP | options))
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((stand_in.url, "blob:", "data:"))
                else wrong.append(request.url)
            ),
        )
        page.goto(stand_in.url)
        if wait:
            expect(page.locator(".chip").first).to_be_visible(timeout=PATIENCE)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page: Page, name: str = "fox", count: int = 2, seed: int | None = 7) -> None:
    """Fills in the form and generates."""
    page.get_by_label("Class", exact=True).fill(name)
    page.get_by_label("Pictures", exact=True).fill(str(count))
    page.get_by_label("Seed", exact=True).fill("" if seed is None else str(seed))
    page.get_by_role("button", name="Generate").click()


def run_ends(page: Page, state: str = "done") -> None:
    expect(page.locator(f".run[data-state={state}]")).to_be_visible(timeout=PATIENCE)


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + 5
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


ALPHAS = """(canvas) => {
    const offscreen = new OffscreenCanvas(canvas.width, canvas.height);
    const copy = offscreen.getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(canvas.width / 2, 0, 1, canvas.height);
    return [...data].filter((_, at) => at % 4 === 3);
}"""


def rows_in_sight(page: Page, card: int = 0) -> int:
    """How many token rows of a card's canvas are opaque, read from its pixels; what is below them
    has to be clear.
    """
    alphas = page.locator(".card canvas").nth(card).evaluate(ALPHAS)
    lines = sum(alpha == 255 for alpha in alphas)
    assert alphas == [255] * lines + [0] * (SIZE - lines)
    return lines * GRID // SIZE


def test_every_picture_appears_and_is_kept_with_its_settings(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a picture is lost between the stream, the stage and the gallery, or shown with other
    settings than its own.
    """
    page = open_page()
    page.locator("summary").click()
    page.get_by_label("Temperature", exact=True).fill("0.9")
    page.get_by_label("Top-k", exact=True).fill("50")
    ask(page, "fox", 3, 7)
    run_ends(page)
    expect(page.locator(".card img")).to_have_count(3)
    assert (
        page.locator(".card img").evaluate_all("all => all.map(i => i.naturalWidth)") == [SIZE] * 3
    )
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
    expect(page.locator(".tile")).to_have_count(3)
    expect(page.locator(".tile-words").first).to_have_text(re.compile("fox.*1 of 3 · seed 7"))
    assert (
        page.locator("img").evaluate_all("all => all.filter(i => !i.hasAttribute('alt')).length")
        == 0
    )

    page.locator(".tile-open").nth(1).click()
    facts = dict(
        zip(
            page.locator("#viewer dt").all_inner_texts(),
            page.locator("#viewer dd").all_inner_texts(),
            strict=True,
        )
    )
    expected = {
        "Class": "7",
        "Seed": "7",
        "Picture": "2 of 3",
        "Guidance": "4",
        "Temperature": "0.9",
        "Top-k": "50",
    }
    assert expected.items() <= facts.items()
    assert facts["Model"] == "GPT-demo"
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer dl")).to_contain_text("3 of 3")


def test_rows_appear_as_they_are_drawn_and_nothing_below_them(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a preview is not shown, if the filler below the drawn rows is, or if the page jumps
    when a picture is whole.
    """
    page = open_page(reduced_motion="no-preference")
    behaviour.hold_at_row = 3
    ask(page, "volcano", 2)
    seen = []
    for row in (3, 8, 13):
        behaviour.hold_at_row = row
        expect(page.locator(f'.card[data-rows="{row}"]')).to_have_count(2)
        seen.append((rows_in_sight(page, 0), rows_in_sight(page, 1)))
        expect(page.locator(".run-state")).to_contain_text(f"{100 * row // GRID} %")
    assert seen == [(3, 3), (8, 8), (13, 13)]
    expect(page.locator(".run-state")).to_contain_text("left")
    assert page.locator(".run progress").evaluate("bar => bar.value") == 13 / GRID
    assert page.title().startswith("81 %")

    places = ".frame, .run-progress, #gallery-title"
    boxes = page.locator(places).evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().toJSON())"
    )
    behaviour.hold_at_row = None
    run_ends(page)
    after = page.locator(places).evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().toJSON())"
    )
    assert [box["top"] for box in boxes] == [box["top"] for box in after]
    assert page.title() == "LlamaGen"


def test_how_many_wait_ahead_is_told(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if somebody in the queue is shown nothing, or if the live region does not say so."""
    behaviour.ahead = 3
    page = open_page()
    ask(page)
    expect(page.locator(".run-state")).to_have_text("Waiting: 3 requests ahead")
    expect(page.locator("#announcer")).to_have_text("fox: Waiting: 3 requests ahead")
    behaviour.ahead = 0
    run_ends(page)


@pytest.mark.parametrize("way", ["button", "escape"])
def test_cancel_reaches_the_server(open_page: OpenPage, behaviour: Behaviour, way: str) -> None:
    """Fails if a cancelled drawing goes on at the server, or if the page does not say that it was
    cancelled.
    """
    page = open_page()
    behaviour.hold_at_image = 1
    ask(page, "owl", 3)
    expect(page.locator(".tile")).to_have_count(1)
    if way == "button":
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("button", name="Again with another seed")).to_be_focused()
    else:
        page.get_by_label("Class", exact=True).focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Escape")  # closes the list, and nothing else
        expect(page.locator("#class-popup")).to_be_hidden()
        assert page.get_by_role("button", name="Cancel").is_visible()
        page.keyboard.press("Escape")
    assert eventually(lambda: behaviour.disconnects == 1)
    run_ends(page, "cancelled")
    assert page.locator(".card-state").all_inner_texts() == ["Picture 1", "Cancelled", "Cancelled"]
    expect(page.locator(".run-state")).to_have_text("Cancelled · 1 picture complete")
    expect(page.locator(".tile")).to_have_count(1)


REFUSALS = (
    (
        Refusal(429, "queue_full", headers={"Retry-After": "12"}),
        r"The queue is full.*room in 12 seconds.*Try again \(1\d s\)",
    ),
    (Refusal(429, "queue_full"), "The queue is full.*Try again in a moment"),
    (
        Refusal(429, "no key is tried", headers={"Retry-After": "6"}, code="too_many_wrong_keys"),
        r"Too many wrong keys came from your address.*few seconds.*Try again \(\d s\)",
    ),
    (Refusal(503, "the engine is stopping"), "The server is not ready yet.*The engine is stopping"),
    (Refusal(400, "this cannot be drawn"), "does not accept these settings.*This cannot be drawn"),
    (Refusal(500, "out of memory"), "The server failed.*Out of memory"),
    (Refusal(502, html=True), "The server failed.*only the number 502"),
    (Refusal(413, "the body is too long"), "The server refused this.*The body is too long"),
)


def test_a_refusal_is_told_in_words(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if an error is silent, or shown as the JSON or HTML that it came in; or if there is no
    way on from it.
    """
    page = open_page()
    for refusal, words in REFUSALS:
        behaviour.refusal = refusal
        ask(page)
        alert = page.locator(".run [role=alert]")
        expect(alert).to_be_visible()
        assert re.search(words, alert.inner_text(), re.DOTALL)
        assert not re.search(r"[{}<>]", page.locator("main").inner_text())
        behaviour.refusal = None
        alert.get_by_role("button", name="Try again").click()
        run_ends(page)
    assert all(body == behaviour.requests[0] for body in behaviour.requests)


def test_the_field_that_the_server_objects_to_is_marked(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if somebody has to guess which of the fields is wrong, the hidden ones included."""
    page = open_page()
    for param in (
        "class_label",
        "n",
        "seed",
        "cfg_scale",
        "cfg_interval",
        "temperature",
        "top_k",
        "top_p",
    ):
        page.locator("#more").evaluate("more => { more.open = false; }")
        behaviour.refusal = Refusal(400, f"{param} is out of range", param)
        ask(page)
        marked = page.locator("[aria-invalid]")
        expect(marked).to_be_focused()
        expect(marked).to_have_attribute("id", "class" if param == "class_label" else param)
        expect(marked).to_have_accessible_description(
            re.compile(f"{param} is out of range", re.IGNORECASE)
        )
        expect(page.locator(".run")).to_have_count(0)
        marked.fill("1")
        expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_what_cannot_be_right_is_not_sent(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if the page sends what it could see to be wrong, or marks it without a word."""
    page = open_page()
    for label, value, words in (
        ("Class", "", "Choose a class."),
        ("Class", "unicorn", "There is no class like “unicorn”."),
        ("Class", "p", "classes fit “p”: choose one."),
        ("Pictures", "11", "From 1 to 10."),
        ("Pictures", "", "A number is needed here."),
        ("Seed", "1.5", "A whole number is needed here."),
    ):
        page.get_by_label("Class", exact=True).fill("fox")
        page.get_by_label("Pictures", exact=True).fill("1")
        field = page.get_by_label(label, exact=True)
        field.fill(value)
        field.press("Escape")
        page.get_by_role("button", name="Generate").click()
        expect(field).to_be_focused()
        expect(field).to_have_accessible_description(re.compile(re.escape(words)))
    assert behaviour.requests == []


def test_a_stream_that_breaks_off_keeps_what_was_whole(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a lost connection looks like a drawing that goes on for ever."""
    page = open_page()
    behaviour.cut_at_row = 5
    ask(page)
    run_ends(page, "failed")
    expect(page.locator(".run [role=alert]")).to_contain_text(
        "The connection was lost while drawing."
    )
    assert page.locator(".card-state").all_inner_texts() == ["Not finished"] * 2


def test_a_failure_in_the_stream_is_told(open_page: OpenPage, behaviour: Behaviour) -> None:
    page = open_page()
    behaviour.fail_at_row = 5
    ask(page)
    expect(page.locator(".run [role=alert]")).to_contain_text(
        "The drawing failed.Logits were not finite."
    )


def test_a_server_out_of_reach_is_told_and_waited_for(open_page: OpenPage) -> None:
    """Fails if a lost network is silent, or if the page has to be loaded again when it is back."""
    page = open_page()
    page.context.set_offline(True)
    ask(page)
    expect(page.locator(".run [role=alert]")).to_contain_text("The server can't be reached.")
    expect(page.locator("#server-notice")).to_contain_text("Trying again by itself.")
    page.context.set_offline(False)
    expect(page.locator("#server-notice")).to_be_hidden(timeout=PATIENCE)
    page.get_by_role("button", name="Try again").click()
    run_ends(page)


def test_a_model_that_is_being_loaded_is_waited_for(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if the page gives up on a server that has just been started, or lets somebody press
    Generate in vain.
    """
    behaviour.ready = False
    page = open_page(wait=False)
    notice = page.locator("#server-notice")
    expect(notice).to_contain_text("The model is being loaded…")
    expect(notice).to_contain_text("3 of 40 graphs captured")
    ask(page)
    expect(page.locator("#composer-error")).to_have_text(
        "The model is being loaded… This is drawn as soon as it can be."
    )
    behaviour.ready = True
    expect(notice).to_be_hidden(timeout=PATIENCE)
    run_ends(page)
    expect(page.locator("#composer-error")).to_be_hidden()


def test_what_was_asked_for_meanwhile_is_drawn_once_the_server_takes_it(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if Generate is lost, or the complaint about it stays, while a server that was there is
    away for a while.
    """
    page = open_page()
    behaviour.ready, behaviour.why_not = False, "the service is stopping: try again later"
    behaviour.refusal = Refusal(503, behaviour.why_not)
    ask(page, "fox", 1, 3)
    notice = page.locator("#server-notice")
    expect(notice).to_contain_text("The server takes no work now.")
    ask(page, "bee", 2, 5)
    expect(page.locator("#composer-error")).to_contain_text("This is drawn as soon as it can be.")
    behaviour.ready, behaviour.refusal = True, None
    expect(notice).to_be_hidden(timeout=PATIENCE)
    run_ends(page)
    expect(page.locator("#composer-error")).to_be_hidden()
    assert [(body["class_label"], body["n"], body["seed"]) for body in behaviour.requests] == [
        (7, 1, 3),
        (33, 2, 5),
    ]


def test_what_is_filled_in_before_the_server_answers_is_drawn_once_it_does(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a quick hand's Generate is lost, its settings are replaced by the model's, or the
    focus is taken away.
    """
    behaviour.facts_held, behaviour.key = True, "llama-1"
    page = open_page(wait=False)
    page.get_by_label("Guidance", exact=True).fill("2")
    ask(page, "fox", 1, 3)
    complaint = page.locator("#composer-error")
    expect(complaint).to_have_text(
        "The server has not answered yet. This is drawn as soon as it can be."
    )
    behaviour.facts_held = False
    expect(complaint).to_have_text(
        "This server asks for a key. This is drawn as soon as it can be."
    )
    page.get_by_label("API key").fill("llama-1")
    behaviour.facts_held = True
    page.get_by_label("API key").press("Enter")
    expect(complaint).to_have_text("The key is being checked. This is drawn as soon as it can be.")
    seed = page.get_by_label("Seed", exact=True)
    seed.focus()
    behaviour.facts_held = False
    run_ends(page)
    expect(complaint).to_be_hidden()
    expect(seed).to_be_focused()
    drawn = [
        [body[name] for name in ("class_label", "seed", "cfg_scale", "top_k")]
        for body in behaviour.requests
    ]
    assert drawn == [[7, 3, 2, 20]]


def test_what_is_filled_in_anew_before_the_server_answers_is_not_drawn_unasked(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if half a name draws, or complains, because Generate was pressed for what stood there
    before.
    """
    behaviour.facts_held = True
    page = open_page(wait=False)
    ask(page, "fox", 1, 3)
    complaint = page.locator("#composer-error")
    expect(complaint).to_be_visible()
    name = page.get_by_label("Class", exact=True)
    name.press_sequentially("bea")
    expect(complaint).to_be_hidden()
    behaviour.facts_held = False
    expect(page.locator(".chip").first).to_be_visible()
    expect(name).not_to_have_attribute("aria-invalid", "true")
    assert behaviour.requests == []


def test_a_model_without_training_is_owned_up_to(open_page: OpenPage, behaviour: Behaviour) -> None:
    behaviour.trained = False
    page = open_page()
    expect(page.locator("#server-notice")).to_contain_text("its pictures are noise")
    ask(page)
    run_ends(page)


@pytest.mark.parametrize("remember", [False, True])
def test_a_key_is_asked_for_and_kept_as_long_as_was_ticked(
    open_page: OpenPage, behaviour: Behaviour, remember: bool
) -> None:
    """Fails if a key outlives its tab without having been asked to, or is not sent, or a wrong one
    is kept.
    """
    behaviour.key = "llama-1"
    page = open_page(wait=False)
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    expect(page.locator("#key-title")).to_have_text("This server asks for a key.")
    key.fill("wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#key-title")).to_have_text("The server does not accept this key.")
    stored = "() => [sessionStorage.getItem('api-key'), localStorage.getItem('api-key')]"
    assert page.evaluate(stored) == [None, None]
    key.fill("llama-1")
    page.get_by_label("Remember it in this browser").set_checked(remember)
    key.press("Enter")
    expect(page.locator(".chip").first).to_be_visible()
    expect(page.locator("#key-form")).to_be_hidden()
    assert page.evaluate(stored) == ([None, "llama-1"] if remember else ["llama-1", None])
    ask(page)
    run_ends(page)

    other = open_page(beside=page, wait=False)
    if remember:
        expect(other.locator(".chip").first).to_be_visible()
        other.get_by_role("button", name="Key", exact=True).click()
        other.get_by_role("button", name="Forget it").click()
        assert other.evaluate(stored) == [None, None]
    else:
        expect(other.locator("#key-title")).to_have_text("This server asks for a key.")


def test_what_was_asked_for_without_a_key_is_drawn_with_it(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if somebody whose key was withdrawn has to fill in the form again."""
    page = open_page()
    behaviour.key = "llama-1"
    ask(page, "bee", 2, 5)
    page.get_by_label("API key").fill("llama-1")
    page.get_by_role("button", name="Use this key").click()
    run_ends(page)
    assert [(body["class_label"], body["n"], body["seed"]) for body in behaviour.requests] == [
        (33, 2, 5)
    ]


def test_the_gallery_survives_a_reload_and_what_was_deleted_does_not(open_page: OpenPage) -> None:
    page = open_page()
    ask(page, "fox", 3, 7)
    run_ends(page)
    ask(page, "bee", 1, 8)
    expect(page.locator(".tile")).to_have_count(4)
    names = page.locator(".tile-words").all_inner_texts()
    page.reload()
    expect(page.locator(".tile")).to_have_count(4)
    assert page.locator(".tile-words").all_inner_texts() == names
    expect(page.locator(".tile img").first).to_have_js_property("naturalWidth", SIZE)

    page.get_by_role("button", name="Delete fox, 1 of 3 · seed 7").click()
    expect(page.locator(".tile")).to_have_count(3)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".tile")).to_have_count(4)
    assert page.locator(".tile-words").all_inner_texts() == names
    page.get_by_role("button", name="Delete bee, seed 8").click()
    expect(page.get_by_role("button", name="Show fox, 1 of 3 · seed 7")).to_be_focused()
    page.reload()
    expect(page.locator(".tile")).to_have_count(3)

    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Keep them").click()
    expect(page.locator(".tile")).to_have_count(3)
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Delete all").click()
    expect(page.locator(".tile")).to_have_count(0)
    page.reload()
    expect(page.locator("#gallery-empty")).to_be_visible()
    expect(page.locator(".chip").first).to_be_visible()
    expect(page.locator(".tile")).to_have_count(0)


def test_the_gallery_has_a_limit_and_the_oldest_go_first(open_page: OpenPage) -> None:
    """Fails if a browser's storage fills up without an end, or if what was drawn last is
    what goes.
    """
    page = open_page()
    page.evaluate(
        """() => new Promise((done) => {
            const open = indexedDB.open("llamagen", 1);
            open.onsuccess = () => {
                const transaction = open.result.transaction("pictures", "readwrite");
                const request = {class_label: 7, n: 1, cfg_scale: 2, cfg_interval: -1,
                    temperature: 1, top_k: 0, top_p: 1};
                for (let k = 0; k < 199; k += 1) transaction.objectStore("pictures").put({
                    id: `${k}`, created: k, index: 0, className: "old", model: "m", size: 128,
                    request: {...request, seed: k},
                    blob: new Blob([]),
                });
                transaction.oncomplete = () => { open.result.close(); done(); };
            };
        })"""
    )
    page.reload()
    expect(page.locator(".tile")).to_have_count(199)
    ask(page, "fox", 3, 7)
    run_ends(page)
    expect(page.locator(".tile")).to_have_count(200)
    page.reload()
    expect(page.locator(".tile")).to_have_count(200)
    expect(page.locator(".tile-facts").last).to_have_text("seed 2")


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
    expect(page.locator(".tile")).to_have_count(2)
    expect(page.locator("#gallery-facts")).to_contain_text("only until the page is closed")
    page.get_by_role("button", name="Theme: as the system").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


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
    run_ends(page)
    page.locator(".tile-open").last.click()
    page.locator("#viewer").get_by_role("button", name="Again with another seed").click()
    expect(page.locator("#viewer")).to_be_hidden()
    run_ends(page)
    assert len({body.pop("seed") for body in behaviour.requests}) == 3
    assert behaviour.requests[0] == behaviour.requests[1] == behaviour.requests[2]
    assert behaviour.requests[0]["cfg_scale"] == 3.5


def test_an_empty_seed_is_another_one_each_time(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if the page leaves the seed to the server, whose 63 bits JavaScript's numbers cannot
    hold.
    """
    page = open_page()
    for _ in range(2):
        ask(page, seed=None)
        run_ends(page)
    seeds = [body["seed"] for body in behaviour.requests]
    assert len(set(seeds)) == 2
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_settings_of_a_picture_can_be_taken_up(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    page = open_page()
    page.locator("summary").click()
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


def test_a_download_is_the_servers_file(
    open_page: OpenPage, behaviour: Behaviour, tmp_path: Path
) -> None:
    """Fails if the page writes the picture anew, which would lose the settings in it, or gives it a
    name that says nothing.
    """
    page = open_page()
    ask(page, "soccer ball", 2, 7)
    run_ends(page)
    for index in range(2):
        with page.expect_download() as download:
            if index == 0:
                page.get_by_role("button", name="Download picture 1").click()
            else:
                page.locator(".tile-open").nth(1).click()
                page.get_by_role("button", name="Download", exact=True).click()
        assert (
            download.value.suggested_filename
            == f"GPT-demo_soccer-ball_62_seed-7_guidance-4_{index + 1}-of-2.png"
        )
        download.value.save_as(tmp_path / "picture.png")
        content = (tmp_path / "picture.png").read_bytes()
        assert content == behaviour.sent[index]
        with Image.open(io.BytesIO(content)) as picture:
            assert json.loads(picture.info["parameters"])["seed"] == 7


def test_a_class_is_found_by_name_and_by_id(open_page: OpenPage) -> None:
    """Fails if the combobox leaves the ARIA pattern, or the closest match is not the first."""
    page = open_page()
    field = page.get_by_role("combobox", name="Class")
    field.click()
    expect(field).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_role("option")).to_have_count(64)
    for typed, first in (
        ("ele", "elephant"),
        ("BALL", "balloon"),
        ("7", "fox"),
        ("  Soccer_b", "soccer ball"),
    ):
        field.fill(typed)
        option = page.get_by_role("option").first
        expect(option.locator(".option-name")).to_have_text(first)
        expect(field).to_have_attribute("aria-activedescendant", option.get_attribute("id") or "")
    field.fill("zzz")
    expect(page.locator("#class-empty")).to_have_text("No class like “zzz”")
    field.fill("p")
    field.press("ArrowDown")
    field.press("ArrowUp")
    field.press("ArrowUp")  # from the first to the last
    last = page.get_by_role("option").last
    expect(field).to_have_attribute("aria-activedescendant", last.get_attribute("id") or "")
    name = last.locator(".option-name").inner_text()
    field.press("Enter")
    expect(field).to_have_value(name)
    expect(field).to_have_attribute("aria-expanded", "false")
    field.press("ArrowDown")
    expect(page.locator("[role=option][aria-selected=true]")).to_have_text(re.compile(name))
    field.press("Escape")
    expect(field).to_have_value(name)


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
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
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
    page.locator("summary").click()
    assert fits()
    heights = page.locator("#composer button:visible, .chip").evaluate_all(
        "all => all.map(b => b.getBoundingClientRect().height)"
    )
    assert min(heights) >= 36
    behaviour.hold_at_row = 5
    ask(page, "fox", 4)
    expect(page.locator('.card[data-rows="5"]')).to_have_count(4)
    expect(page.get_by_role("button", name="Cancel")).to_be_in_viewport()
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
    expect(page.locator(".run [role=alert]")).to_be_visible()
    assert fits()


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_dark(
    open_page: OpenPage, behaviour: Behaviour, scheme: str
) -> None:
    """Fails below WCAG AA's contrast of 4.5, and if the page does not follow the system."""
    page = open_page(color_scheme=scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.locator("summary").click()
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
    expect(page.locator(".run [role=alert]")).to_be_visible()
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
    expect(page.locator('.card[data-rows="5"]')).to_have_count(2)
    assert page.evaluate("document.getAnimations().length") == 0


def test_every_control_has_a_name(open_page: OpenPage, behaviour: Behaviour) -> None:
    """Fails if a screen reader would say no more than "button" or "edit"."""
    page = open_page()
    ask(page)
    run_ends(page)
    page.locator("summary").click()
    controls = page.locator("button:visible, input:visible, progress:visible, canvas:visible").all()
    assert len(controls) > 25
    for control in controls:
        expect(control).to_have_accessible_name(re.compile(r"\w"))


def test_the_event_parser_minds_no_cut(open_page: OpenPage) -> None:
    """Fails if events are lost or changed when the network cuts a stream inside a line, a line's
    end or a letter.
    """
    page = open_page()
    stream = "\ufeff: hello\n\nevent: a\r\ndata: gr\u00fc\u00df \U0001f98a\r\ndata:two\r\n\r\n"
    stream += "data: x\r\rid: 3\nevent: lost\n\ndata\n\nevent: cut\ndata: off"
    found = page.evaluate(
        """async (bytes) => {
            const { readEvents } = await import("/static/event_stream.js");
            const all = new Set();
            for (const size of [1, 2, 3, 5, 7, 1000]) {
                const pieces = [];
                for (let at = 0; at < bytes.length; at += size) {
                    pieces.push(new Uint8Array(bytes.slice(at, at + size)));
                }
                const pull = (c) => { pieces.length ? c.enqueue(pieces.shift()) : c.close(); };
                const body = new ReadableStream({ pull });
                const events = [];
                for await (const event of readEvents({ body })) events.push(event);
                all.add(JSON.stringify(events));
            }
            return [...all].map(JSON.parse);
        }""",
        list(stream.encode()),
    )
    expected = [("a", "gr\u00fc\u00df \U0001f98a\ntwo"), ("message", "x"), ("message", "")]
    assert found == [[{"name": name, "data": data} for name, data in expected]]


def test_four_requests_are_drawn_at_once_and_no_more(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a fifth stream takes the last of the browser's connections, after which nothing can
    be cancelled or loaded.
    """
    behaviour.hold_at_row = 2
    page = open_page()
    for name in ("fox", "owl", "bee", "cat", "dog"):
        ask(page, name, 1)
    expect(page.locator(".run")).to_have_count(4)
    expect(page.locator("#composer-error")).to_contain_text("4 requests are being drawn already")
    behaviour.hold_at_row = None
    expect(page.locator(".tile")).to_have_count(4)


def test_the_pages_files_have_no_inline_code_and_no_other_host() -> None:
    """Fails if a file relies on what the policy forbids; a browser would say so only where that
    part is reached.
    """
    text = {path.name: path.read_text() for path in STATIC.iterdir()}
    assert {"index.html", "style.css", "app.js", "favicon.svg"} <= set(text)
    for name, content in text.items():
        addresses = set(re.findall(r"https?://[^\s\"'<>)]+", content))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", content
        ), name
    assert not re.search(r"\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|<style", text["index.html"])
