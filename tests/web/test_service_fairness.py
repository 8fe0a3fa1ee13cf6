"""One client cannot keep the others out: shares of the queue and of the engine, and by what a
client is told from another.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from fake_service import Service, running_service

pytestmark = pytest.mark.timing
# all of 127.0.0.0/8 is this machine
HOG, OTHER, THIRD, PROXY = (
    "127.0.0.2",
    "127.0.0.3",
    "127.0.0.4",
    "127.0.0.5",
)
FLAGS = ("--max-num-seqs", "4", "--max-queue-size", "8")
_RETRY_SECONDS = 0.1  # the hog does not care for Retry-After


@dataclass
class Clients:
    """What each address has got."""

    service: Service
    images: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    messages: set[str] = field(default_factory=set)  # of refusals

    def client(self, address: str) -> httpx2.AsyncClient:
        """Connects from this address."""
        limits = httpx2.Limits(max_connections=None)
        transport = httpx2.AsyncHTTPTransport(local_address=address, limits=limits)
        return httpx2.AsyncClient(base_url=self.service.url, transport=transport, timeout=60)

    async def draw(self, client: httpx2.AsyncClient, address: str, n: int) -> None:
        """One request; its images are counted as they come."""
        body = {"prompt": "cat", "n": n, "stream": True}
        async with client.stream("POST", "/v1/images/generations", json=body) as answer:
            self.statuses[address, answer.status_code] += 1
            if answer.status_code != 200:
                self.messages.add(json.loads(await answer.aread())["error"]["message"])
                await asyncio.sleep(_RETRY_SECONDS)
            async for line in answer.aiter_lines():
                self.images[address] += line == "event: image_generation.completed"

    async def keep_drawing(self, address: str, connections: int, n: int) -> None:
        """Asks again and again over so many connections, whatever the answer, until it is
        cancelled.
        """

        async def ask() -> None:
            while True:
                await self.draw(client, address, n)

        async with self.client(address) as client, asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(ask())

    @asynccontextmanager
    async def drawing(
        self, addresses: Sequence[str], connections: int = 10, n: int = 10
    ) -> AsyncIterator[None]:
        """Clients that draw without a pause, each of which already has as many places as it can
        get.
        """
        tasks = []
        try:
            for address in addresses:
                tasks.append(asyncio.create_task(self.keep_drawing(address, connections, n)))
                async with asyncio.timeout(60):
                    while self.statuses[address, 429] == 0:
                        await asyncio.sleep(0.01)
            yield
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks)

    async def next_images(self, addresses: Sequence[str], count: int) -> list[int]:
        """How many of the next images each address gets, once all have got some."""
        async with asyncio.timeout(120):
            while any(self.images[address] < 2 for address in addresses):
                await asyncio.sleep(0.01)
            before = self.images.copy()
            while self.images.total() - before.total() < count:
                await asyncio.sleep(0.01)
        return [self.images[address] - before[address] for address in addresses]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two fronts"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Two guided images at a time; behind a proxy, and another one in front of that."""
    flags = (
        "--api-server-count",
        str(request.param),
        "--forwarded-allow-ips",
        f"{PROXY},10.9.0.0/16",
    )
    with running_service(tmp_path_factory.mktemp("service"), *FLAGS, *flags) as service:
        yield service


@pytest.fixture
def service(shared: Service) -> Iterator[Service]:
    """The shared one, which each test leaves empty; some 30 images a second at most."""
    shared.faults.set("step_seconds", "0.001")
    yield shared
    shared.faults.set("step_seconds", "0.001")
    shared.wait_for(shared.is_empty, 20)


def test_beside_a_hog_another_client_is_never_refused(service: Service) -> None:
    """Fails if a client that keeps the queue full takes the place of one that asks for an image at
    a time.
    """

    async def go() -> Clients:
        clients = Clients(service)
        async with clients.drawing([HOG]), clients.client(OTHER) as other:
            for _ in range(20):
                await clients.draw(other, OTHER, 1)
        return clients

    clients = asyncio.run(go())
    assert clients.statuses[HOG, 429] > 0
    assert clients.statuses[OTHER, 200] == 20, clients.statuses
    assert any("which is your share now" in message for message in clients.messages), (
        clients.messages
    )


@pytest.mark.parametrize("others", [[OTHER], [OTHER, THIRD]], ids=["two clients", "three clients"])
def test_clients_that_wait_get_equal_shares_of_the_engine(
    service: Service, others: list[str]
) -> None:
    """Fails if one that asks for more images over more connections gets more of them, whichever
    process it asks.
    """

    async def go() -> list[int]:
        clients = Clients(service)
        async with clients.drawing([HOG]), clients.drawing(others, connections=6, n=4):
            return await clients.next_images([HOG, *others], 20 * (1 + len(others)))

    images = asyncio.run(go())
    assert all(16 <= count <= 24 for count in images), images


