"""What the service answers: OpenAI's shapes, the facts, errors. The engine behind it is a fake; its
process and loop are real.
"""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fake_runner import expected_codes
from fake_service import CLASS_NAMES, GRID, IMAGE_SIZE, TOKENS, Service, running_service
from PIL import Image

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.request import Request


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0)


def codes_of(picture: bytes) -> list[int]:
    """The fake decoder's pictures tell their codes."""
    pixels = np.array(Image.open(io.BytesIO(picture)))
    assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    step = IMAGE_SIZE // GRID
    return pixels[::step, ::step, 0].flatten().tolist()


def wanted(label: int, n: int = 1, **params: Any) -> list[list[int]]:
    """What the engine must draw."""
    defaults = {"cfg_scale": 2.0, "top_k": 0}
    return expected_codes(Request(0, label, SamplingParams(n=n, **(defaults | params))), TOKENS)


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def test_openais_client_gets_the_images_it_asked_for(client: openai.OpenAI) -> None:
    """Fails if images are of another class or seed, out of order, or not in OpenAI's shape."""
    answer = client.images.generate(
        prompt="fox", n=3, model="fake", size="auto", extra_body={"seed": 11, "cfg_scale": 1.5}
    )
    assert answer.data is not None
    pictures = [base64.b64decode(one.b64_json or "") for one in answer.data]
    assert [codes_of(picture) for picture in pictures] == wanted(5, n=3, seed=11, cfg_scale=1.5)
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (
        3,
        3 * TOKENS,
        3 + 3 * TOKENS,
    )
    assert answer.output_format == "png"


def test_openais_client_gets_a_stream_of_previews_and_images(
    client: openai.OpenAI, service: Service
) -> None:
    """Previews show what is drawn so far, of the right image; each image ends in one completed
    event.
    """
    service.faults.set("step_seconds", "0.03")
    events = list(
        client.images.generate(
            prompt="fox", n=2, stream=True, partial_images=3, extra_body={"seed": 3}
        )
    )
    service.faults.clear("step_seconds")
    final = wanted(5, n=2, seed=3)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert len(partial) >= 2
    for event in partial:
        image = event.model_dump()["image_index"]
        rows = (2, 4, 6)[event.partial_image_index]
        assert (
            codes_of(base64.b64decode(event.b64_json))[: rows * GRID] == final[image][: rows * GRID]
        )
    for done in completed:
        assert codes_of(base64.b64decode(done.b64_json)) == final[done.model_dump()["image_index"]]
    assert sorted(done.model_dump()["image_index"] for done in completed) == [0, 1]


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    """Fails if errors are not in the shape and with the statuses that the client knows."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="unicorn")
    assert (refused.value.param, refused.value.code) == ("prompt", "invalid_value")
    assert "closest" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="fox", model="dall-e-3")
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError, match="this service has fake"):
        client.models.retrieve("another")


def test_the_fields_without_effect_are_accepted(service: Service) -> None:
    """A client that sends all that OpenAI documents is not refused."""
    fields: dict[str, Any] = {
        "background": "auto",
        "moderation": "low",
        "output_compression": 50,
        "quality": "hd",
        "style": "vivid",
        "user": "u",
        "safety_identifier": "s",
        "size": "auto",
        "model": None,
        "n": None,
        "stream": False,
        "partial_images": 0,
        "response_format": "b64_json",
    }
    assert service.draw(**fields).status_code == 200


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_pictures_say_how_they_were_made(service: Service, output_format: str) -> None:
    """Fails if a format is not what was asked for, or its record is lost or another picture's."""
    answer = service.draw(prompt="dog", seed=5, n=2, output_format=output_format, top_p=0.5).json()
    for index, data in enumerate(answer["data"]):
        picture = Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))
        assert picture.format == output_format.upper()
        if output_format == "png":
            record = json.loads(picture.info["llamagen"])
            assert picture.info["parameters"].startswith("dog (3)")
        else:
            record = json.loads(picture.getexif()[0x010E])["llamagen"]
        expected = {
            "seed": 5,
            "image": index,
            "label": 3,
            "class_name": "dog",
            "top_p": 0.5,
            "images": 2,
        }
        assert record.items() >= expected.items()


def test_one_seed_gives_one_image_and_no_seed_gives_others(service: Service) -> None:
    """Fails if a seed is ignored, or left-out seeds are all the same, or not told."""
    first, again = (service.draw(seed=8).json()["data"] for _ in range(2))
    assert first == again
    without = [service.draw().json() for _ in range(3)]
    assert len({answer["seed"] for answer in without}) == 3
    assert service.draw(seed=without[0]["seed"]).json()["data"] == without[0]["data"]


