"""The page before the server is ready, and the key that it may ask for."""

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_browser import PATIENCE, OpenPage, ask, is_ready, run_ends
from page_stand_in import Behaviour
from playwright.sync_api import expect


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
    is_ready(page)
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
    is_ready(page)
    expect(page.locator("#key-form")).to_be_hidden()
    assert page.evaluate(stored) == ([None, "llama-1"] if remember else ["llama-1", None])
    ask(page)
    run_ends(page)

    other = open_page(beside=page, wait=False)
    if remember:
        is_ready(other)
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
