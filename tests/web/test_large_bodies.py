"""Bodies of a mebibyte that say much: what they cost others while they are read, and afterwards."""

import contextlib
import gc
import json
import os
import socket
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from fake_service import Service, running_service
from fastapi import FastAPI
from fastapi.testclient import TestClient
from test_service_connections import address

from autoregressive.serve.web import checks
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.checks import StrictRoute, read_fields
from autoregressive.serve.web.guards import MOST_BODY_BYTES, _read_body
from autoregressive.serve.web.schema import ImageRequest

REQUESTS = 12
# of which 24 MiB are the bodies, and most of the rest is reading one
MOST_GROWTH_BYTES = 150 * 2**20
# 340,000 lists, which take 25 MB when they are read.
LARGE = b'{"prompt":"cat","n":1,"user":[%b]}' % b",".join([b"[]"] * 340_000)


def resident_bytes(service: Service) -> int:
    pages = int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_what_has_no_effect_is_not_held(tmp_path: Path) -> None:
    """Fails if requests that wait hold values that nobody will look at: 25 MB each."""
    head = b"POST /v1/codes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running_service(tmp_path) as service, contextlib.ExitStack() as stack:
        service.draw()
        service.faults.set("hang")
        before = resident_bytes(service)
        for _ in range(REQUESTS):
            connection = stack.enter_context(socket.create_connection(address(service)))
            connection.sendall(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(LARGE), LARGE))

        def accepted() -> float:
            gauges = service.gauges()
            return gauges["num_requests_running"] + gauges["num_requests_waiting"]

        service.wait_for(lambda: accepted() == REQUESTS, 30)
        assert resident_bytes(service) - before < MOST_GROWTH_BYTES


def test_only_fields_without_effect_are_dropped() -> None:
    """Fails if a field that counts is lost, or one that does not is kept."""
    body: dict[str, Any] = {name: None for name in ImageRequest.model_fields}
    found, _ = read_fields(json.dumps(body).encode(), ImageRequest)
    assert isinstance(found, dict)
    assert set(body) - set(found) == {
        "user",
        "safety_identifier",
        "background",
        "complexity",
        "frame_count",
        "frame_duration_ms",
        "moderation",
        "quality",
        "style",
        "svg",
    }


@pytest.mark.parametrize(("size", "in_the_loop"), [(100, True), (100_000, False)])
def test_long_bodies_are_not_read_in_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, size: int, in_the_loop: bool
) -> None:
    """Fails if everybody waits while a long body is read, or a short one takes a thread."""
    read_json = checks.read_json
    threads: list[str] = []

    def watched(body: bytes) -> object:
        threads.append(threading.current_thread().name)
        return read_json(body)

    monkeypatch.setattr(checks, "read_json", watched)
    app = FastAPI()
    app.router.route_class = StrictRoute
    app.state.adapt = lambda fields, schema: []
    loops: list[str] = []

    @app.post("/draw")
    async def draw(body: ImageRequest) -> str | None:
        loops.append(threading.current_thread().name)
        return body.prompt

    with TestClient(app) as client:
        answer = client.post("/draw", json={"prompt": "cat", "user": "x" * size})
    assert answer.json() == "cat"
    assert (threads == loops) == in_the_loop


def test_a_body_that_is_too_large_is_not_held_after_its_refusal() -> None:
    """Fails if a refusal keeps what was read of the body until the garbage collector runs, which a
    service lets run rarely.
    """

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(MOST_BODY_BYTES // 2), "more_body": True}

    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(20):
            with contextlib.suppress(ApiError):  # an event loop would make cycles of its own
                _read_body({"headers": []}, receive, keeps=True).send(None)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held < 5 * MOST_BODY_BYTES
