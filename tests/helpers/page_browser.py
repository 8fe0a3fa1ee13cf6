"""The page in a real browser: opening it, and what its tests do with it again and again."""

import base64
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from page_stand_in import StandIn
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    expect,
    sync_playwright,
)

PATIENCE = 20_000  # ms: a busy machine is slow, and what comes true is not waited for longer
expect.set_options(timeout=PATIENCE)
# Commands of Debian's packages, by the names of the browsers.
COMMANDS = {"chromium": "chromium", "firefox": "firefox-esr"}
OpenPage = Callable[..., Page]


@contextmanager
def started_browser(name: str) -> Iterator[Browser]:
    """A browser of this machine; the test is skipped if there is none of that name."""
    if (command := shutil.which(COMMANDS[name])) is None:
        pytest.skip(f"needs {COMMANDS[name]} on the PATH")
    with sync_playwright() as playwright:
        if name == "chromium":
            started = playwright.chromium.launch(executable_path=command, args=["--no-sandbox"])
        else:
            started = playwright.firefox.launch(
                executable_path=Path(__file__).parent / "firefox_bidi.py",
                channel="moz-firefox",
                # what media queries find, of which BiDi knows nothing there
                firefox_user_prefs={"ui.prefersReducedMotion": 1, "ui.systemUsesDarkTheme": 0},
            )
        yield started
        started.close()


def is_firefox(page: Page) -> bool:
    return "Firefox" in str(page.evaluate("navigator.userAgent"))


@contextmanager
def opened_pages(browser: Browser, stand_in: StandIn) -> Iterator[OpenPage]:
    """Opens the page in contexts of its own; fails if anything is said on the console, or asked of
    another server.
    """
    contexts: list[BrowserContext] = []
    wrong: list[str] = []
    chromium = browser.browser_type.name == "chromium"

    def heard(message: ConsoleMessage) -> None:
        # Chromium reports every status of 400 and above, which the page cannot prevent.
        if message.type in ("error", "warning") and not message.text.startswith(
            "Failed to load resource"
        ):
            wrong.append(message.text)

    def asked(url: str) -> None:
        if not url.startswith((stand_in.url, "blob:", "data:")):
            wrong.append(url)

    def context_of(options: dict[str, Any]) -> BrowserContext:
        if chromium:  # motion takes the time of a core
            options = {"reduced_motion": "reduce"} | options
        else:
            if {"reduced_motion", "color_scheme", "is_mobile", "has_touch"} & set(options):
                pytest.skip("Firefox cannot be told to be so")
        return browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))

    def opened(
        *, wait: bool = True, beside: Page | None = None, query: str = "", **options: Any
    ) -> Page:
        context = beside.context if beside else context_of(options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked(request.url))
        page.goto(f"{stand_in.url}{query}")
        if wait:
            is_ready(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def is_ready(page: Page) -> None:
    """Waits until the server has told the page what it draws."""
    expect(page.locator("#model-facts")).not_to_be_empty(timeout=PATIENCE)


def fill(page: Page, name: str = "fox", count: int = 2, seed: int | None = 7) -> None:
    """Fills in the form."""
    page.get_by_label("Class", exact=True).fill(name)
    page.get_by_label("Pictures", exact=True).fill(str(count))
    page.get_by_label("Seed", exact=True).fill("" if seed is None else str(seed))


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()


def ask(page: Page, name: str = "fox", count: int = 2, seed: int | None = 7) -> None:
    """Fills in the form and generates."""
    fill(page, name, count, seed)
    generate(page)


def run_ends(page: Page, state: str = "done", count: int = 1) -> None:
    """Waits until so many runs have ended so since the page was loaded."""
    expect(page.locator(f".run[data-state={state}]")).to_have_count(count, timeout=PATIENCE)


def names(page: Page) -> list[str]:
    """The pictures in their order, as a screen reader names them."""
    labels = page.locator(".tile-open").evaluate_all("all => all.map(b => b.ariaLabel)")
    return [label.removeprefix("Show ") for label in labels]


def facts(page: Page) -> dict[str, str]:
    """What the large view says of its picture."""
    terms, texts = page.locator("#viewer dt"), page.locator("#viewer dd")
    return dict(zip(terms.all_inner_texts(), texts.all_inner_texts(), strict=True))


# Playwright hears nothing of the downloads of a Firefox that is not its own.
_KEEP_SAVED = """() => {
    window.saved = null;
    const blobs = new Map();
    const make = URL.createObjectURL;
    URL.createObjectURL = (blob) => {
        const url = make.call(URL, blob);
        blobs.set(url, blob);
        return url;
    };
    HTMLAnchorElement.prototype.click = function () {
        const reader = new FileReader();
        reader.onload = () => { window.saved = [this.download, reader.result.split(",")[1]]; };
        reader.readAsDataURL(blobs.get(this.href));
    };
}"""


def saved(page: Page, press: Callable[[], None]) -> tuple[str, bytes]:
    """The name and the bytes of the file that pressing something has the browser save."""
    if not is_firefox(page):
        with page.expect_download() as download:
            press()
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()
    page.evaluate(_KEEP_SAVED)
    press()
    assert eventually(lambda: page.evaluate("window.saved") is not None)
    name, content = page.evaluate("window.saved")
    return name, base64.b64decode(content)


def drop(page: Page, file: Path, event: str = "drop") -> None:
    """Drops or pastes a file."""
    page.evaluate(
        """([content, file, kind]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], file));
            const options = { bubbles: true, cancelable: true };
            const event = new Event(kind, options);  // Firefox makes no pasted files
            const name = kind === "drop" ? "dataTransfer" : "clipboardData";
            Object.defineProperty(event, name, { value: data });
            document.body.dispatchEvent(event);
        }""",
        [base64.b64encode(file.read_bytes()).decode(), file.name, event],
    )


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE / 1000
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def words(text: str) -> re.Pattern[str]:
    """For what is compared with case and all, somewhere in a text."""
    return re.compile(re.escape(text))
