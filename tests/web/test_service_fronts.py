"""Several processes that answer HTTP for one dispatcher: what holds with one holds with them,
whichever a client meets.
"""

import asyncio
import base64
import io
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
from fake_service import TOKENS, Service, is_alive, running_service
from PIL import Image
from test_service_promises import burst, send, status_of

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.fronts import (
    FRONT_KINDS,
    Accepted,
    AskMetrics,
    Finish,
    FrontLink,
    FrontMessage,
    MetricsText,
    Refused,
    RemoteBroker,
    State,
    Up,
)
from autoregressive.serve.web.store import Store
from autoregressive.serve.worker.messages import Cancel, Ended, EngineRequest, Progress
from autoregressive.serve.worker.process import ChildProcess, connect
from autoregressive.serve.worker.transport import AwakeClock, encode, receive

pytestmark = pytest.mark.timing
FLAGS = (
    "--api-server-count",
    "2",
    "--max-num-seqs",
    "4",
    "--max-queue-size",
    "8",
    "--step-timeout",
    "3",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two fronts, 4 rows; for tests that leave it as it was."""
    with running_service(tmp_path_factory.mktemp("service"), *FLAGS) as service:
        yield service


@pytest.fixture
def lasting(shared: Service) -> Service:
    """The shared one; guided images of 64 tokens take 1.3 s or more."""
    shared.faults.set("step_seconds", "0.02")
    return shared


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """One of its own, as slow."""
    with running_service(tmp_path, *FLAGS) as service:
        service.faults.set("step_seconds", "0.02")
        yield service


def draw(service: Service, **body: Any) -> httpx2.Response:
    """On a connection of its own, so that any front may get it."""
    return httpx2.post(
        f"{service.url}/v1/images/generations", json={"prompt": "cat"} | body, timeout=60
    )


def fronts_met(service: Service, requests: int = 40) -> set[int]:
    """Process ids of the fronts that have connections."""
    clients = [httpx2.Client(base_url=service.url) for _ in range(requests)]
    for client in clients:
        client.get("/health").raise_for_status()
    met = {
        pid
        for pid in service.children
        if len(os.listdir(f"/proc/{pid}/fd")) > len(clients) // 10 + 8
    }
    for client in clients:
        client.close()
    return met


def test_every_front_answers_and_draws_the_same(lasting: Service) -> None:
    """Fails if a front gets no connections, or an image depends on which one asks for it."""
    lasting.faults.set("step_seconds", "0")
    answers = [draw(lasting, seed=5, n=2) for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    assert len({tuple(one["b64_json"] for one in answer.json()["data"]) for answer in answers}) == 1
    assert len(fronts_met(lasting)) == 2


def test_a_stream_has_its_events_in_order(lasting: Service) -> None:
    """The page's: queued, started, progress, previews, its images, done."""
    kinds: list[str] = []
    body = {"prompt": "fox", "n": 2}
    with httpx2.stream("POST", f"{lasting.url}/v1/images/stream", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))
    assert (kinds[0], kinds[-1]) == ("queued", "done")
    assert kinds.count("image") == 2
    assert {"started", "progress", "preview"} <= set(kinds)
    assert kinds.index("started") < kinds.index("image")


def test_waiting_readers_are_told_of_their_place(lasting: Service) -> None:
    """Fails if the queue's order does not reach the front that a waiting reader is at."""
    before = [send(lasting, n=2) for _ in range(3)]
    lasting.wait_for(
        lambda: (
            lasting.gauges().items() >= {("num_requests_running", 1), ("num_requests_waiting", 2)}
        ),
        5,
    )
    places = []
    with httpx2.stream(
        "POST", f"{lasting.url}/v1/images/stream", json={"prompt": "fox"}, timeout=60
    ) as answer:
        for line in answer.iter_lines():
            if '"ahead": ' in line:
                places.append(int(line.split('"ahead": ')[1].split(",")[0]))
    assert [status_of(connection) for connection in before] == [200] * 3
    assert places[0] == 2
    assert len(places) > 1
    assert places == sorted(places, reverse=True)


