"""A drawing of the page that goes on when its reader leaves, and is followed again."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx2
import pytest
from fake_service import CLASS_NAMES, Service, running_service
from starlette.types import Message

from autoregressive.serve.web.kept_drawings import KeptDrawings
from autoregressive.serve.web.openai_routes import EventStream
from autoregressive.serve.web.schema import StreamRequest

STREAM = "/v1/images/stream"


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Service]:
    """A service whose images take more than a second."""
    with running_service(tmp_path) as service:
        service.faults.set("step_seconds", "0.02")
        yield service


def events_of(answer: httpx2.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def read_until(service: Service, kind: str, **body: Any) -> str:
    """Begins a drawing and leaves once an event of that kind has come; the drawing's id."""
    body = {"prompt": "fox", "seed": 7} | body
    with service.client.stream("POST", STREAM, json=body) as answer:
        events = events_of(answer)
        drawing_id: str = next(events)["id"]
        next(event for event in events if event["type"] == kind)
    return drawing_id


def images_of(events: Iterable[dict[str, Any]]) -> dict[int, str]:
    return {one["image_index"]: one["b64_json"] for one in events if one["type"] == "image"}


def follow(service: Service, drawing_id: str) -> list[dict[str, Any]]:
    with service.client.stream("GET", f"{STREAM}/{drawing_id}") as answer:
        assert answer.status_code == 200
        return list(events_of(answer))


def test_a_drawing_is_found_again_by_its_id(slow: Service) -> None:
    """Fails if a drawing ends with its reader although it was to be kept, if it begins anew, or if
    its second reader misses an image.
    """
    whole = slow.client.post(STREAM, json={"prompt": "fox", "seed": 7, "n": 2})
    images = images_of(events_of(whole))
    drawing_id = read_until(slow, "progress", n=2, keep_seconds=30)
    events = follow(slow, drawing_id)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-1] == "done"
    assert events[0]["id"] == drawing_id
    assert len(images) == 2
    assert images_of(events) == images
    first = next(event for event in events if event["type"] == "progress")
    assert first["tokens_drawn"] > 0
    assert slow.client.get(f"{STREAM}/{drawing_id}").status_code == 404
    slow.wait_for(slow.is_empty, 5)


def test_what_nobody_wants_kept_ends_with_its_reader(slow: Service) -> None:
    """Fails if a drawing of which nobody said so goes on for nobody."""
    drawing_id = read_until(slow, "progress", n=10)
    slow.wait_for(slow.is_empty, 1)
    answer = slow.client.get(f"{STREAM}/{drawing_id}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_a_drawing_is_kept_no_longer_than_was_asked_for(slow: Service) -> None:
    """Fails if what nobody follows is held for ever, or the engine works for it."""
    drawing_id = read_until(slow, "progress", n=10, keep_seconds=0.5)
    assert not slow.is_empty()
    slow.wait_for(slow.is_empty, 3)
    assert slow.client.get(f"{STREAM}/{drawing_id}").status_code == 404


def test_a_kept_drawing_can_be_cancelled(slow: Service) -> None:
    """Fails if cancelling on the page lets a drawing go on for a minute."""
    drawing_id = read_until(slow, "progress", n=10, keep_seconds=60)
    assert slow.client.delete(f"{STREAM}/{drawing_id}").status_code == 204
    slow.wait_for(slow.is_empty, 1)
    assert slow.client.delete(f"{STREAM}/{drawing_id}").status_code == 404


def test_a_drawing_that_is_complete_waits_for_its_reader(slow: Service) -> None:
    """Fails if images that were drawn while nobody read are lost."""
    drawing_id = read_until(slow, "progress", n=2, keep_seconds=30)
    slow.wait_for(slow.is_empty, 10)
    kinds = [event["type"] for event in follow(slow, drawing_id)]
    assert kinds.count("image") == 2
    assert kinds[-1] == "done"


def test_a_drawing_has_one_reader(slow: Service) -> None:
    """Fails if two readers share out the events of a drawing between them."""
    body = {"prompt": "fox", "n": 10, "keep_seconds": 60}
    with slow.client.stream("POST", STREAM, json=body) as answer:
        events = events_of(answer)
        drawing_id = next(events)["id"]
        begun = time.monotonic()
        assert slow.client.get(f"{STREAM}/{drawing_id}").status_code == 404
        assert time.monotonic() - begun < 5
        assert next(events)["type"] in ("queued", "started", "progress")


def test_an_answer_whose_reader_has_left_before_it_begins_ends() -> None:
    """Fails if a page that is loaded again twice at once takes the drawing from the third, and has
    it held for ever.
    """
    ended = []

    async def events() -> AsyncIterator[bytes]:
        yield b"an event"

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)

    answer = EventStream(events(), lambda: ended.append(True))
    asyncio.run(answer({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send))
    assert ended == [True]


@pytest.mark.parametrize("told", [False, True])
def test_a_drawing_whose_id_nobody_knows_is_not_kept(told: bool) -> None:
    """Fails if a run that is cancelled before its first event is drawn for nobody for a while."""
    broker, served = MagicMock(), MagicMock(held_bytes=0, promised_bytes=0, ended=None)
    served.abandoned = False

    async def leave() -> None:
        drawings = KeptDrawings(broker)
        body = StreamRequest.model_validate({"prompt": "fox", "keep_seconds": 30})
        kept = drawings.keep(served, body)
        kept.told = told
        drawings.leave(kept)

    asyncio.run(leave())
    assert broker.abandon.called != told


@pytest.mark.parametrize("seconds", [-1, 301, "1"])
def test_how_long_a_drawing_is_kept_has_a_limit(slow: Service, seconds: Any) -> None:
    """Fails if a client can have the engine draw for nobody for hours."""
    answer = slow.client.post(STREAM, json={"prompt": CLASS_NAMES[0], "keep_seconds": seconds})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "keep_seconds"


def test_other_clients_cannot_follow(tmp_path: Path) -> None:
    """Fails if a key's holder reads what another one draws, whose id a log may have told."""
    keys = ("a" * 32, "b" * 32)
    environment = {"LLAMAGEN_API_KEY": ",".join(keys)}
    with running_service(tmp_path, environment=environment) as service:
        service.faults.set("step_seconds", "0.02")
        service.client.headers["Authorization"] = f"Bearer {keys[0]}"
        drawing_id = read_until(service, "progress", n=4, keep_seconds=60)
        other = {"Authorization": f"Bearer {keys[1]}"}
        for method in ("GET", "DELETE"):
            answer = service.client.request(method, f"{STREAM}/{drawing_id}", headers=other)
            assert answer.status_code == 404
        assert follow(service, drawing_id)[-1]["type"] == "done"
