"""How long a connection lasts whose client sends or reads too slowly; the limits are made short
here.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Coroutine
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from fastapi import Request

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.web import http_protocol, openai_routes
from autoregressive.serve.web.app_state import context_of
from autoregressive.serve.web.connections import Connections
from autoregressive.serve.worker.messages import EngineRequest, ServedRequest

pytestmark = pytest.mark.timing
GET = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "SEND_SECONDS", 0.5)
    monkeypatch.setattr(http_protocol, "READ_SECONDS", 0.5)


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """As many bytes as the path says, once the body is there; a path that begins with "slow" takes
    a second.
    """
    while (await receive()).get("more_body"):
        pass
    path = scope["path"][1:]
    if path.startswith("slow"):
        await asyncio.sleep(1)
    body = b"x" * int(path.removeprefix("slow") or 2)
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", str(len(body)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": body})


def on_a_server(
    visit: Callable[[int, uvicorn.Server], Coroutine[Any, Any, None]], app: Any = answer
) -> None:
    """Runs a visit of a server of ours on a free port."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            options: dict[str, Any] = {
                "ws": "none",
                "lifespan": "off",
                "log_config": None,
                "timeout_graceful_shutdown": 1,
            }
            connections = Connections(most=2**20, most_bytes=2**40)
            options["http"] = partial(http_protocol.PatientProtocol, connections=connections)
            server = uvicorn.Server(uvicorn.Config(app, **options))
            # `serve` would take the signals, too
            serving = asyncio.create_task(server._serve([listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            try:
                await visit(listener.getsockname()[1], server)
            finally:
                server.should_exit = True
                await serving

    asyncio.run(run())


async def until_empty(server: uvicorn.Server, seconds: float) -> None:
    begun = time.monotonic()
    while server.server_state.connections:
        assert time.monotonic() - begun < seconds, "a connection stays open"
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("size", [30_000, 2_000_000])
def test_who_does_not_read_is_dropped_however_little_is_left(size: int) -> None:
    """Fails if a connection stays open for ever because what is left of its answer is too little to
    pause the writing.
    """

    async def visit(port: int, server: uvicorn.Server) -> None:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", port))
            client.sendall(GET % str(size).encode())
            await asyncio.sleep(0.2)
            assert server.server_state.connections
            await until_empty(server, 3)

    on_a_server(visit)


def test_a_request_behind_another_is_not_waited_for_without_end() -> None:
    """Fails if only what comes with its own packet starts the clock."""

    async def visit(port: int, server: uvicorn.Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET % b"" + b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        assert b"200" in await reader.readline()
        await until_empty(server, 3)
        writer.close()

    on_a_server(visit)


def test_who_waits_for_a_slow_answer_is_not_dropped() -> None:
    """Fails if the clock of a request runs on while it is answered, or into the next one."""

    async def visit(port: int, server: uvicorn.Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(GET % b"slow")
            assert b"200" in await asyncio.wait_for(reader.readline(), 5)
            await reader.readuntil(b"xx")
            await asyncio.sleep(0.7)  # idle, as a connection may be between requests
        writer.close()

    on_a_server(visit)


def test_a_slow_reader_who_reads_is_not_dropped() -> None:
    """Fails if the clock counts the whole answer, not what waits."""

    async def visit(port: int, server: uvicorn.Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=8192)
        writer.write(GET % b"600000")
        read = 0
        while read < 600_000:
            chunk = await asyncio.wait_for(reader.read(30_000), 5)
            assert chunk, f"cut off after {read} bytes"
            read += len(chunk)
            await asyncio.sleep(0.03)
        writer.close()

    on_a_server(visit)


def test_a_reader_below_the_least_rate_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if whoever takes a little again and again may keep an answer waiting for ever."""
    monkeypatch.setattr(http_protocol, "LEAST_READ_BYTES_PER_SECOND", 2_000_000)

    async def visit(port: int, server: uvicorn.Server) -> None:
        with socket.socket() as client:
            client.connect(("127.0.0.1", port))
            client.sendall(GET % b"20000000")
            client.setblocking(False)
            begun = time.monotonic()
            read = 0
            while not server.server_state.connections:
                await asyncio.sleep(0.01)
            while server.server_state.connections:
                with contextlib.suppress(BlockingIOError, ConnectionResetError):
                    read += len(client.recv(20_000))  # at most 0.4 MB/s
                await asyncio.sleep(0.05)
                assert time.monotonic() - begun < 5, f"still connected after {read} bytes"
            assert read > 40_000

    on_a_server(visit)


def test_time_in_which_nothing_waits_does_not_count_against_a_reader() -> None:
    """Fails if a stream that says little in a long time counts as one that is read slowly."""

    async def visit(port: int, server: uvicorn.Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET % b"slow")  # a second, and the limit is half of one
        assert b"200" in await asyncio.wait_for(reader.readline(), 5)
        writer.close()

    on_a_server(visit)


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """An answer before the body."""
    headers = [(b"content-length", b"2"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": b"no"})


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"


@pytest.mark.parametrize("limit", ["LINGER_SECONDS", "LINGER_BYTES"])
def test_after_an_early_answer_reading_on_has_an_end(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Fails if a client that was refused may send for ever, or as much as it likes."""
    short = {"LINGER_SECONDS": 0.3, "LINGER_BYTES": 200_000}
    monkeypatch.setattr(http_protocol, limit, short[limit])

    async def visit(port: int, server: uvicorn.Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST)
        assert await asyncio.wait_for(reader.read(), 5)  # to the end: it says no more
        begun, sent = time.monotonic(), 0
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun < 5:
                writer.write(b"x" * 10_000)
                await writer.drain()
                sent += 10_000
                await asyncio.sleep(0.01)
        assert server.server_state.connections == set()
        assert sent >= 50_000, "it was cut off at once"
        if limit == "LINGER_SECONDS":
            assert time.monotonic() - begun < 2
        else:
            assert sent < 1_000_000

    on_a_server(visit, refuse)


def test_who_lingers_does_not_hold_up_the_end() -> None:
    """Fails if the service waits for clients that were refused."""

    async def visit(port: int, server: uvicorn.Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST)
        assert await asyncio.wait_for(reader.read(), 5)
        assert server.server_state.connections
        for connection in list(server.server_state.connections):
            connection.shutdown()
        await until_empty(server, 1)
        writer.close()

    on_a_server(visit, refuse)


def test_a_stream_that_breaks_off_says_so() -> None:
    """Fails if a bug of ours looks like a connection that was lost: the reader gets an error event,
    and the request ends.
    """

    events = iter([b"event: queued\ndata: {}\n\n"])

    async def next_event() -> bytes:
        for event in events:
            return event
        raise ValueError("a bug")

    async def run() -> tuple[bytes, Any, list[Any]]:
        abandoned: list[Any] = []
        state = cast(Any, SimpleNamespace(broker=SimpleNamespace(abandon=abandoned.append)))
        request = Request({"type": "http"})
        served = ServedRequest(EngineRequest(3, 0, 1, SamplingParams(), pixels=True), 0.0)
        response = openai_routes.event_stream(state, request, served, next_event)
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        async def receive() -> Any:
            await asyncio.Event().wait()  # the reader stays

        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        return b"".join(sent), context_of(request.scope), abandoned

    told, context, abandoned = asyncio.run(run())
    assert told.startswith(b"event: queued")
    assert b"event: error" in told
    assert b"internal_error" in told
    assert b"a bug" not in told
    assert context.failed
    assert len(abandoned) == 1


def test_a_connection_closed_for_another_keeps_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fails if one whose answer waits for its reader stays open, uncounted, once it is closed to
    make room."""
    monkeypatch.setattr(http_protocol, "READ_SECONDS", 60.0)

    async def visit(port: int, server: uvicorn.Server) -> None:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", port))
            client.sendall(GET % b"2000000")
            await asyncio.sleep(0.3)
            (protocol,) = cast(Any, server.server_state.connections)
            assert protocol._connections.shed()
            assert protocol._connections.stats.connections == 0
            await until_empty(server, 1)

    on_a_server(visit)
