"""A request that is no HTTP, or asks for another protocol, gives one line of the log."""

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from fake_service import Service, running_service

WEBSOCKET = (
    b"GET /no-such-page HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: "
    b"websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
BAD = {
    "no HTTP": (b"\x16\x03\x01 hello\r\n\r\n", b"400"),
    "a WebSocket": (WEBSOCKET, b"404"),
    "HTTP/2": (WEBSOCKET.replace(b"websocket", b"h2c"), b"404"),
}


@pytest.fixture(scope="module", params=["1", "2"])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """In which this process, or another one, answers HTTP."""
    folder = tmp_path_factory.mktemp("service")
    with running_service(folder, "--api-server-count", request.param) as service:
        yield service


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_gives_one_line(service: Service, what: str) -> None:
    """Fails if uvicorn says in a second line what the line of the request says."""
    sent, status = BAD[what]
    before = len(service.log.splitlines())
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(sent)
        answer = connection.recv(2**16)
    assert answer.split(b" ", 2)[1] == status
    number = answer.lower().split(b"x-request-id: ")[1].split(b"\r\n")[0].decode()
    service.logged(number)
    lines = [json.loads(line) for line in service.log.splitlines()[before:]]
    assert [line["message"] for line in lines if line.get("path") != "/ready"] == ["request"], lines
