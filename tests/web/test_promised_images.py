"""Drawings are accepted only if there will be room for their images, however fast the engine is."""

import threading
from pathlib import Path

import httpx2
from fake_service import CLASS_NAMES, LARGE, LARGE_SIZE, running_service

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.web.connections import Connections
from autoregressive.serve.worker.messages import EngineRequest, Image, ServedRequest


def test_images_that_are_to_come_count_until_they_are_here() -> None:
    """Fails if an image counts twice, or for ever, or not while its file is made."""
    served = ServedRequest(
        EngineRequest(0, 0, 2, SamplingParams(), pixels=True), 0.0, image_bytes=100
    )
    assert (served.promised_bytes, served.held_bytes) == (200, 0)
    served.take(Image(0, 0, 0.0, 0.0, 0.0, bytes(100)))
    assert (served.promised_bytes, served.held_bytes) == (100, 100)
    served.abandon()
    assert (served.promised_bytes, served.held_bytes) == (0, 0)


def test_what_is_promised_bounds_what_is_accepted() -> None:
    """Fails if a burst between two looks is not counted, or an image of exactly the budget is
    refused.
    """
    connections = Connections(most=10, most_bytes=1000)
    assert connections.has_room_for(1000, "a")
    connections.promise(600, "a")
    assert connections.has_room_for(400, "b")
    assert not connections.has_room_for(401, "b")
    connections.buffered_bytes += 100
    assert not connections.has_room_for(400, "b")


def test_a_hog_leaves_room_for_others() -> None:
    """Fails if one client that asks for images without end keeps another one out, or two do a
    third.
    """
    for clients, newcomer in ((["a"], "b"), (["a", "b"], "c")):
        connections = Connections(most=10, most_bytes=1000)
        for client in clients * 200:
            if connections.has_room_for(10, client):
                connections.promise(10, client)
        assert not any(connections.has_room_for(10, client) for client in clients)
        assert connections.has_room_for(50, newcomer)


def test_a_burst_of_large_drawings_is_refused_while_nothing_is_buffered_yet(tmp_path: Path) -> None:
    """Fails if an engine that is faster than the encoders can fill memory with what was
    accepted.
    """
    flags = ("--max-buffered-mib", "16", "--step-timeout", "600")
    of_a_request = 10 * 4 * LARGE_SIZE**2  # base64 makes four bytes of the three of a pixel
    fitting = 0
    while fitting == 0 or (fitting + 1) * of_a_request <= 4 * (
        16 * 2**20 - (fitting + 1) * of_a_request
    ):
        fitting += 1
    assert 2 <= fitting <= 4
    with running_service(tmp_path, *flags, environment={LARGE: "1"}) as service:
        service.faults.set("hang")
        answers: list[int] = []

        def draw() -> None:
            body = {"prompt": CLASS_NAMES[0], "n": 10}
            answers.append(
                httpx2.post(
                    f"{service.url}/v1/images/generations", json=body, timeout=60
                ).status_code
            )

        callers = [threading.Thread(target=draw, daemon=True) for _ in range(fitting)]
        for number, caller in enumerate(callers, 1):
            caller.start()

            def all_in(there: int = number) -> bool:
                return service.holds(0, there) or service.holds(1, there - 1)

            service.wait_for(all_in, 10)
        refused = service.draw(n=10)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert "retry-after" in refused.headers
        service.faults.clear("hang")
        for caller in callers:
            caller.join(60)
        assert answers == [200] * fitting
        service.wait_for(lambda: service.draw(n=10).status_code == 200, 10)