def test_codes_are_the_engines(service: Service) -> None:
    """Fails if codes are cut, reordered, or drawn otherwise than asked for."""
    params: dict[str, Any] = {
        "n": 2,
        "seed": 1,
        "cfg_scale": 3.0,
        "cfg_interval": 4,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.75,
    }
    answer = service.client.post("/v1/codes", json={"class_label": 2} | params).json()
    assert [one["codes"] for one in answer["data"]] == wanted(2, **params)
    assert (answer["grid"], answer["codebook_size"], answer["usage"]["output_tokens"]) == (
        GRID,
        97,
        2 * TOKENS,
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": "2"}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"cfg_scale": 1001}, "cfg_scale"),
        ({"cfg_interval": -2}, "cfg_interval"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"size": "1024x1024"}, "size"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"partial_images": 1}, "partial_images"),
        ({"response_format": "url"}, "response_format"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "cat dog"}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"class_label": 10}, "class_label"),
        ({"class_label": -1}, "class_label"),
        ({"steps": 3}, "steps"),
    ],
)
def test_what_is_out_of_range_is_a_400_that_names_the_field(
    service: Service, body: dict[str, Any], param: str
) -> None:
    """Fails if a wrong value is drawn, clamped, a 500, or blamed on another field."""
    response = service.draw(**body)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param in error["message"] or "class" in error["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b'{"top_p": NaN}', b'{"top_p": 1e999}'],
)
def test_a_body_that_is_no_request_is_a_400(service: Service, content: bytes) -> None:
    """Fails if it is a 500, or accepted."""
    response = service.client.post(
        "/v1/images/generations", content=content, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    error_of(response)


def test_a_body_of_another_type_is_a_415(service: Service) -> None:
    """Forms of other sites can send text, but not JSON: what is not declared as JSON is
    not read.
    """
    response = service.client.post(
        "/v1/codes", content=b'{"prompt": "cat"}', headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 415
    assert "Content-Type: application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/codes", 405),
        ("POST", "/health", 405),
        ("GET", "/static/../app.py", 404),
    ],
)
def test_what_is_not_there_is_told_in_the_same_shape(
    service: Service, method: str, path: str, status: int
) -> None:
    """Fails if an error is the framework's own."""
    response = service.client.request(method, path)
    assert response.status_code == status
    error_of(response)


def test_every_answer_has_a_number_of_its_own(service: Service) -> None:
    """Also errors, files of the page, and streams; and the log has the number."""
    answers = [service.client.get(path) for path in ("/health", "/", "/nowhere", "/v1/models")]
    answers.append(service.client.post("/v1/images/stream", json={"prompt": "cat"}))
    numbers = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(numbers)) == len(answers)
    assert [service.logged(number)["request_id"] for number in numbers] == numbers


def test_classes_can_be_searched(service: Service) -> None:
    """By part of a name, by id, and with a limit."""

    def found(**query: Any) -> list[str]:
        return [
            one["name"] for one in service.client.get("/v1/classes", params=query).json()["data"]
        ]

    assert found() == list(CLASS_NAMES)
    assert found(search="E") == ["eel", "bee", "hen"]
    assert found(search="7") == ["hen"]
    assert found(limit=2) == ["ant", "bee"]
    assert (
        service.client.get("/v1/classes", params={"search": "e", "limit": 1}).json()["total"] == 3
    )
    assert error_of(service.client.get("/v1/classes", params={"limit": 0}))["param"] == "limit"


def test_the_pages_stream_tells_everything_in_order(service: Service) -> None:
    """Fails if progress, previews or images are missing, or the end comes before them."""
    service.faults.set("step_seconds", "0.03")
    body = {"prompt": "gnu", "n": 2, "seed": 4}
    events = []
    with service.client.stream("POST", "/v1/images/stream", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [
            json.loads(line.removeprefix("data: "))
            for line in response.iter_lines()
            if line.startswith("data: ")
        ]
    service.faults.clear("step_seconds")
    kinds = [event["type"] for event in events]
    assert kinds[0] == "queued"
    assert kinds[-1] == "done"
    assert (
        events[0].items()
        >= {"ahead": 0, "seed": 4, "class_label": 6, "class_name": "gnu", "grid": GRID}.items()
    )
    drawn = [event["tokens_drawn"] for event in events if event["type"] == "progress"]
    assert drawn == sorted(drawn)
    assert drawn[-1] == 2 * TOKENS
    final = wanted(6, n=2, seed=4)
    images = {event["image_index"]: event for event in events if event["type"] == "image"}
    assert [codes_of(base64.b64decode(images[index]["b64_json"])) for index in (0, 1)] == final
    rows = [
        event["rows"]
        for event in events
        if event["type"] == "preview" and event["image_index"] == 0
    ]
    assert rows == sorted(rows)
    assert len(rows) >= 2


def test_the_documentation_needs_no_other_host(service: Service) -> None:
    """Fails if /docs loads anything from elsewhere, or its files are missing."""
    page = service.client.get("/docs").text
    assert "https://" not in page.replace("https://github.com", "")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert f'"docs-assets/{name}"' in page
        assert service.client.get(f"/docs-assets/{name}").status_code == 200
    document = service.client.get("/openapi.json").json()
    assert "/v1/images/generations" in document["paths"]
    assert not any(
        "422" in operation["responses"]
        for path in document["paths"].values()
        for operation in path.values()
    )


def test_without_documentation_there_is_none(tmp_path: Path) -> None:
    """`--disable-docs`; and the store's URLs lead to pictures, of which the oldest go."""
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "mine.txt").write_text("x")
    with running_service(
        tmp_path, "--disable-docs", "--store-dir", str(folder), "--store-images", "2"
    ) as service:
        assert {
            service.client.get(path).status_code
            for path in ("/docs", "/openapi.json", "/docs-assets/swagger-ui.css")
        } == {404}
        urls = [
            service.draw(response_format="url", seed=seed).json()["data"][0]["url"]
            for seed in range(3)
        ]
        assert [service.client.get(url).status_code for url in urls] == [404, 200, 200]
        assert codes_of(service.client.get(urls[2]).content) == wanted(2, seed=2)[0]
        assert len(list(folder.glob("*.png"))) == 2
        assert (folder / "mine.txt").read_text() == "x"
        for name in ("mine.txt", "..%2fmine.txt", "%2e%2e/stderr"):
            assert service.client.get(f"/v1/files/{name}").status_code == 404
