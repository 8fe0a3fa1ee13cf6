"""What many slow clients cost in memory; a minute, by hand.

`pytest -m soak tests/web/test_service_memory.py -s`: a minute
or two each."""

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_service import LARGE, Service, running_service
from test_service_connections import address

pytestmark = pytest.mark.soak

READERS, READER_BYTES_PER_SECOND = 1000, 3000
BODIES = 600
MOST_GROWTH_BYTES = 512 * 2**20
SECONDS = float(os.environ.get("SOAK_SECONDS", "75"))
DRAWING = json.dumps({"prompt": "cat", "n": 10}).encode()
REQUEST = (
    b"POST /v1/images/%b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" + DRAWING
)
UNFINISHED = (
    b"POST /v1/codes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048576\r\n\r\n"
    + b" " * (2**20 - 1)
)


def resident_bytes(service: Service) -> int:
    """Of the process that answers HTTP."""
    pages = int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Clients:
    """So many connections that send what they have to, and read so slowly; each that is closed
    comes again a second later."""

    def __init__(self, service: Service, count: int, request: Callable[[int], bytes]) -> None:
        self._where, self._request = address(service), request
        self._selector = selectors.DefaultSelector()
        self._again = {index: 0.0 for index in range(count)}  # when each is to connect
        self._open: dict[int, socket.socket] = {}
        self._unsent: dict[int, memoryview] = {}
        self._read_at = 0.0
        self.read_bytes = self.came_again = 0

    def close(self) -> None:
        for connection in self._open.values():
            connection.close()
        self._open.clear()
        self._selector.close()

    def turn(self) -> None:
        """Connects, sends, and once a second reads."""
        now = time.monotonic()
        for index in [index for index, moment in self._again.items() if moment <= now]:
            self._connect(index)
        for key, _ in self._selector.select(0.05):
            self._send(key.data)
        if now - self._read_at >= 1:
            self._read_at = now
            for index in list(self._open):
                self._read(index)

    def _connect(self, index: int) -> None:
        del self._again[index]
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.connect(self._where)
        self._open[index], self._unsent[index] = connection, memoryview(self._request(index))
        self._selector.register(connection, selectors.EVENT_WRITE, index)

    def _send(self, index: int) -> None:
        try:
            self._unsent[index] = self._unsent[index][self._open[index].send(self._unsent[index]) :]
        except BlockingIOError:
            return
        except OSError:
            self._lose(index)
            return
        if not self._unsent[index]:
            self._selector.unregister(self._open[index])

    def _read(self, index: int) -> None:
        try:
            data = self._open[index].recv(READER_BYTES_PER_SECOND)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.read_bytes += len(data)
        refused = data.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
        if not data or refused:
            self._lose(index)

    def _lose(self, index: int) -> None:
        connection = self._open.pop(index)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)
        connection.close()
        self.came_again += 1
        self._again[index] = time.monotonic() + 1


def run(service: Service, clients: Clients, seconds: float) -> dict[str, Any]:
    """What the service costs while they are there, and how it serves others."""
    before = most = resident_bytes(service)
    slowest = looked_at = most_buffered = 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        clients.turn()
        most = max(most, resident_bytes(service))
        if time.monotonic() - looked_at > 0.5:
            looked_at = time.monotonic()
            assert service.client.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - looked_at)
            most_buffered = max(most_buffered, service.gauges()["http_buffered_bytes"])
    gauges = service.gauges()
    told = {
        "baseline_mib": before >> 20,
        "growth_mib": (most - before) >> 20,
        "slowest_health_seconds": round(slowest, 3),
    }
    told |= {"most_buffered_mib": int(most_buffered) >> 20, "came_again": clients.came_again}
    told |= {name: value for name, value in gauges.items() if name.startswith("http_")}
    print(json.dumps(told))
    return {"growth": most - before}


def test_a_thousand_slow_readers_cost_half_a_gibibyte_at_most(tmp_path: Path) -> None:
    """Fails if their answers, of 6 MB each, are held as long as they like; a drawing is accepted
    again when they have gone."""
    with running_service(tmp_path, "--max-num-seqs", "64", environment={LARGE: "1"}) as service:
        service.faults.set("step_seconds", "0.002")
        service.draw(n=10)  # what the first one allocates is no reader's
        clients = Clients(
            service,
            READERS,
            lambda index: REQUEST % ((b"generations", b"stream")[index % 2], len(DRAWING)),
        )
        growth = run(service, clients, SECONDS)["growth"]
        clients.close()
        service.wait_for(
            lambda: service.gauges()["http_buffered_bytes"] == 0 and service.is_empty(), 60
        )
        assert service.draw().status_code == 200
    assert growth <= MOST_GROWTH_BYTES


def test_six_hundred_unfinished_bodies_cost_half_a_gibibyte_at_most(tmp_path: Path) -> None:
    """Fails if bodies of which the last byte never comes are held for as long as they like."""
    with running_service(tmp_path) as service:
        service.draw()
        clients = Clients(service, BODIES, lambda index: UNFINISHED)
        growth = run(service, clients, SECONDS / 2)["growth"]
        clients.close()
        service.wait_for(lambda: service.gauges()["http_buffered_bytes"] == 0, 60)
        assert service.draw().status_code == 200
    assert growth <= MOST_GROWTH_BYTES
