"""Keys: several of them, how they are written, and how guesses are slowed down."""

import asyncio
import math
import socket
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2
import pytest
from fake_service import Service, running_service

from autoregressive.serve.web import checks
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.checks import (
    FAILURE_SECONDS,
    FREE_FAILURES,
    MOST_NETWORKS,
    Authentication,
    FailureThrottle,
)
from autoregressive.serve.web.clients import client_network, is_loopback

OLD, NEW = "old-key-0123456789", "new/key+0123456789="
LONGER = f"{OLD}-and-more"  # one key may be the beginning of another


class Clock:
    """Seconds, as the test says."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Door:
    """The guard alone."""

    def __init__(self, *keys: str) -> None:
        self.clock = Clock()
        self.throttle = FailureThrottle(self.clock)
        self.guard = Authentication(keys, lambda path: path == "/open", self.throttle)

    def knock(
        self, authorization: str | None, address: str = "192.0.2.1", path: str = "/"
    ) -> tuple[int, dict[bytes, bytes]]:
        """Status and headers of the answer."""
        headers = [] if authorization is None else [(b"authorization", authorization.encode())]
        scope = {"type": "http", "path": path, "headers": headers, "client": (address, 1)}

        async def ask() -> None:
            self.guard.check(scope)

        try:
            asyncio.run(ask())
        except ApiError as refusal:
            return refusal.status, dict(refusal.encode()[0])
        return 200, {}

    def fail(self, times: int, address: str = "192.0.2.1") -> list[int]:
        """Statuses of so many wrong keys."""
        return [self.knock(f"Bearer wrong-{index}", address)[0] for index in range(times)]


# The throttle


def test_wrong_keys_are_slowed_down_and_the_answer_says_until_when() -> None:
    """Fails if guessing goes on at full speed, or the client is told a time at which it is refused
    again.
    """
    door = Door(OLD)
    assert door.fail(FREE_FAILURES + 3) == [401] * FREE_FAILURES + [429] * 3
    status, headers = door.knock("Bearer wrong")
    assert (status, headers[b"retry-after"]) == (429, str(math.ceil(FAILURE_SECONDS)).encode())
    door.clock.now += FAILURE_SECONDS - 0.1
    assert door.fail(1) == [429]
    door.clock.now += 0.1
    assert door.fail(2) == [401, 429]
    door.clock.now += 3600
    assert door.fail(FREE_FAILURES + 1) == [401] * FREE_FAILURES + [429]


def test_an_attacker_cannot_tell_a_right_guess_from_a_wrong_one() -> None:
    """Fails if the right key passes where wrong ones are refused: the throttle would not slow down
    guessing at all.
    """
    door = Door(OLD)
    door.fail(FREE_FAILURES)
    assert door.knock(f"Bearer {OLD}")[0] == 429
    assert door.knock(f"Bearer {OLD}") == door.knock("Bearer wrong")


def test_a_client_with_a_key_is_not_locked_out_by_another_one_of_its_address() -> None:
    """Fails if somebody behind the same NAT or proxy can shut out those who work there already."""
    door = Door(OLD, NEW)
    assert door.knock(f"Bearer {OLD}")[0] == 200
    door.fail(100)
    assert door.knock(f"Bearer {OLD}")[0] == 200
    assert door.knock(f"Bearer {NEW}")[0] == 429  # not yet used from there, so it could be a guess
    assert door.knock(f"Bearer {OLD}", "192.0.2.2")[0] == 200


def test_a_client_that_mends_its_key_gets_in_soon() -> None:
    """Fails if a client whose key was replaced has to wait for more than one step."""
    door = Door(NEW)
    door.fail(1000)
    door.clock.now += FAILURE_SECONDS
    assert door.knock(f"Bearer {NEW}")[0] == 200
    door.fail(1000)
    assert door.knock(f"Bearer {NEW}")[0] == 200


def test_requests_without_a_key_are_no_guesses() -> None:
    """Fails if the page, which asks before it knows that a key is wanted, uses up the tries of its
    user.
    """
    door = Door(OLD)
    assert {door.knock(None)[0] for _ in range(5 * FREE_FAILURES)} == {401}
    assert door.knock(f"Bearer {OLD}")[0] == 200


def test_open_paths_are_open_to_throttled_clients() -> None:
    """Fails if a probe that sends a stale key along makes a supervisor end the service."""
    door = Door(OLD)
    door.fail(2 * FREE_FAILURES)
    assert door.knock("Bearer wrong", path="/open")[0] == 200


def test_addresses_are_counted_apart_and_ipv6_by_its_network() -> None:
    """Fails if a subscriber's 2**64 addresses have as many tries, or two networks share theirs."""
    door = Door(OLD)
    tries = [door.fail(1, f"2001:db8:0:1::{index:x}")[0] for index in range(FREE_FAILURES + 2)]
    assert tries == [401] * FREE_FAILURES + [429] * 2
    for other in ("2001:db8:0:2::1", "192.0.2.7", "192.0.2.8"):
        assert door.fail(1, other) == [401]
    assert client_network("::ffff:192.0.2.7") == client_network("192.0.2.7") == "192.0.2.7"
    assert (
        client_network("2001:db8:0:1:ffff::1")
        == client_network("2001:db8:0:1::")
        == "2001:db8:0:1::/64"
    )
    assert client_network("fe80::1%eth0") == "fe80::/64"
    assert client_network("") == client_network("a" * 10_000) == ""