def test_a_client_is_not_told_apart_by_what_it_says_itself(service: Service) -> None:
    """Fails if a header that is not a trusted proxy's, or a key where none is wanted, makes one
    client many.
    """

    async def go() -> list[httpx2.Response]:
        clients = Clients(service)
        async with clients.drawing([HOG]), clients.client(HOG) as client:
            headers = [
                {"X-Forwarded-For": f"10.0.0.{index}", "Authorization": f"Bearer {index}"}
                for index in range(8)
            ]
            return [
                await client.post("/v1/codes", json={"prompt": "cat"}, headers=one)
                for one in headers
            ]

    service.faults.set("step_seconds", "0.01")
    answers = asyncio.run(go())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 6, answers
    assert all("which is your share now" in answer.json()["error"]["message"] for answer in refused)
    assert service.logged(refused[0].headers["x-request-id"])["client"] == HOG


def test_behind_a_trusted_proxy_clients_are_those_that_it_names(service: Service) -> None:
    """Fails if the clients of a proxy share one share, or the log names the proxy instead of the
    client.

    What a client wrote into the header before its proxy added to it does not count.
    """

    async def go() -> list[httpx2.Response]:
        async with Clients(service).client(PROXY) as proxy:

            async def draw(forwarded: str) -> httpx2.Response:
                return await proxy.post(
                    "/v1/codes", json={"prompt": "cat"}, headers={"X-Forwarded-For": forwarded}
                )

            hog = [
                asyncio.create_task(draw(f"198.51.100.{index}, 203.0.113.1, 10.9.0.1"))
                for index in range(20)
            ]
            async with asyncio.timeout(20):
                while sum(task.done() for task in hog) < 20 - 2 - 8:
                    await asyncio.sleep(0.01)
            return [await draw("203.0.113.2"), *await asyncio.gather(*hog)]

    service.faults.set("step_seconds", "0.02")
    other, *hog = asyncio.run(go())
    assert Counter(answer.status_code for answer in hog)[429] >= 20 - 2 - 8
    assert other.status_code == 200
    assert service.logged(other.headers["x-request-id"])["client"] == "203.0.113.2"
    assert {service.logged(answer.headers["x-request-id"])["client"] for answer in hog} == {
        "203.0.113.1"
    }


def test_a_reader_is_told_how_many_start_before_it(service: Service) -> None:
    """Fails if a client is told to wait for all of a hog's requests, or for fewer than those that
    start before its own.
    """

    async def go() -> list[list[int]]:
        clients = Clients(service)
        body = {"prompt": "cat", "n": 2}  # takes all rows
        async with (
            clients.client(HOG) as hog,
            clients.client(OTHER) as other,
            asyncio.TaskGroup() as group,
        ):

            async def places(client: httpx2.AsyncClient) -> list[int]:
                async with client.stream("POST", "/v1/images/stream", json=body) as answer:
                    lines = [line async for line in answer.aiter_lines() if '"ahead": ' in line]
                return [int(line.split('"ahead": ')[1].split(",")[0]) for line in lines]

            tasks = []
            for index, client in enumerate([hog] * 5 + [other] * 2):
                tasks.append(group.create_task(places(client)))
                async with asyncio.timeout(20):
                    while not await asyncio.to_thread(service.holds, 1, index):
                        await asyncio.sleep(0.01)
            service.faults.set("step_seconds", "0.01")  # all have been told their first place
        return [task.result() for task in tasks]

    service.faults.set("step_seconds", "0.1")
    told = asyncio.run(go())
    assert [places[0] for places in told[1:5]] == [0, 1, 2, 3]
    # The other's first comes after the hog's first that waits, its second after two of the hog's.
    assert [places[0] for places in told[5:]] == [1, 3]
    assert all(places == sorted(places, reverse=True) for places in told[5:]), told


def test_first_come_first_served_knows_no_shares(tmp_path: Path) -> None:
    """Fails if the flag does not turn shares off: the hog fills every place, and others are refused
    as before.
    """

    async def go(service: Service) -> list[httpx2.Response]:
        clients = Clients(service)
        async with clients.drawing([HOG]), clients.client(OTHER) as other:
            answers = [await other.post("/v1/codes", json={"prompt": "cat"}) for _ in range(8)]
        assert clients.messages == {
            "8 requests are waiting, and no more are taken: try again later"
        }
        return answers

    with running_service(tmp_path, *FLAGS, "--scheduling-policy", "fcfs") as service:
        service.faults.set("step_seconds", "0.02")
        answers = asyncio.run(go(service))
        assert Counter(answer.status_code for answer in answers)[429] >= 6, answers


def test_all_engines_are_shared(tmp_path: Path) -> None:
    """Fails if a client gets its share of one engine only."""

    async def go(service: Service) -> list[int]:
        clients = Clients(service)
        async with clients.drawing([HOG]), clients.drawing([OTHER], connections=6, n=4):
            return await clients.next_images([HOG, OTHER], 60)

    flags = ("--max-num-seqs", "2", "--max-queue-size", "8")
    with running_service(tmp_path, *flags, environment={"FAKE_SERVICE_ENGINES": "2"}) as service:
        service.faults.set("step_seconds", "0.001")
        images = asyncio.run(go(service))
    assert all(20 <= count <= 40 for count in images), images
