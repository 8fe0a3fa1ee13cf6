"""What h11 reads leniently and this service refuses, beside what it takes as the standard says."""

import asyncio
from typing import Any, cast

import pytest
import uvicorn
from test_http_protocol import on_a_server

from autoregressive.serve.web.app_state import Turns
from autoregressive.serve.web.guards import Guards

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

REFUSED = {
    "a bare CR in an extension": CHUNKED + b"1;a\rb\r\nx\r\n" + END,
    "a bare CR behind the size": CHUNKED + b"1\r\r\nx\r\n" + END,
    "a bare LF in an extension": CHUNKED + b"1;a\nb\r\nx\r\n" + END,
    "a bare LF behind the size": CHUNKED + b"1\nx\r\n" + END,
    "NUL in an extension": CHUNKED + b"1;a\0b\r\nx\r\n" + END,
    "white space behind the size": CHUNKED + b"1 \r\nx\r\n" + END,
    "white space before the size": CHUNKED + b" 1\r\nx\r\n" + END,
    "an extension without a semicolon": CHUNKED + b"1 a\r\nx\r\n" + END,
    "a long extension": CHUNKED + b"1;" + b"a" * 300 + b"\r\nx\r\n" + END,
    "a size of 17 digits": CHUNKED + b"0" * 16 + b"1\r\nx\r\n" + END,
    "a signed size": CHUNKED + b"+1\r\nx\r\n" + END,
    "a size with an underscore": CHUNKED + b"1_0\r\nx\r\n" + END,
    "no size": CHUNKED + b"\r\nx\r\n" + END,
    "a chunk that ends in a bare LF": CHUNKED + b"1\r\nx\n" + END,
    "a bare LF in the trailers": CHUNKED + b"0\r\na: b\n\r\n",
    "a folded trailer": CHUNKED + b"0\r\na: b\r\n c\r\n\r\n",
    "bare LFs": b"GET / HTTP/1.1\nHost: a\n\n",
    "a bare LF behind the request line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "a bare LF behind a header": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "a bare LF before the end": b"GET / HTTP/1.1\r\nHost: a\n\r\n",
    "a bare LF at the end": b"GET / HTTP/1.1\r\nHost: a\r\n\n",
    "a bare CR in a header": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
    "a folded coding": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + END,
    "a coding with a parameter": HEAD + b"Transfer-Encoding: chunked;a=b\r\n\r\n" + END,
    "two codings in one line": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + END,
    "a coding with a comma": HEAD + b"Transfer-Encoding: chunked,\r\n\r\n" + END,
    "a quoted coding": HEAD + b'Transfer-Encoding: "chunked"\r\n\r\n' + END,
    "no coding": HEAD + b"Transfer-Encoding:\r\n\r\n" + END,
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "a space before the colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + END,
    "an empty length": HEAD + b"Content-Length:\r\n\r\n",
    "two spaces in the request line": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a tab in the request line": b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
}
TAKEN = {
    "an extension": CHUNKED + b"1;a=b\r\nx\r\n" + END,
    "an extension in quotes": CHUNKED + b'1;a="b;c"\r\nx\r\n' + END,
    "white space in an extension": CHUNKED + b"1; a = b\r\nx\r\n" + END,
    "capital digits and leading zeros": CHUNKED + b"000A\r\n0123456789\r\n" + END,
    "a trailer": CHUNKED + b"1\r\nx\r\n0\r\na: b\r\n\r\n",
    "a coding in capitals": HEAD + b"Transfer-Encoding: Chunked\r\n\r\n" + END,
    "white space around a coding": HEAD + b"Transfer-Encoding: \t chunked \t\r\n\r\n" + END,
    "the same length twice": HEAD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
}


def first_lines(requests: dict[str, bytes]) -> dict[str, bytes]:
    """The status line that each gets on a connection of its own."""
    answered: dict[str, bytes] = {}

    async def visit(port: int, server: uvicorn.Server) -> None:
        async def ask(name: str, request: bytes) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            answered[name] = await asyncio.wait_for(reader.readline(), 5)
            writer.close()

        await asyncio.gather(*(ask(name, request) for name, request in requests.items()))

    on_a_server(visit)
    return answered


def test_what_another_program_may_read_otherwise_is_refused() -> None:
    """Fails if a request is answered whose end two programs on its way could see in two places."""
    wrong = {name: line for name, line in first_lines(REFUSED).items() if b" 400 " not in line}
    assert not wrong


def test_what_the_standard_allows_is_taken() -> None:
    """Fails if strictness costs a client that speaks HTTP/1.1."""
    wrong = {name: line for name, line in first_lines(TAKEN).items() if b" 200 " not in line}
    assert not wrong


@pytest.mark.parametrize("split", [1, 2, 7])
def test_how_a_request_is_cut_into_packets_makes_no_difference(split: int) -> None:
    """Fails if a bare CR or LF passes because it comes in a packet of its own, or a good line is
    taken for a bad one."""
    bad, good = REFUSED["a bare CR in an extension"], TAKEN["an extension"]
    lines: dict[bytes, bytes] = {}

    async def visit(port: int, server: uvicorn.Server) -> None:
        for request in (bad, good):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for start in range(0, len(request), split):
                writer.write(request[start : start + split])
                await writer.drain()
                await asyncio.sleep(0)
            lines[request] = await asyncio.wait_for(reader.readline(), 5)
            writer.close()

    on_a_server(visit)
    assert b" 400 " in lines[bad]
    assert b" 200 " in lines[good]


def scope(**fields: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "GET",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    } | fields


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"http_version": "1.0"}, 200),
        ({"http_version": "2"}, 200),
        ({"http_version": "1.0", "headers": [(b"transfer-encoding", b"chunked")]}, 400),
        ({"http_version": "2.0"}, 400),
        ({"http_version": "0.9"}, 400),
    ],
)
def test_other_versions_are_refused(fields: dict[str, Any], status: int) -> None:
    """Fails if a version that this service does not speak is answered, or HTTP/1.0 may send chunks,
    which it does not know."""
    told: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            told.append(message["status"])

    guards = Guards(app, lambda scope: None, Turns())
    asyncio.run(cast(Any, guards(scope(**fields), receive, send)))
    assert told == [status]
