"""What an answer holds on its way, and what becomes of it if its request turns out to be
no HTTP.
"""

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
from fake_service import CLASS_NAMES, IMAGE_SIZE, fake_model, running_service

from autoregressive.serve.web.app import build_app
from autoregressive.serve.web.app_state import AppState
from autoregressive.serve.worker.messages import Ended, EngineRequest, Image, ServedRequest


class DrawnBroker:
    """Every request that it accepts is drawn already."""

    failure = unhealthy = None

    def __init__(self) -> None:
        self.requests: list[ServedRequest] = []

    def require_ready(self) -> None:
        """It always is."""

    async def accept(self, request: EngineRequest) -> ServedRequest:
        served = ServedRequest(request, 0.0)
        for index in range(request.n):
            served.take(Image(0, index, 0.0, 0.0, 0.0, bytes(IMAGE_SIZE * IMAGE_SIZE * 3)))
        served.take(Ended(0, "finished", 0.0))
        self.requests.append(served)
        return served

    def abandon(self, served: ServedRequest) -> None:
        served.abandon()

    def count(self, outcome: str) -> None:
        """Nobody asks."""


@pytest.mark.parametrize("fails", [False, True])
def test_pictures_that_wait_for_the_disk_are_counted(fails: bool) -> None:
    """Fails if pictures for a slow disk take memory that the byte budget does not see, or stay
    counted afterwards.
    """
    broker, written = DrawnBroker(), threading.Event()
    held: list[int] = []

    def save(pictures: list[bytes], suffix: str) -> list[str]:
        assert written.wait(10)
        held.append(sum(map(len, pictures)))
        if fails:
            raise RuntimeError("a disk of no known kind")
        return [f"http://x/{index}" for index, _ in enumerate(pictures)]

    store = SimpleNamespace(most_of_a_request=10, check=lambda images: None, save=save)

    async def run() -> None:
        state = AppState(
            fake_model("fake"), cast(Any, broker), ThreadPoolExecutor(1), cast(Any, store)
        )
        app: Any = build_app(state, version="0", docs=False, api_keys=())
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": CLASS_NAMES[0], "n": 3, "response_format": "url"}
            asking = asyncio.create_task(client.post("/v1/images/generations", json=body))
            async with asyncio.timeout(10):
                while (
                    not broker.requests
                    or broker.requests[0].held_bytes == 0
                    or broker.requests[0].has_news
                ):
                    await asyncio.sleep(0.01)
            waiting = broker.requests[0].held_bytes
            written.set()
            answer = await asking
        assert answer.status_code == (500 if fails else 200)
        assert waiting == held[0] > 0
        assert broker.requests[0].held_bytes == 0

    asyncio.run(run())


def test_a_request_that_turns_out_to_be_no_http_is_one_line_of_the_log(tmp_path: Path) -> None:
    """Fails if the answer that comes too late ends in a traceback, in a second line, or in the
    wrong outcome.
    """
    head = (
        b"POST /v1/images/generations HTTP/1.1\r\nHost: elsewhere.example\r\nTransfer-Encoding: "
        b"chunked\r\n\r\n"
    )
    with running_service(tmp_path) as service:
        before = len(service.log.splitlines())
        port = int(service.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(head + b"no chunk\r\n")
            status = client.recv(4096).split()[1]
        assert status == b"400"
        service.wait_for(lambda: service.gauges().get('requests_total{outcome="invalid"}') == 1, 5)
        lines = [json.loads(line) for line in service.log.splitlines()[before:]]
        lines = [
            line
            for line in lines
            if line.get("path") not in ("/metrics", "/ready") and line["logger"] != "uvicorn.error"
        ]
        assert [(line.get("status"), line.get("outcome"), line["level"]) for line in lines] == [
            (400, "invalid", "info")
        ]
