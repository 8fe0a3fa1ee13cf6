"""How many headers a request may have, and how long a connection holds them."""

import asyncio
from typing import Any, cast

import pytest
import uvicorn
from test_http_protocol import GET, on_a_server

from autoregressive.serve.web.http_protocol import PatientProtocol

LARGE = b"a" * 50_000


def head(headers: int) -> bytes:
    """A request with so many headers."""
    lines = [b"GET /2 HTTP/1.1", b"Host: x", *(b"X%d:" % index for index in range(headers - 1))]
    return b"\r\n".join([*lines, b"", b""])


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (head(100), 200),
        (head(101), 431),
        (head(8000), 431),
        (
            b"POST /2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
            + b"a:\r\n" * 200
            + b"\r\n",
            431,
        ),
    ],
)
def test_a_request_has_a_hundred_headers_at_most(sent: bytes, status: int) -> None:
    """Fails if a request of 64 KiB can hold a megabyte, as headers that say nothing, or a usual
    number of them is refused."""

    async def visit(port: int, server: uvicorn.Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        first = await asyncio.wait_for(reader.readline(), 5)
        assert first.startswith(b"HTTP/1.1 %d " % status)
        if status == 431:
            assert b"at most 100 of them" in await asyncio.wait_for(reader.read(), 5)
        writer.close()

    on_a_server(visit)


def test_headers_count_while_they_are_held_and_are_not_held_when_they_are_answered() -> None:
    """Fails if a request that is answered holds 50 kB that nobody counts, or one that was answered
    still holds them."""

    async def visit(port: int, server: uvicorn.Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for path in (b"slow", b"slow"):
            writer.write((GET % path).replace(b"\r\n\r\n", b"\r\nX: %b\r\n\r\n" % LARGE))
            await asyncio.sleep(0.5)
            (connection,) = cast(set[Any], server.server_state.connections)
            assert isinstance(connection, PatientProtocol)
            assert len(LARGE) < connection.look(0).held_bytes < len(LARGE) + 1000
            await asyncio.wait_for(reader.readuntil(b"xx"), 5)
            assert connection.look(0).held_bytes == 0
            assert (connection.scope, connection.headers, connection.cycle) == (None, None, None)
        writer.close()

    on_a_server(visit)