def test_many_addresses_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a table grows with the number of attackers, or the oldest are not the ones that are
    forgotten.
    """
    throttle = FailureThrottle(Clock())
    for number in range(MOST_NETWORKS + 5000):
        assert throttle.seconds_to_wait(f"network {number}", None) == 0
        assert throttle.seconds_to_wait(f"network {number}", 0) == 0
    assert len(throttle._recovered_at) == len(throttle._proven) == MOST_NETWORKS
    assert (f"network {MOST_NETWORKS + 4999}", 0) in throttle._proven
    assert ("network 4999", 0) not in throttle._proven


def test_what_others_cannot_reach_is_told_from_what_they_can() -> None:
    """Fails if a form of this machine's own address is taken for another's, or the reverse."""
    for own in ("localhost", "LOCALHOST", "127.0.0.1", "127.255.0.1", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(own), own
    for other in (
        "",
        "0.0.0.0",
        "::",
        "localhost.example",
        "127.1",
        "192.0.2.1",
        "::ffff:192.0.2.1",
    ):
        assert not is_loopback(other), other


# The keys of a service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With an old and a new key, and one that begins with the old one."""
    environment = {"LLAMAGEN_API_KEY": f"{OLD}, {NEW},{LONGER}"}
    with running_service(tmp_path_factory.mktemp("keys"), environment=environment) as service:
        yield service


def client_at(service: Service, address: str) -> httpx2.Client:
    """A client with an address of its own: all of 127.0.0.0/8 is this machine's."""
    return httpx2.Client(
        base_url=service.url, transport=httpx2.HTTPTransport(local_address=address)
    )


def test_each_of_several_keys_is_accepted(service: Service) -> None:
    """Fails if a key cannot be replaced without a moment in which clients have none that works."""
    with client_at(service, "127.1.0.1") as client:
        for key in (OLD, NEW, LONGER):
            assert (
                client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code
                == 200
            )
        for wrong in (f"{OLD},{NEW}", f"{OLD}, {NEW}", OLD[:-1], ","):
            assert (
                client.get("/v1/models", headers={"Authorization": f"Bearer {wrong}"}).status_code
                == 401
            )