def test_the_queue_is_one_for_all_fronts(service: Service) -> None:
    """A burst of ten times the queue admits what runs and what may wait, and no accepted request is
    dropped.

    All are one client's, which may have 6 of the 8 places.
    """
    outcomes = asyncio.run(burst(service, [{} for _ in range(80)]))
    statuses = Counter(status for status, _, _ in outcomes)
    assert set(statuses) == {200, 429}
    assert 6 + 2 <= statuses[200] <= 6 + 2 + 2
    assert all(int(headers["retry-after"]) >= 1 for status, _, headers in outcomes if status == 429)
    service.wait_for(
        lambda: service.gauges()['requests_total{outcome="rejected"}'] == statuses[429], 2
    )
    service.wait_for(
        lambda: service.gauges()['requests_total{outcome="success"}'] == statuses[200], 2
    )
    assert service.gauges()["images_total"] == statuses[200]
    assert service.is_empty()


def test_counters_are_the_same_wherever_they_are_asked_for(service: Service) -> None:
    """Fails if a front counts for itself."""
    service.faults.set("step_seconds", "0")
    with ThreadPoolExecutor(8) as pool:
        bodies: list[dict[str, Any]] = [
            {},
            {"n": 2},
            {"top_p": 7},
            {"prompt": "no such thing"},
        ] * 20
        statuses = Counter(
            answer.status_code for answer in pool.map(lambda body: draw(service, **body), bodies)
        )
    assert statuses == {200: 40, 400: 40}
    service.wait_for(lambda: service.gauges()['requests_total{outcome="invalid"}'] == 40, 2)
    service.wait_for(lambda: service.gauges()['requests_total{outcome="success"}'] == 40, 2)
    texts = set()
    for _ in range(12):
        lines = httpx2.get(f"{service.url}/metrics").text.splitlines()
        # The connection that asks is one of those that are counted, and a front tells of it a
        # moment later.
        texts.add("\n".join(line for line in lines if not line.startswith("llamagen:http_")))
    assert len(texts) == 1
    gauges = service.gauges()
    assert gauges["images_total"] == 60
    assert gauges["generation_tokens_total"] == 60 * TOKENS


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/stream", "/v1/codes"])
def test_a_client_that_leaves_frees_its_pages(lasting: Service, path: str) -> None:
    """Within a second, though the engine is two processes away."""
    connections = [send(lasting, path, n=2) for _ in range(3)]
    lasting.wait_for(
        lambda: (
            lasting.gauges().items() >= {("num_requests_running", 1), ("num_requests_waiting", 2)}
        ),
        5,
    )
    for connection in connections:
        connection.close()
    lasting.wait_for(lasting.is_empty, 1)


def test_after_sigterm_accepted_work_finishes(service: Service) -> None:
    """Status 0, new work refused, no process left."""
    with ThreadPoolExecutor(5) as pool:
        callers = [pool.submit(draw, service, seed=seed) for seed in range(5)]
        service.wait_for(lambda: service.holds(running=2, waiting=3), 5)
        children = service.children
        service.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda: service.client.get("/ready").status_code == 503, 2)
        assert draw(service).status_code == 503
        assert [caller.result().status_code for caller in callers] == [200] * 5
    assert service.process.wait(15) == 0
    service.wait_for(lambda: not any(map(is_alive, children)), 1)


def test_a_second_signal_ends_it_at_once(service: Service) -> None:
    """Even while an engine hangs; who waits is told."""
    service.faults.set("hang")
    connection = send(service)
    service.wait_for(lambda: service.gauges()["num_requests_waiting"] == 1, 5)
    children = service.children
    service.process.send_signal(signal.SIGTERM)
    time.sleep(0.7)  # sooner, it would count as the first
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(5) == 1
    assert status_of(connection) == 503
    assert "Traceback" not in service.log
    service.wait_for(lambda: not any(map(is_alive, children)), 1)


