"""The requests for images of widespread clients, byte for byte as they send them, and what the
service takes by choice so that these clients work.

The requests were recorded on 2026-11-29 from openai 3.57.0, langchain-community 0.4.2
(`DallEAPIWrapper`) and litellm 1.110.2 (`image_generation`), each with its defaults or with the
settings that its documentation shows. Those of Open WebUI 0.12.4 are what `image_generations` gives
to aiohttp 3.14.5, sent by that. Only Host and the key are put in.
"""

import base64
import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from fake_service import KEY, Service, running_service

_OPENAI = """\
POST /v1/images/generations HTTP/1.1
Host: {host}
Accept-Encoding: gzip, deflate
Connection: keep-alive
authorization: Bearer {key}
accept: application/json
content-type: application/json
user-agent: OpenAI/Python 3.57.0
x-stainless-lang: python
x-stainless-package-version: 3.57.0
x-stainless-os: Linux
x-stainless-arch: x64
x-stainless-runtime: CPython
x-stainless-runtime-version: 3.11.7
x-stainless-async: false
x-stainless-retry-count: 0
x-stainless-read-timeout: 600
Content-Length: {length}

"""
_LANGCHAIN = _OPENAI.replace("x-stainless-read-timeout: 600\n", "")
_LITELLM = _OPENAI.replace("gzip, deflate", "gzip, deflate, zstd").replace(
    "x-stainless-retry", "x-stainless-raw-response: true\nx-stainless-retry"
)
_OPEN_WEBUI = """\
POST /v1/images/generations HTTP/1.1
Host: {host}
Authorization: Bearer {key}
Content-Type: application/json
Accept: */*
Accept-Encoding: gzip, deflate
User-Agent: Python/3.11 aiohttp/3.14.5
Content-Length: {length}

"""
# By the client: head, body, and whether its images are expected in base64 or as URLs.
REQUESTS = {
    "openai": (_OPENAI, '{"prompt":"cat"}', "url"),
    "openai, dall-e-3": (
        _OPENAI,
        '{"model":"dall-e-3","prompt":"cat","n":1,"quality":"hd","response_format":"b64_json",'
        '"size":"1024x1024","style":"vivid","user":"u-1"}',
        "b64_json",
    ),
    "openai, gpt-image-1": (
        _OPENAI,
        '{"model":"gpt-image-1","prompt":"cat","background":"transparent","moderation":"low",'
        '"output_compression":80,"output_format":"webp","quality":"high","size":"1024x1024"}',
        "url",
    ),
    "langchain": (
        _LANGCHAIN,
        '{"model":"dall-e-2","prompt":"cat","n":1,"size":"1024x1024"}',
        "url",
    ),
    "langchain, dall-e-3": (
        _LANGCHAIN,
        '{"model":"dall-e-3","prompt":"cat","n":1,"quality":"hd","size":"1024x1024"}',
        "url",
    ),
    "litellm": (_LITELLM, '{"model":"dall-e-3","prompt":"cat"}', "url"),
    "litellm, gpt-image-1": (
        _LITELLM,
        '{"model":"gpt-image-1","prompt":"cat","n":1,"quality":"high","size":"1024x1024"}',
        "url",
    ),
    "Open WebUI": (
        _OPEN_WEBUI,
        '{"model": "dall-e-2", "prompt": "cat", "n": 1, "size": "512x512", "response_format": '
        '"b64_json"}',
        "b64_json",
    ),
    "Open WebUI, gpt-image-1": (
        _OPEN_WEBUI,
        '{"model": "gpt-image-1", "prompt": "cat", "n": 1, "size": "1024x1024"}',
        "url",
    ),
}
CHOICES = ("--allow-any-size", "--allow-any-model", "--ignore-unknown-fields")
TOLERANT = (*CHOICES, "--default-response-format", "url")