def test_no_key_is_in_the_log(service: Service) -> None:
    """Fails if one of several is not masked, or one that is part of another leaves the rest of that
    one to be read.
    """
    with client_at(service, "127.1.0.2") as client:
        for key in (OLD, NEW, LONGER):
            answer = client.get(f"/v1/{key}/x", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 404
            assert service.logged(answer.headers["x-request-id"])["path"] == "/v1/[key]/x"
    assert not [part for part in (OLD, NEW, LONGER, "-and-more") if part in service.log]


@pytest.mark.parametrize(
    "scheme", ["Bearer ", "bearer ", "BEARER ", "bEaReR ", "Bearer  ", "bearer     "]
)
def test_the_scheme_may_be_written_in_any_case_and_followed_by_spaces(
    service: Service, scheme: str
) -> None:
    """Fails if clients that keep to RFC 9110, section 11.1 and 11.4, are refused."""
    with client_at(service, "127.1.0.3") as client:
        assert (
            client.get("/v1/models", headers={"Authorization": f"{scheme}{NEW}"}).status_code == 200
        )


@pytest.mark.parametrize(
    "scheme", ["Bearer\t", "Bearer", "Basic ", "Bearer: ", "Bearer,", "Token ", ""]
)
def test_other_schemes_are_refused(service: Service, scheme: str) -> None:
    """Fails if leniency goes further than the standard."""
    schemes = ["Bearer\t", "Bearer", "Basic ", "Bearer: ", "Bearer,", "Token ", ""]
    with client_at(service, f"127.1.1.{schemes.index(scheme)}") as client:
        assert (
            client.get("/v1/models", headers={"Authorization": f"{scheme}{NEW}"}).status_code == 401
        )


def guess(service: Service, address: str, times: int) -> Counter[int]:
    """Sends wrong keys on one connection from an address; counts the answers' statuses."""
    found: Counter[int] = Counter()
    target = urlsplit(service.url)
    where = (target.hostname or "", target.port or 0)
    with (
        socket.create_connection(where, timeout=30, source_address=(address, 0)) as connection,
        connection.makefile("rb") as answers,
    ):
        for number in range(times):
            lines = [
                "GET /v1/models HTTP/1.1",
                "Host: localhost",
                f"Authorization: Bearer wrong-{number}",
            ]
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            found[int(answers.readline().split()[1])] += 1
            length = 0
            while (line := answers.readline()) != b"\r\n":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            answers.read(length)
    return found


def test_a_service_checks_few_keys_of_an_attacker(service: Service) -> None:
    """Fails if more than ten keys and one every six seconds are tried, whatever the number of
    requests; and others are served.
    """
    begun = time.monotonic()
    found = guess(service, "127.2.0.1", 1000)
    tried = FREE_FAILURES + math.ceil((time.monotonic() - begun) / FAILURE_SECONDS)
    assert set(found) == {401, 429}
    assert FREE_FAILURES <= found[401] <= tried
    right = {"Authorization": f"Bearer {NEW}"}
    with client_at(service, "127.2.0.1") as attacker, client_at(service, "127.2.0.2") as other:
        answer = attacker.get("/v1/models", headers=right)
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == (
            "rate_limit_error",
            "too_many_wrong_keys",
            None,
        )
        assert 1 <= int(answer.headers["retry-after"]) <= FAILURE_SECONDS
        assert attacker.get("/health", headers=right).status_code == 200
        assert other.get("/v1/models", headers=right).status_code == 200


def test_the_comparison_looks_at_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a key is compared until one fits, so that the time tells which one it is, or at its
    own length.
    """
    compared: list[tuple[int, int]] = []
    compare = checks.hmac.compare_digest

    def watch(given: bytes, expected: bytes) -> bool:
        compared.append((len(given), len(expected)))
        return compare(given, expected)

    monkeypatch.setattr(checks.hmac, "compare_digest", watch)
    door = Door(OLD, NEW, LONGER)
    for key in (OLD, NEW, LONGER, "", "x" * 5000):
        compared.clear()
        door.knock(f"Bearer {key}")
        assert compared == [(32, 32)] * 3