@pytest.mark.parametrize("whole_group", [False, True])
def test_while_it_starts_it_can_be_ended(tmp_path: Path, whole_group: bool) -> None:
    """Fails if a front that starts, or an engine that loads, is waited for, or takes a signal to
    the group for its own.
    """
    (tmp_path / "slow_start").write_text("30")
    with running_service(tmp_path, *FLAGS, ready=False, start_new_session=True) as service:
        time.sleep(0.5)
        begun = time.monotonic()
        if whole_group:
            os.killpg(service.process.pid, signal.SIGINT)
        else:
            service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(15) == 0
        assert time.monotonic() - begun < 10
        assert "Traceback" not in service.log


def test_a_lost_engine_is_told_of_by_every_front(service: Service) -> None:
    """/health 503 within 2 s, an error for who waits within 5 s, status 1."""
    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(draw, service, seed=seed) for seed in range(4)]
        service.wait_for(lambda: service.holds(running=2, waiting=2), 5)
        service.faults.set("die")
        lost = time.monotonic()
        service.wait_for(lambda: service.client.get("/health").status_code == 503, 2)
        assert {httpx2.get(f"{service.url}/health").status_code for _ in range(12)} == {503}
        answers = [caller.result(max(0.1, lost + 5 - time.monotonic())) for caller in callers]
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in answers} == {
        (503, "engine_lost")
    }
    assert service.process.wait(10) == 1


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGKILL, "has died"), (signal.SIGSTOP, "has not been heard of")]
)
def test_a_lost_front_ends_the_service(service: Service, number: signal.Signals, why: str) -> None:
    """Fails if the service goes on with fewer processes than it was started with, or leaves some,
    or drops others' work.
    """
    service.faults.set("step_seconds", "0")
    children = service.children
    fronts = fronts_met(service)
    os.kill(fronts.pop(), number)
    assert service.process.wait(30) == 1
    assert f"a process that answers HTTP {why}" in service.log
    service.wait_for(lambda: not any(map(is_alive, children)), 1)


def test_no_front_outlives_a_service_that_is_killed(service: Service) -> None:
    """Fails if an address stays taken by a front that serves nothing."""
    children = service.children
    service.process.kill()
    service.wait_for(lambda: not any(map(is_alive, children)), 5)


def test_a_stored_picture_is_there_for_every_front(tmp_path: Path) -> None:
    """Fails if only the front that stored a picture can lend it, or more are kept than were asked
    for.
    """
    folder = tmp_path / "store"
    folder.mkdir()
    with running_service(
        tmp_path, "--api-server-count", "2", "--store-dir", str(folder), "--store-images", "6"
    ) as service:
        urls = [draw(service, response_format="url").json()["data"][0]["url"] for _ in range(3)]
        for url in urls:
            for _ in range(6):
                picture = httpx2.get(url)
                assert picture.status_code == 200
                Image.open(io.BytesIO(picture.content)).verify()
        for _ in range(20):
            draw(service, response_format="url")
        assert len(list(folder.glob("*.png"))) <= 6


def test_the_key_is_wanted_by_every_front(tmp_path: Path) -> None:
    """Fails if a front is open."""
    with running_service(
        tmp_path, "--api-server-count", "2", environment={"LLAMAGEN_API_KEY": "secret-key"}
    ) as service:
        assert {draw(service).status_code for _ in range(12)} == {401}
        headers = {"Authorization": "Bearer secret-key"}
        data = httpx2.post(
            f"{service.url}/v1/images/generations",
            json={"prompt": "cat"},
            headers=headers,
            timeout=30,
        ).json()
        base64.b64decode(data["data"][0]["b64_json"], validate=True)
        assert "secret-key" not in service.log


