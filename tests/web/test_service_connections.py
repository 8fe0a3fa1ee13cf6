"""What all connections together may cost: descriptors, memory, time. The limit of open files is 256
here, soft and hard."""

import asyncio
import contextlib
import http.client
import json
import os
import resource
import select
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from fake_service import KEY, LARGE, Service, running_service

from autoregressive.errors import UserError
from autoregressive.serve.web import connections as web_connections
from autoregressive.serve.web.connections import Connections, ConnectionStats, Load, Phase

OPEN_FILES = 256
HOSTILE = 2 * OPEN_FILES
HALF_A_HEAD = b"POST /v1/codes HTTP/1.1\r\nHost: localhost\r\nX: "
HALF_A_BODY = b"POST /v1/codes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
GET_A_FILE = b"GET /docs-assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"  # 1.5 MB
GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLOW = 60  # bytes each 5 ms: 12 kB/s, which is faster than the least rate


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with few descriptors and little memory for slow clients, whose pictures are
    large."""
    flags = ("--max-buffered-mib", "16", "--max-num-seqs", "32")
    folder = tmp_path_factory.mktemp("few")
    with running_service(
        folder, *flags, environment={LARGE: "1"}, open_files=OPEN_FILES
    ) as service:
        yield service


def address(service: Service) -> tuple[str, int]:
    host, port = urlsplit(service.url).netloc.split(":")
    return host, int(port)


class Crowd(threading.Thread):
    """Clients that connect, send something and read slowly; each that is closed comes again.

    Args:
        reads: so many bytes each 5 ms at most.
    """

    def __init__(
        self, where: tuple[str, int], count: int, sends: Callable[[int], bytes], reads: int = 1000
    ) -> None:
        super().__init__(daemon=True)
        self._where, self._count, self._sends, self._reads = where, count, sends, reads
        self._over = threading.Event()
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "Crowd":
        for index in range(self._count):
            self._come(index)
        self.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._over.set()
        self.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _come(self, index: int) -> None:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.connect(self._where)
        self._selector.register(connection, selectors.EVENT_WRITE, index)

    def run(self) -> None:
        while not self._over.is_set():
            for key, events in self._selector.select(0.1):
                connection: Any = key.fileobj
                try:
                    if events & selectors.EVENT_WRITE:
                        connection.send(self._sends(key.data))
                        self._selector.modify(connection, selectors.EVENT_READ, key.data)
                        continue
                    if connection.recv(self._reads):
                        continue
                except BlockingIOError:
                    continue
                except OSError:
                    pass
                self._selector.unregister(connection)
                connection.close()
                self._come(key.data)
            time.sleep(0.005)


def probe(service: Service, seconds: float) -> list[float]:
    """How long each /health took, on a connection of its own, ten times a second."""
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.monotonic()
        with socket.create_connection(address(service), timeout=10) as connection:
            connection.sendall(
                b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 200"), "a probe was not answered"
        times.append(time.monotonic() - begun)
        time.sleep(0.1)
    return times


def kinds(index: int) -> bytes:
    """Idle connections, half headers and half bodies."""
    return (b"", HALF_A_HEAD, HALF_A_BODY)[index % 3]


@pytest.mark.timing
@pytest.mark.parametrize("sends", [lambda index: b"", kinds], ids=["idle", "mixed"])
def test_twice_as_many_connections_as_descriptors_hold_up_nobody(
    service: Service, sends: Callable[[int], bytes]
) -> None:
    """Fails if a probe takes a second, the log grows by 10 kB/s or is not JSON, or a drawing under
    way is not delivered."""
    service.faults.set("step_seconds", "0.05")
    known, before = len(service.log), service.gauges()
    drawn: list[httpx2.Response] = []
    drawing = threading.Thread(target=lambda: drawn.append(service.draw()), daemon=True)
    drawing.start()
    service.wait_for(lambda: service.gauges()["num_requests_running"] == 1, 5)
    begun = time.monotonic()
    with Crowd(address(service), HOSTILE, sends):
        times = probe(service, 5)
        drawing.join(20)
        gauges = service.gauges()
        seconds = time.monotonic() - begun
    service.faults.clear("step_seconds")
    assert max(times) < 1
    assert [answer.status_code for answer in drawn] == [200]
    assert gauges["http_connections_shed_total"] > before["http_connections_shed_total"]
    assert len(os.listdir(f"/proc/{service.process.pid}/fd")) < OPEN_FILES - 10
    written = service.log[known:]
    assert len(written) / seconds < 10_000
    told = [json.loads(line) for line in written.splitlines()]
    closed = [line for line in told if line["logger"] == "llamagen.connections"]
    assert 2 <= len(closed) <= seconds + 2
    assert sum(line["shed"] for line in closed) > HOSTILE - OPEN_FILES


@pytest.mark.timing
@pytest.mark.parametrize(
    ("sends", "reads", "most"),
    [(GET_A_FILE, SLOW, 16), (GET_HEALTH * 500, 1000, 16), (GET_HEALTH * 500, 1000, 76)],
    ids=["reads slowly", "pipelines", "many pipeline"],
)
def test_clients_that_keep_all_connections_busy_hold_up_nobody(
    tmp_path: Path, sends: bytes, reads: int, most: int
) -> None:
    """Fails if twice as many clients as there may be connections keep out a probe, or readers of
    files a drawing."""
    with (
        running_service(tmp_path, "--max-connections", str(most)) as service,
        Crowd(address(service), 2 * most, lambda index: sends, reads),
    ):
        for _ in range(5):
            assert max(probe(service, 0.3)) < 1
            if sends == GET_A_FILE:
                assert service.draw().status_code == 200


@pytest.mark.timing
def test_without_a_descriptor_to_accept_with_it_recovers(service: Service) -> None:
    """Fails if it logs for each place of the backlog, or whoever is idle keeps others out."""
    pid, known = service.process.pid, len(service.log)
    # Those of the test before have closed, so that the new ones get the lowest descriptors.
    service.wait_for(lambda: service.gauges()["http_connections"] < 5, 10)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(address(service)))
        service.wait_for(lambda: service.gauges()["http_connections"] >= 20, 5)
        used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        lowest_free = next(number for number in range(OPEN_FILES) if number not in used)
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, OPEN_FILES))
        try:
            times = probe(service, 2)
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert max(times) < 1

    def told() -> list[dict[str, Any]]:
        lines = map(json.loads, service.log[known:].splitlines())
        return [line for line in lines if line["logger"] == "llamagen.connections"]

    service.wait_for(lambda: any(line["out_of_descriptors"] for line in told()), 3)
    assert len(told()) <= 6


def accepted(service: Service) -> float:
    """How many requests are drawn or wait."""
    gauges = service.gauges()
    return gauges["num_requests_running"] + gauges["num_requests_waiting"]


def test_drawings_do_not_take_all_connections(tmp_path: Path) -> None:
    """Fails if clients that wait for drawings keep a probe out, or are cut off for another's
    sake."""
    with running_service(
        tmp_path, "--max-connections", "20", "--max-num-seqs", "2", "--step-timeout", "600"
    ) as service:
        service.faults.set("hang")
        statuses: Counter[int] = Counter()
        body = {"prompt": "cat", "n": 1}

        def draw() -> None:
            """Draws once the connections that look at the gauges leave room for it."""
            with httpx2.Client(base_url=service.url, timeout=60) as client:
                while (status := client.post("/v1/codes", json=body).status_code) == 503:
                    time.sleep(0.05)
            statuses[status] += 1

        callers = [threading.Thread(target=draw, daemon=True) for _ in range(17)]
        # One after the other: a connection that has not sent its request yet may be shed for a new
        # one.
        for number, caller in enumerate(callers, 1):
            caller.start()
            service.wait_for(lambda there=number: accepted(service) == there, 10)  # type: ignore[misc]
        refused = service.draw()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) > 0
        probe(service, 0.3)
        service.faults.clear("hang")
        for caller in callers:
            caller.join(30)
        assert statuses == {200: 17}


def test_bodies_that_come_at_once_do_not_take_all_connections(tmp_path: Path) -> None:
    """Fails if requests are counted only before their bodies have come."""
    with (
        running_service(
            tmp_path, "--max-connections", "20", "--max-num-seqs", "2", "--step-timeout", "600"
        ) as service,
        contextlib.ExitStack() as opened,
    ):
        service.faults.set("hang")
        content = json.dumps({"prompt": "cat"}).encode()
        head = "POST /v1/codes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        clients = [
            opened.enter_context(socket.create_connection(address(service))) for _ in range(19)
        ]
        for client in clients:
            client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode())
        time.sleep(1)  # until all heads are read
        for client in clients:
            client.sendall(content)
        answered, _, _ = select.select(clients, [], [], 10)
        assert answered
        for client in answered:
            assert client.recv(4096).startswith(b"HTTP/1.1 503")
        probe(service, 0.3)
        service.faults.clear("hang")


# Memory


def stalled(service: Service, **body: Any) -> socket.socket:
    """A client that asks for pictures and reads nothing."""
    content = json.dumps({"prompt": "cat"} | body).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
    head += "Content-Type: application/json\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address(service))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def buffered(service: Service) -> float:
    return service.gauges()["http_buffered_bytes"]


@pytest.mark.timing
@pytest.mark.parametrize("stream", [False, True])
def test_unread_pictures_are_bounded_in_all(service: Service, stream: bool) -> None:
    """Fails if unread answers do not count, new drawings are accepted all the same, one whose
    answer was promised room is dropped for want of it, or what has ended is still held."""
    dropped = service.gauges()["http_connections_dropped_total"]
    with contextlib.ExitStack() as stack:
        for _ in range(12):  # 16 MiB may be held in all: two answers of 6 MB
            stack.enter_context(stalled(service, n=10, stream=stream))
        service.wait_for(lambda: buffered(service) > 8 * 2**20, 15)
        refused = service.draw()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        time.sleep(1)  # until no image is still to come
        assert buffered(service) <= 16 * 2**20
        assert service.gauges()["http_connections_dropped_total"] == dropped
    service.wait_for(lambda: buffered(service) == 0, 10)
    assert service.draw().status_code == 200


@pytest.mark.timing
def test_unfinished_bodies_are_bounded_in_all(service: Service) -> None:
    """Fails if bodies that never end do not count, or more of them are read when they are too
    many."""
    head = b"POST /v1/codes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048576\r\n\r\n"
    most, refused = 0.0, 0
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            connection = stack.enter_context(socket.create_connection(address(service)))
            with contextlib.suppress(OSError):  # it is refused before all of this is sent
                connection.sendall(head + b" " * 1_000_000)
            connection.settimeout(0.01)
            with contextlib.suppress(OSError):
                refused += connection.recv(100).startswith(b"HTTP/1.1 503")
            most = max(most, buffered(service))
    assert refused > 10
    assert 4 * 2**20 < most < 24 * 2**20
    service.wait_for(lambda: buffered(service) == 0, 10)


# Early answers


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (401, {}),
        (413, {"Authorization": f"Bearer {KEY}"}),
        (431, {"Authorization": f"Bearer {KEY}", "X": "a" * 60_000, "Y": "b" * 60_000}),
        (400, {"Transfer-Encoding": "unheard-of"}),
    ],
)
def test_an_early_answer_reaches_who_still_sends(
    locked: Service, status: int, headers: dict[str, str], close: bool
) -> None:
    """Fails if the connection is reset while the client sends, so that it sees no answer. Five
    tries: a reset is a race."""
    more = {"Connection": "close"} if close else {}
    for _ in range(5):
        connection = http.client.HTTPConnection(*address(locked), timeout=20)
        connection.request("POST", "/v1/codes", b"x" * 4 * 2**20, headers | more)
        answer = connection.getresponse()
        assert answer.status == status
        assert answer.headers["connection"] == "close"
        assert b'"error"' in answer.read()
        connection.close()


# The parts


class FakeConnection:
    """What `Connections` sees of one."""

    def __init__(self, held: int = 0, left: float | None = None) -> None:
        self.load = Load(held, left)
        self.answers_last = False
        self.closed = False

    def look(self, seconds: float) -> Load:
        """Nothing changes."""
        return self.load

    def drop(self) -> None:
        self.closed = True


def in_a_loop(check: Callable[[], None]) -> None:
    async def run() -> None:
        check()

    asyncio.run(run())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass for `connections`."""
    now = [1000.0]
    monkeypatch.setattr(web_connections.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_the_one_that_is_idle_for_longest_is_closed_first(clock: Callable[[float], None]) -> None:
    """Fails if another order is kept, or one is closed whose answer is under way."""

    def check() -> None:
        connections = Connections(5, 1000)
        busy, body, head, old, young = (FakeConnection() for _ in range(5))
        phases = (Phase.ANSWER, Phase.BODY, Phase.HEAD, Phase.IDLE, Phase.IDLE)
        for connection, phase in zip((busy, body, head, old, young), phases, strict=True):
            connections.move(connection, phase)
        clock(1)
        connections.move(old, Phase.ANSWER)
        connections.move(old, Phase.IDLE)  # it has had an answer: the other one is idle for longer
        clock(2)
        for expected in (young, old, head, body):
            assert connections.make_room()
            assert expected.closed
            connections.move(FakeConnection(), Phase.ANSWER)
        assert not connections.make_room()
        assert not busy.closed
        assert connections.stats == ConnectionStats(connections=5, shed=4, refused=1)

    in_a_loop(check)


def test_a_reader_is_dropped_for_a_new_connection_if_none_is_idle(
    clock: Callable[[float], None],
) -> None:
    """Fails if slow readers keep out whoever comes later, a drawing is cut off for another's sake,
    or the reader goes that took something last."""

    def check() -> None:
        connections = Connections(4, 1000)
        drawing, slow, fast, head = (FakeConnection() for _ in range(4))
        connections.move(drawing, Phase.ANSWER)
        for reader in (slow, fast):
            connections.move(reader, Phase.UNREAD)
        connections.move(head, Phase.HEAD)
        clock(3)
        connections.move(fast, Phase.ANSWER)  # it has taken what waited for it
        connections.move(fast, Phase.UNREAD)
        clock(3)
        for expected in (head, slow, fast):
            assert connections.make_room()
            assert expected.closed
            connections.move(FakeConnection(), Phase.ANSWER)
        assert not connections.make_room()
        assert not drawing.closed

    in_a_loop(check)


def test_a_new_connection_is_not_closed_while_others_read_for_longer(
    clock: Callable[[float], None],
) -> None:
    """Fails if a probe that has just come is closed for the next one, though there are readers."""

    def check() -> None:
        connections = Connections(2, 1000)
        reader, probe = FakeConnection(), FakeConnection()
        connections.move(reader, Phase.UNREAD)
        clock(0.1)
        connections.move(probe, Phase.IDLE)
        assert connections.make_room()
        assert reader.closed
        connections.move(FakeConnection(), Phase.ANSWER)
        assert not connections.has_room  # though there soon will be
        assert not connections.make_room()
        assert not probe.closed
        clock(0.1)
        assert connections.has_room
        assert connections.make_room()
        assert probe.closed

    in_a_loop(check)


def test_readers_that_may_be_dropped_do_not_keep_out_drawings() -> None:
    """Fails if slow readers of files make all drawings fail with `overloaded`."""

    def check() -> None:
        connections = Connections(10, 1000)
        for _ in range(9):
            connections.move(FakeConnection(), Phase.UNREAD)
        assert connections.overload is None
        for _ in range(9):
            connections.move(FakeConnection(), Phase.ANSWER)
        assert connections.overload is not None

    in_a_loop(check)


def test_a_new_connection_is_not_closed_for_an_old_one_that_sends_half_a_request(
    clock: Callable[[float], None],
) -> None:
    """Fails if clients that send half a request and wait keep out whoever comes later, because he
    is idle at first."""

    def check() -> None:
        connections = Connections(3, 1000)
        old, new, newest = (FakeConnection() for _ in range(3))
        connections.move(old, Phase.BODY)
        clock(5)
        connections.move(new, Phase.IDLE)
        clock(0.1)
        connections.move(newest, Phase.IDLE)
        clock(0.1)
        for expected in (old, new, newest):
            assert connections.make_room()
            assert expected.closed
            connections.move(FakeConnection(), Phase.ANSWER)

    in_a_loop(check)


def test_the_slowest_are_dropped_until_the_rest_fits() -> None:
    """Fails if a client is dropped that waits for us, that is not to blame, or that is faster than
    one that stays."""

    def check() -> None:
        connections = Connections(10, 1000)
        ours, small, slow, slower, fast = (
            FakeConnection(400),
            FakeConnection(50, 0.1),
            FakeConnection(400, 2.0),
            FakeConnection(400, 1.0),
            FakeConnection(400, 9.0),
        )
        for connection in (ours, small, slow, slower, fast):
            connections.move(connection, Phase.ANSWER)
        connections._look()
        assert slow.closed
        assert slower.closed
        assert [ours.closed, small.closed, fast.closed] == [False] * 3
        assert connections.buffered_bytes == 850
        assert connections.overload is not None

    in_a_loop(check)


def limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
    monkeypatch.setattr(web_connections.resource, "getrlimit", lambda kind: (soft, hard))


@pytest.mark.parametrize(
    ("soft", "hard", "children", "most"),
    [
        (256, 256, 2, 152),
        (256, 1024, 2, 920),
        (1024, 2**20, 2, 4096),
        (256, resource.RLIM_INFINITY, 9, 4096),
    ],
)
def test_the_default_fits_below_the_limit(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, children: int, most: int
) -> None:
    """Fails if there may be more connections than descriptors."""
    limits(monkeypatch, soft, hard)
    assert web_connections.connection_limit(None, children) == most


def test_more_connections_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if it starts with a promise that it cannot keep, or the message does not say what to
    do."""
    limits(monkeypatch, 256, 256)
    assert web_connections.connection_limit(152, 2) == 152
    with pytest.raises(
        UserError, match=r"max_connections 153: at most 152 connections fit .* 256 .*ulimit -n"
    ):
        web_connections.connection_limit(153, 2)
    limits(monkeypatch, 64, 64)
    with pytest.raises(
        UserError, match=r"limit of open files is 64, which is too low: raise it \(ulimit -n 1024\)"
    ):
        web_connections.connection_limit(None, 2)


def test_the_soft_limit_is_raised_and_the_log_says_so() -> None:
    """Fails if the service stays at a soft limit of 100 where 300 are allowed."""
    code = (
        "import resource; from autoregressive.serve import logs;"
        "from autoregressive.serve.web import connections;"
        "writer = logs.log_everything(2, 'info'); connections.raise_descriptor_limit(); "
        "writer.drain(5);"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    command = [
        "sh",
        "-c",
        'ulimit -Sn 100 && ulimit -Hn 300 && exec "$@"',
        "sh",
        sys.executable,
        "-c",
        code,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["300", "300"]
    line = json.loads(ended.stderr)
    assert (line["before"], line["limit"]) == (100, 300)


def test_the_connections_of_all_fronts_are_counted(tmp_path: Path) -> None:
    """Fails if the metrics are those of one process that answers HTTP."""
    with (
        running_service(tmp_path, "--api-server-count", "2") as service,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(40):
            stack.enter_context(socket.create_connection(address(service)))
        service.wait_for(lambda: service.gauges()["http_connections"] >= 40, 5)
        stack.enter_context(stalled(service, n=1))
        assert service.gauges()["http_connections_dropped_total"] == 0
