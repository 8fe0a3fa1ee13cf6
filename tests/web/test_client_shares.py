"""Who waits: the places of the queue among clients, and what makes two requests one client's."""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
from fake_service import fake_model
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from test_worker import order

from autoregressive.errors import UserError
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app import build_service_app
from autoregressive.serve.web.app_state import DRAWING_PATHS, RequestBroker, client_of, context_of
from autoregressive.serve.web.clients import WaitingPlaces
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.server_flags import read_arguments
from autoregressive.serve.web.server_settings import resolve_server_settings
from autoregressive.serve.web.timeouts import Timeouts
from autoregressive.serve.worker.messages import Ended, EngineRequest, Ready, Started
from autoregressive.serve.worker.process import connect


def ask(places: WaitingPlaces, client: str) -> bool:
    """A request of a client; whether it may wait."""
    admitted = places.admits(client)
    if admitted:
        places.take(client)
    return admitted


def fill(places: WaitingPlaces, *clients: str) -> list[int]:
    """The clients ask in turns until all are refused; what each then has."""
    while any([ask(places, client) for client in clients]):
        pass
    return [places.taken_by(client) for client in clients]


@pytest.mark.parametrize(
    ("size", "alone", "two"),
    [
        (0, 0, [0, 0]),
        (1, 1, [1, 0]),
        (2, 1, [1, 1]),
        (3, 2, [1, 1]),
        (8, 6, [4, 3]),
        (256, 204, [114, 113]),
    ],
)
def test_the_shares_of_one_client_and_of_two(size: int, alone: int, two: list[int]) -> None:
    """Fails if one client can fill a queue of two places or more, or two that ask alike do not get
    alike.
    """
    assert fill(WaitingPlaces(size, shared=True), "a") == [alone]
    assert fill(WaitingPlaces(size, shared=True), "a", "b") == two
    assert fill(WaitingPlaces(size, shared=False), "a") == [size]


@given(
    size=st.integers(0, 40),
    asking=st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), max_size=200),
)
def test_a_client_that_does_not_wait_finds_any_place_that_is_free(
    size: int, asking: list[tuple[bool, str]]
) -> None:
    """Fails if a client that waits already takes the last place, a newcomer is refused one, or more
    wait than may.
    """
    places = WaitingPlaces(size, shared=True)
    for asks, client in asking:
        waiting = {one: places.taken_by(one) for one in "abcdef"}
        taken = sum(waiting.values())
        assert places.taken == taken <= size
        assert places.full == (taken == size)
        if not asks:
            if waiting[client]:
                places.give_back(client)
        elif waiting[client] == 0:
            assert ask(places, client) == (taken < size)
        elif ask(places, client):
            assert taken + 1 < size


@pytest.mark.parametrize(
    ("size", "clients"), [(16, "ab"), (16, "abc"), (256, "ab"), (256, "abc"), (256, "abcdefgh")]
)
def test_a_hog_comes_down_to_its_share(size: int, clients: str) -> None:
    """Fails if a client that had filled the queue keeps more than others that ask for as much,
    although it asks far more often.
    """
    places = WaitingPlaces(size, shared=True)
    fill(places, "a")
    turns = itertools.cycle(clients)
    for _ in range(2 * len(clients) * size):
        while not places.taken_by(starts := next(turns)):
            pass
        places.give_back(starts)
        for client in ("a" * size, *clients[1:]):
            for one in client:
                ask(places, one)
    shares = [places.taken_by(client) for client in clients]
    fair = size * 4 / (4 * len(clients) + 1)
    # as finely as the factor of four allows
    assert all(abs(share - fair) <= 4 for share in shares), shares


def scope(address: str | None, key: int | None = None) -> dict[str, Any]:
    """Of a request, as uvicorn makes it; `key`: the number of the key that let it in."""
    made = {"type": "http", "client": None if address is None else (address, 1234)}
    context_of(made).key = key
    return made


@pytest.mark.parametrize(
    ("one", "another", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:0db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("unknown", "unknown", True),
        ("unknown", "", True),
        ("192.0.2.1", None, False),
    ],
)
def test_clients_are_told_apart_by_their_networks(
    one: str, another: str | None, same: bool
) -> None:
    """Fails if one machine's addresses are many clients, or many machines are one."""
    assert (client_of(scope(one)) == client_of(scope(another))) == same


def test_two_keys_at_one_address_are_two_clients() -> None:
    """Fails if one address with two keys is one client, or the same key at two addresses is."""
    names = {
        client_of(scope(address, key))
        for address in ("192.0.2.1", "192.0.2.2")
        for key in (None, 0, 1)
    }
    assert len(names) == 6


@pytest.mark.parametrize("text", ["*", "127.0.0.1", "10.0.0.7, 10.1.0.0/16,::1", "2001:db8::/32"])
def test_proxies_are_addresses_and_networks(text: str) -> None:
    """Fails if uvicorn's way to name proxies is refused, or does not reach what trusts them."""
    found = resolve_server_settings(read_arguments(["--forwarded-allow-ips", text], {}))
    assert found.forwarded_allow_ips == text
    assert (
        resolve_server_settings(
            read_arguments([], {"LLAMAGEN_FORWARDED_ALLOW_IPS": text})
        ).forwarded_allow_ips
        == text
    )