@pytest.fixture(scope="module")
def tolerant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that takes what it may."""
    folder = tmp_path_factory.mktemp("tolerant")
    (folder / "store").mkdir()
    environment = {"LLAMAGEN_API_KEY": KEY}
    flags = [*TOLERANT, "--store-dir", str(folder / "store")]
    with running_service(folder, *flags, environment=environment) as service:
        yield service


def answer_to(service: Service, head: str, body: str) -> tuple[HTTPResponse, bytes]:
    """Sends a request as it was recorded."""
    target = urlsplit(service.url)
    head = head.format(host=target.netloc, key=KEY, length=len(body))
    with socket.create_connection((target.hostname, target.port), timeout=30) as connection:
        connection.sendall((head.replace("\n", "\r\n") + body).encode())
        answer = HTTPResponse(connection)
        answer.begin()
        return answer, answer.read()


def png_or_webp(data: bytes) -> bool:
    """Whether it is the file of an image."""
    return data.startswith(b"\x89PNG") or data[8:12] == b"WEBP"


@pytest.mark.parametrize("client", REQUESTS)
def test_a_known_client_gets_its_image(tolerant: Service, client: str) -> None:
    """Fails if a client that cannot be changed is refused, gets its image where it does not look,
    or is not told what was really made.
    """
    head, body, kind = REQUESTS[client]
    answer, content = answer_to(tolerant, head, body)
    assert answer.status == 200, content
    found = json.loads(content)
    (image,) = found["data"]
    assert list(image) == [kind]
    if kind == "url":
        assert png_or_webp(httpx2.get(image["url"]).content)
    else:
        assert png_or_webp(base64.b64decode(image["b64_json"]))
    assert (found["model"], found["size"]) == ("fake", "32x32")
    warnings = answer.headers.get_all("Warning") or []
    asked = json.loads(body)
    expected = [f'299 - "size {asked["size"]}: images have 32x32"'] if "size" in asked else []
    expected += [f'299 - "model {asked["model"]}: images are of fake"'] if "model" in asked else []
    assert warnings == expected


@pytest.mark.parametrize("client", REQUESTS)
def test_a_strict_service_says_what_it_does_not_make(locked: Service, client: str) -> None:
    """Fails if tolerance is the default, or an error does not name its field."""
    head, body, _ = REQUESTS[client]
    answer, content = answer_to(locked, head, body)
    if "model" in body:
        assert answer.status == 404
        assert json.loads(content)["error"]["param"] == "model"
    else:
        assert answer.status == 200
        assert list(json.loads(content)["data"][0]) == ["b64_json"]
    assert "Warning" not in answer.headers


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0)


def test_openais_client_streams_from_a_tolerant_service(tolerant: Service) -> None:
    """Fails if the default of URLs breaks streams, which have none."""
    events = client_of(tolerant).images.generate(
        model="gpt-image-1", prompt="cat", stream=True, partial_images=2
    )
    kinds = [event.type for event in events]
    assert kinds.count("image_generation.completed") == 1
    assert kinds.count("image_generation.partial_image") == 2


def draw(service: Service, **body: Any) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return service.client.post(
        "/v1/images/generations", json={"prompt": "cat"} | body, headers=headers
    )


def test_unknown_fields_are_named_in_the_answer(tolerant: Service) -> None:
    """Fails if a field that has no effect passes for a setting, or its name breaks the header."""
    answer = draw(tolerant, steps=50, negative_prompt="dog")
    assert answer.status_code == 200
    assert answer.headers.get_list("warning") == ['299 - "ignored: steps, negative_prompt"']
    odd = draw(tolerant, **{'a"b\\\r\nX-Evil: 1': 1, "ü": 2, "x" * 200: 3, "d": 4, "e": 5, "f": 6})
    (warning,) = odd.headers.get_list("warning")
    assert warning.startswith('299 - "ignored: a?b???X-Evil: 1, ?, xxx')
    assert warning.endswith('..., d, e and 1 more"')
    assert "x-evil" not in odd.headers
    # what is known is still checked
    assert draw(tolerant, steps=50, n=11).json()["error"]["param"] == "n"
    assert draw(tolerant, size=7).json()["error"]["param"] == "size"


def test_what_fits_has_no_warning(tolerant: Service) -> None:
    """Fails if a client is warned of nothing."""
    answer = draw(tolerant, size="32x32", model="fake", response_format="b64_json")
    assert "b64_json" in answer.json()["data"][0]
    assert draw(tolerant, size="auto", model=None).status_code == 200
    assert "warning" not in answer.headers


@pytest.mark.parametrize("flag", CHOICES)
def test_each_choice_is_its_own(tmp_path: Path, flag: str) -> None:
    """Fails if one flag allows what another one is for."""
    bodies: dict[str, dict[str, Any]] = {
        "--allow-any-size": {"size": "512x512"},
        "--allow-any-model": {"model": "dall-e-2"},
        "--ignore-unknown-fields": {"steps": 5},
    }
    with running_service(tmp_path, flag) as service:
        taken = {name for name, body in bodies.items() if service.draw(**body).is_success}
    assert taken == {flag}


@pytest.mark.parametrize("call", ["edit", "create_variation"])
def test_edits_and_variations_are_not_supported(locked: Service, call: str) -> None:
    """Fails if a client is told that its path or its file is wrong: no picture is read here,
    however large.
    """
    images = client_of(locked).images
    extra = {"prompt": "cat"} if call == "edit" else {}
    with pytest.raises(openai.BadRequestError) as refused:
        getattr(images, call)(image=("a.png", bytes(3 * 2**20), "image/png"), **extra)
    assert refused.value.code == "not_supported"
    assert refused.value.type == "invalid_request_error"
    assert "are not supported" in refused.value.message
    wrong = httpx2.post(f"{locked.url}/v1/images/edits", content=b"x")
    assert wrong.status_code == 401


def test_urls_by_default_need_a_folder() -> None:
    """Fails if every request of a service would be refused."""
    from test_service_settings import refusal

    said = refusal("--default-response-format", "url")
    assert said == "--default-response-format url goes with --store-dir"
    assert "choose from b64_json, url" in refusal("--default-response-format", "png")
