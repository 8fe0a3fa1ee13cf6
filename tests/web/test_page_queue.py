"""Runs that wait on the page: in their order, until the server takes them."""

import re

import pytest

pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")

from page_browser import PATIENCE, OpenPage, ask, eventually, names, run_ends
from page_stand_in import Behaviour, Refusal
from playwright.sync_api import expect

FIVE_MORE = ("fox", "owl", "bee", "cat", "dog", "pig", "otter")


def labels_of(behaviour: Behaviour) -> list[int]:
    return [body["class_label"] for body in behaviour.requests]


def test_runs_wait_in_order_and_four_are_drawn_at_once(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a run is refused or lost, if they overtake each other, or if a fifth stream takes
    the last of the browser's connections, after which nothing can be cancelled or loaded.
    """
    behaviour.hold_at_row = 2
    page = open_page()
    for name in FIVE_MORE:
        ask(page, name, 1)
    expect(page.locator(".run")).to_have_count(4)
    expect(page.locator("#queue-title")).to_have_text("3 runs wait")
    lines = page.locator(".queue-line")
    assert [text.split("\n")[0] for text in lines.all_inner_texts()] == ["1st", "2nd", "3rd"]
    expect(lines.first).to_contain_text("dog guidance 4 · seed 7")
    assert len(behaviour.requests) == 4
    behaviour.hold_at_row = None
    run_ends(page, count=7)
    expect(page.locator("#queue")).to_be_hidden()
    assert [name.split(",")[0] for name in names(page)] == [*reversed(FIVE_MORE)]
    assert sorted(labels_of(behaviour)[:4]) != sorted(labels_of(behaviour)[3:])


def test_what_waits_can_be_cancelled_one_by_one_and_all_together(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a run that was taken out of the queue is drawn all the same, if the others lose
    their places, or if what is being drawn is cleared, too.
    """
    behaviour.hold_at_row = 2
    page = open_page()
    for name in FIVE_MORE:
        ask(page, name, 1)
    page.get_by_role("button", name="Cancel pig").click()
    lines = page.locator(".queue-line")
    expect(lines).to_have_count(2)
    expect(lines.last).to_have_text(re.compile("2nd.*otter"))
    expect(page.get_by_role("button", name="Cancel dog")).to_be_focused()
    page.get_by_role("button", name="Clear the queue").click()
    expect(page.locator("#queue")).to_be_hidden()
    behaviour.hold_at_row = None
    run_ends(page, count=4)
    assert len(behaviour.requests) == 4


TEMPORARY = (
    (Refusal(429, "the queue is full", headers={"Retry-After": "2"}), "The queue is full."),
    (
        Refusal(429, "no key is tried", headers={"Retry-After": "2"}, code="too_many_wrong_keys"),
        "No key is tried.",
    ),
    (Refusal(503, "a process is lost", headers={"Retry-After": "2"}), "A process is lost."),
)


def test_a_server_that_is_full_is_asked_again_and_the_error_goes_away(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a run is lost because others were first, or if the words about it stay when their
    cause has gone.
    """
    page = open_page()
    for count, (refusal, told) in enumerate(TEMPORARY):
        behaviour.refusal = refusal
        ask(page, "fox", 1, count)
        expect(page.locator("#queue-why")).to_have_text(told)
        expect(page.locator("#queue-next")).to_have_text(
            re.compile(r"The next try is in \d second")
        )
        expect(page.locator(".run")).to_have_count(count)
        behaviour.refusal = None
        run_ends(page, count=count + 1)
        expect(page.locator("#queue")).to_be_hidden()
    assert page.locator("[role=alert]:visible").count() == 0


def test_a_server_out_of_reach_is_told_and_waited_for(open_page: OpenPage) -> None:
    """Fails if a lost network is silent, or if the page has to be loaded again when it is back."""
    page = open_page()
    page.context.set_offline(True)
    ask(page)
    expect(page.locator("#queue-why")).to_have_text("The server can't be reached.")
    expect(page.locator("#server-notice")).to_contain_text("Trying again by itself.")
    page.context.set_offline(False)
    expect(page.locator("#server-notice")).to_be_hidden(timeout=PATIENCE)
    run_ends(page)


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
    expect(page.locator("#queue-why")).to_have_text("The server takes no work now.")
    expect(page.locator(".queue-line")).to_have_count(2)
    behaviour.ready, behaviour.refusal = True, None
    expect(notice).to_be_hidden(timeout=PATIENCE)
    run_ends(page, count=2)
    expect(page.locator("#queue")).to_be_hidden()
    drawn = [(body["class_label"], body["n"], body["seed"]) for body in behaviour.requests]
    assert drawn[-2:] == [(7, 1, 3), (33, 2, 5)]


def test_runs_that_are_not_finished_survive_a_reload(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a reload loses what is drawn or what waits, begins a drawing anew that the server
    still knows, or changes the order.
    """
    behaviour.hold_at_row = 2
    page = open_page()
    for name in FIVE_MORE[:5]:
        ask(page, name, 1)
    assert eventually(lambda: len(behaviour.requests) == 4)
    expect(page.locator(".run[data-state=drawing]")).to_have_count(4)
    page.reload()
    expect(page.locator(".run[data-state=drawing]")).to_have_count(4)
    expect(page.locator(".queue-line")).to_contain_text("dog")
    assert sorted(behaviour.followed) == ["job-1", "job-2", "job-3", "job-4"]
    behaviour.hold_at_row = None
    run_ends(page, count=5)
    assert len(behaviour.requests) == 5
    page.reload()
    expect(page.locator(".tile-open")).to_have_count(5)
    expect(page.locator(".run[data-state=drawing]")).to_have_count(0)


def test_a_run_that_waits_although_it_was_begun_is_cancelled_at_the_server(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a run that was taken out of the queue is still drawn, for nobody."""
    behaviour.hold_at_row = 2
    page = open_page()
    for name in FIVE_MORE[:3]:
        ask(page, name, 1)
    expect(page.locator(".run[data-state=drawing]")).to_have_count(3)
    behaviour.ready = False
    page.reload()
    expect(page.locator(".queue-line")).to_have_count(3)
    page.get_by_role("button", name="Cancel owl").click()
    assert eventually(lambda: behaviour.cancelled == ["job-2"])
    page.get_by_role("button", name="Clear the queue").click()
    assert eventually(lambda: sorted(behaviour.cancelled) == ["job-1", "job-2", "job-3"])
    expect(page.locator("#queue")).to_be_hidden()


def test_a_drawing_that_the_server_has_forgotten_is_drawn_again_from_its_seed(
    open_page: OpenPage, behaviour: Behaviour
) -> None:
    """Fails if a run vanishes because the server was started anew, or keeps what it has twice."""
    behaviour.hold_at_image, behaviour.forgets = 2, True
    page = open_page()
    ask(page, "fox", 3, seed=None)
    expect(page.locator(".tile-open")).to_have_count(2)
    page.reload()
    assert eventually(lambda: len(behaviour.requests) == 2)
    expect(page.locator("#toast")).to_have_text(
        "fox is drawn again from its seed: the server had lost it"
    )
    behaviour.hold_at_image = None
    run_ends(page)
    expect(page.locator(".tile-open")).to_have_count(3)
    assert behaviour.requests[0] == behaviour.requests[1]
