"""What a client hears that finds all connections busy, or whose keys are slowed down."""

import asyncio
import http.client
import json
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
from fake_service import Service

from autoregressive.serve.web import checks
from autoregressive.serve.web import server as web_server
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.checks import FREE_FAILURES, Authentication
from autoregressive.serve.web.connections import REFUSED_SOCKETS, Connections
from autoregressive.serve.web.server import Acceptor


def on_a_full_process(visit: Callable[[int, Acceptor], Coroutine[Any, Any, None]]) -> None:
    """Runs a visit of an acceptor that has no room for any connection."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
            acceptor = Acceptor(listener, cast(Any, None), Connections(0, 1000))
            try:
                await asyncio.wait_for(visit(listener.getsockname()[1], acceptor), 20)
            finally:
                acceptor.close()

    asyncio.run(run())


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_server, "_REFUSE_AFTER_SECONDS", 0.0)


def test_a_refusal_reaches_who_still_sends() -> None:
    """Fails if the connection is reset while the client sends its body, so that it sees no answer,
    or the answer has no number."""

    def post(port: int) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/v1/codes", b"x" * 200_000)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body

    async def visit(port: int, acceptor: Acceptor) -> None:
        for _ in range(20):
            status, headers, body = await asyncio.to_thread(post, port)
            assert status == 503
            assert headers["x-request-id"].startswith("req_")
            assert headers["connection"] == "close"
            assert int(headers["retry-after"]) > 0
            assert json.loads(body)["error"]["code"] == "overloaded"

    on_a_full_process(visit)


def test_refused_connections_are_bounded_in_number_and_time() -> None:
    """Fails if clients that never close keep descriptors, or get no answer beyond the bound."""

    async def visit(port: int, acceptor: Acceptor) -> None:
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        for reader, _ in clients:
            assert (await reader.read()).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert len(acceptor._refused) <= REFUSED_SOCKETS
        while acceptor._refused:
            await asyncio.sleep(0.02)
        for _, writer in clients:
            writer.close()

    on_a_full_process(visit)


def test_guesses_that_are_slowed_down_write_a_line_a_second(locked: Service) -> None:
    """Fails if each throttled guess writes a line, or none tells how many there were."""
    statuses = Counter(
        locked.client.get("/v1/models", headers={"Authorization": f"Bearer {index}"}).status_code
        for index in range(200)
    )
    assert statuses[401] >= 10
    assert statuses[429] == 200 - statuses[401]

    def told() -> list[dict[str, Any]]:
        return [line for line in map(json.loads, locked.log.splitlines()) if "guesses" in line]

    locked.wait_for(lambda: sum(line["guesses"] for line in told()) == statuses[429], 5)
    assert all(line["level"].lower() == "warning" for line in told())
    requests = [line for line in map(json.loads, locked.log.splitlines()) if "status" in line]
    assert [line for line in requests if line["status"] == 429] == []
    assert len([line for line in requests if line["status"] == 401]) == statuses[401]


def test_a_warning_a_second_counts_what_happened(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a count is lost or told twice, or there is a line for each."""
    monkeypatch.setattr(checks, "_WARNING_SECONDS", 0.05)

    async def run() -> None:
        guard = Authentication(["key"], lambda path: False)
        wrong = {"path": "/", "headers": [(b"authorization", b"Bearer wrong")]}
        for count in (FREE_FAILURES, 3, 2):
            for _ in range(count):
                with pytest.raises(ApiError):
                    guard.check(wrong)
            await asyncio.sleep(0.15)

    asyncio.run(run())
    told = [cast(Any, record).fields for record in caplog.records]
    assert told == [{"guesses": 3}, {"guesses": 2}]


def test_a_connection_that_cannot_be_opened_does_not_end_the_others() -> None:
    """Fails if one error while a connection is opened means that nobody is accepted any more."""
    tried = 0

    def protocol() -> Any:
        nonlocal tried
        tried += 1
        raise MemoryError

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            acceptor = Acceptor(listener, protocol, Connections(10, 1000))
            try:
                for _ in range(2):
                    _, writer = await asyncio.open_connection(*listener.getsockname())
                    writer.close()
                while tried < 2:
                    await asyncio.sleep(0.01)
            finally:
                acceptor.close()

    asyncio.run(asyncio.wait_for(run(), 20))