def test_an_address_that_is_taken_is_refused(lasting: Service, tmp_path: Path) -> None:
    """Fails if two services share an address without noticing."""
    folder, flags = tmp_path / "second", (*FLAGS, "--port", lasting.url.rsplit(":", 1)[1])
    folder.mkdir()
    with (
        pytest.raises(AssertionError, match="address already in use"),
        running_service(folder, *flags),
    ):
        pass


def test_pictures_are_shared_out_by_their_names(tmp_path: Path) -> None:
    """Fails if a picture that was there at the start is nobody's to tidy, or several processes'."""
    stores = [Store(tmp_path, 30, "http://localhost", index, 3) for index in range(3)]
    for store in stores:
        for _ in range(15):
            store.save([b"picture"], "png")
    assert len(list(tmp_path.iterdir())) == 30
    for index in range(3):
        Store(tmp_path, 3, "http://localhost", index, 3)  # keeps one of its ten
        assert len(list(tmp_path.iterdir())) == 30 - 9 * (index + 1)


def test_what_is_asked_of_a_front_that_is_given_up_is_forgotten() -> None:
    """A client's request that ends before the dispatcher has answered is cancelled there."""

    async def go() -> None:
        ours, theirs = connect()
        finished: list[bool] = []
        broker = RemoteBroker(ours, finished.append, lambda: None, 60)
        theirs.sendall(encode([State(None, None, 0, 1, (), ())]))
        while True:
            try:
                broker.require_ready()
                break
            except ApiError:
                await asyncio.sleep(0.01)
        asking = asyncio.create_task(broker.accept(EngineRequest(-1, 1, 1, SamplingParams(), True)))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        theirs.sendall(encode([Accepted(0, 0)]))
        theirs.sendall(encode([Ended(0, "cancelled", 1.0)]))
        await asyncio.sleep(0.1)
        assert broker._requests == {}
        assert broker._replies == {}
        assert broker._ahead == {}
        heard: list[type] = []
        while len(heard) < 2:
            heard += [
                type(message)
                for message in receive(theirs, FRONT_KINDS)
                if not isinstance(message, Up)
            ]
        assert heard == [EngineRequest, Cancel]
        theirs.sendall(encode([Finish(at_once=True)]))
        await asyncio.sleep(0.05)
        assert finished == [True]
        broker.count("success")
        await broker.close()
        told: list[Up] = []
        while not any(up.answered for up in told):
            told += receive(theirs, FRONT_KINDS)
        assert told[-1].answered == {"success": 1}
        theirs.close()

    asyncio.run(go())


def test_a_front_hears_of_refusals_and_metrics_before_the_pictures_that_wait() -> None:
    """Fails if a supervisor, or a client for whom there is no room, waits until hundreds of
    pictures have been passed on.
    """

    def refuse(order: EngineRequest, forward: object) -> None:
        raise ApiError(429, "the queue is full", "queue_full", None, 3)

    async def go() -> list[FrontMessage | Progress]:
        ours, theirs = connect()
        metrics = SimpleNamespace(text=lambda: b"all is well")
        dispatcher = SimpleNamespace(admit=refuse, metrics=metrics, clock=AwakeClock())
        front = FrontLink(
            cast(ChildProcess, None), ours, cast(Dispatcher, dispatcher), lambda: None
        )
        for number in range(3):
            front._forward(number, Progress(99, number, 1.0))
        front._take(AskMetrics(5))
        front._take(EngineRequest(7, 1, 1, SamplingParams(), True))
        await front.channel.drain(5)
        front.channel.close()
        heard = receive(theirs, FRONT_KINDS) + receive(theirs, FRONT_KINDS)
        theirs.close()
        return heard

    refused = Refused(7, ApiError(429, "the queue is full", "queue_full", None, 3))
    pictures = [Progress(number, number, 1.0) for number in range(3)]
    assert asyncio.run(go()) == [MetricsText(5, b"all is well"), refused, *pictures]