@pytest.mark.parametrize(
    "text", ["", "nginx", "10.0.0.1/8", "10.0.0.1,", "10.0.0.300", "*,10.0.0.1", "10.0.0.1:80"]
)
def test_a_proxy_that_would_never_be_trusted_is_refused(text: str) -> None:
    """Fails if a misspelt proxy passes: all clients behind it would share one share, and nobody
    would know why.
    """
    with refused(match=r"--forwarded-allow-ips .*: must be addresses or networks, .* or \* alone"):
        resolve_server_settings(read_arguments([f"--forwarded-allow-ips={text}"], {}))


def test_the_policy_is_fair_unless_it_is_told_otherwise() -> None:
    """Fails if the flag does not reach the engine, or another policy passes."""
    found = resolve_server_settings(read_arguments([], {}))
    assert (found.engine.scheduling_policy, found.forwarded_allow_ips) == ("fair", None)
    assert (
        resolve_server_settings(
            read_arguments(["--scheduling-policy", "fcfs"], {})
        ).engine.scheduling_policy
        == "fcfs"
    )
    with pytest.raises(UserError, match="--scheduling-policy"):
        read_arguments(["--scheduling-policy", "priority"], {})
    with pytest.raises(ValueError, match="scheduling_policy priority: must be one of fcfs, fair"):
        EngineConfig(scheduling_policy=cast(Any, "priority"))


@pytest.mark.parametrize(
    ("flags", "peer", "expected", "key"),
    [
        ((), "192.0.2.1", "192.0.2.1", None),
        (("--api-key", "another one,a key of this test"), "192.0.2.1", "192.0.2.1", 1),
        (("--forwarded-allow-ips", "192.0.2.0/24"), "192.0.2.1", "203.0.113.9", None),
        (("--forwarded-allow-ips", "192.0.2.0/24"), "198.51.100.1", "198.51.100.1", None),
        (("--forwarded-allow-ips", "*"), "198.51.100.1", "203.0.113.9", None),
    ],
)
@pytest.mark.parametrize("path", DRAWING_PATHS)
def test_a_request_is_the_clients_who_asked_for_it(
    flags: tuple[str, ...], peer: str, expected: str, key: int | None, path: str
) -> None:
    """Fails if a route does not say whose request it is, the flags do not reach what tells clients
    apart, a key is another client if it is written otherwise, or one counts that nobody has
    checked.
    """
    orders: list[EngineRequest] = []

    class FullBroker:
        async def accept(self, order: EngineRequest) -> None:
            orders.append(order)
            raise ApiError(429, "", "queue_full")

        def count(self, outcome: str) -> None:
            assert outcome == "rejected"

    async def go() -> None:
        settings = resolve_server_settings(read_arguments(flags, {}))
        service = build_service_app(
            settings, fake_model("fake"), cast(RequestBroker, FullBroker()), "http://localhost"
        )
        service.close()
        transport = httpx2.ASGITransport(cast(Any, service.app), client=(peer, 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for scheme in ("Bearer ", "BEARER   "):
                headers = {
                    "Authorization": f"{scheme}a key of this test",
                    "X-Forwarded-For": "203.0.113.9",
                }
                assert (
                    await client.post(path, json={"prompt": "cat"}, headers=headers)
                ).status_code == 429

    asyncio.run(go())
    assert [order.client for order in orders] == [client_of(scope(expected, key))] * 2


def test_the_dispatcher_gives_places_back_when_requests_start_or_end() -> None:
    """Fails if a place stays taken, is given back twice, or is another client's; two engines are
    one queue.
    """

    async def go() -> None:
        process = SimpleNamespace(kill=lambda: None, wait=lambda *_: 0)
        pairs = [connect() for _ in range(2)]
        dispatcher = Dispatcher(
            lambda index: (cast(Any, process), pairs[index][0]), 2, 8, Timeouts(), 64
        )
        for link in dispatcher._links:
            link._take(Ready(max_rows=2, num_pages=100, pages_per_row=4))
        running = [dispatcher.admit(order(client="hog")) for _ in range(2)]
        assert all(served.reserved for served in running)
        for served, link in zip(running, dispatcher._links, strict=True):
            link._take(Started(served.request_id, 1.0))
        waiting = [dispatcher.admit(order(client="hog")) for _ in range(6)]
        with pytest.raises(
            ApiError,
            match="you have 6 of the 8 places for waiting requests, which is your share now",
        ) as caught:
            dispatcher.admit(order(client="hog"))
        assert (caught.value.status, caught.value.code, caught.value.retry_after) == (
            429,
            "queue_full",
            1,
        )
        others = [dispatcher.admit(order(client="other")), dispatcher.admit(order(client="third"))]
        with pytest.raises(ApiError, match="8 requests are waiting, and no more are taken"):
            dispatcher.admit(order(client="fourth"))
        assert [dispatcher.ahead_of(served) for served in (*waiting[:2], *others)] == [0, 3, 1, 2]
        by_number = {
            served.request_id: link
            for link in dispatcher._links
            for served in link.requests.values()
        }
        for served in (waiting[0], others[0]):
            by_number[served.request_id]._take(Started(served.request_id, 1.0))
        for served in (waiting[0], waiting[1], others[1]):
            by_number[served.request_id]._take(
                Ended(served.request_id, "finished", 2.0, tokens=1, used_pages=0)
            )
        places = dispatcher._places
        assert [places.taken_by(client) for client in ("hog", "other", "third")] == [4, 0, 0]
        dispatcher.stop(at_once=True)
        for _, theirs in pairs:
            theirs.close()

    asyncio.run(go())
