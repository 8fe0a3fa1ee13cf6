"""HEAD wherever GET is, and what a 405 says of the methods that there are."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from fake_service import Service, running_service

PATHS = [
    "/",
    "/static/api.js",
    "/static/style.css",
    "/docs",
    "/docs-assets/swagger-ui-bundle.js",
    "/openapi.json",
]
PATHS += [
    "/health",
    "/ready",
    "/metrics",
    "/version",
    "/v1/models",
    "/v1/models/fake",
    "/v1/classes",
    "/v1/classes?limit=3",
]
WRONG = [
    "/nowhere",
    "/v1/models/other",
    "/v1/classes?limit=0",
    "/v1/classes?limt=1",
    "/v1/files/x",
    "/static/none.js",
    "/static",
]
POSTS = ["/v1/images/generations", "/v1/images/stream", "/v1/codes"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("methods")
    (folder / "store").mkdir()
    with running_service(folder, "--store-dir", str(folder / "store")) as service:
        yield service


def headers_of(answer: httpx2.Response) -> dict[str, str]:
    """Those that do not change from one request to the next."""
    return {
        name: value
        for name, value in answer.headers.items()
        if name not in ("date", "x-request-id")
    }


@pytest.mark.parametrize("path", PATHS + WRONG)
def test_head_is_answered_as_get_without_the_body(service: Service, path: str) -> None:
    """Fails if a header differs, the length is left out or another one, or the status is another
    one.
    """
    got, asked = service.client.get(path), service.client.head(path)
    assert asked.status_code == got.status_code
    found, wanted = headers_of(asked), headers_of(got)
    if path == "/metrics":  # of which each answer is a little longer than the last
        assert int(found.pop("content-length")) > 0
        del wanted["content-length"]
    assert found == wanted
    assert path == "/metrics" or int(found["content-length"]) == len(got.content) > 0
    assert asked.content == b""


def test_head_is_answered_for_a_stored_image(service: Service) -> None:
    """Fails if a cache or a link checker is told that the image is not there."""
    url = service.draw(response_format="url").json()["data"][0]["url"]
    got, asked = service.client.get(url), service.client.head(url)
    assert (asked.status_code, asked.content) == (200, b"")
    assert headers_of(asked) == headers_of(got)
    assert asked.headers["content-type"] == "image/png"
    assert int(asked.headers["content-length"]) == len(got.content)


def test_nothing_follows_the_head_on_the_connection(service: Service) -> None:
    """Fails if bytes of a body are taken for the beginning of the next answer."""
    target = urlsplit(service.url)
    lines = [
        f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for path in [*PATHS, "/nowhere", POSTS[0]]
    ]
    last = "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(
        (target.hostname or "", target.port or 0), timeout=10
    ) as connection:
        connection.sendall("".join([*lines, last]).encode())
        with connection.makefile("rb") as answer:
            answers = answer.read().split(b"HTTP/1.1 ")[1:]
    assert [int(one[:3]) for one in answers] == [200] * len(PATHS) + [404, 405, 200]
    assert all(one.endswith(b"\r\n\r\n") for one in answers[:-1])
    assert answers[-1].endswith(b'{"status":"alive"}')


def test_the_log_tells_head_from_get(service: Service) -> None:
    """Fails if the log says GET, or counts bytes that were not sent."""
    number = service.client.head("/v1/models").headers["x-request-id"]
    line = service.logged(number)
    assert (line["method"], line["path"], line["status"], line["bytes"]) == (
        "HEAD",
        "/v1/models",
        200,
        0,
    )


def test_a_405_names_the_methods_that_there_are(service: Service) -> None:
    """Fails if Allow leaves out HEAD, names what is refused, or is missing (RFC 9110, section
    15.5.6).
    """
    for path in PATHS:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
            answer = service.client.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD"), (
                method,
                path,
            )
    for path in POSTS:
        for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
            answer = service.client.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST"), (method, path)


def test_head_of_a_service_with_a_key_wants_the_key(tmp_path: Path) -> None:
    """Fails if HEAD is a way past the key."""
    with running_service(tmp_path, environment={"LLAMAGEN_API_KEY": "a-key"}) as locked:
        for path in ("/metrics", "/v1/models", "/v1/classes", "/version"):
            assert locked.client.head(path).status_code == 401
            assert (
                locked.client.head(path, headers={"Authorization": "Bearer a-key"}).status_code
                == 200
            )
        assert locked.client.head("/health").status_code == 200


def test_the_description_has_no_operations_of_head(service: Service) -> None:
    """Fails if HEAD doubles every operation in the description, or two operations have one id."""
    paths = service.client.get("/openapi.json").json()["paths"]
    operations = [
        (method, operation) for found in paths.values() for method, operation in found.items()
    ]
    assert {method for method, _ in operations} == {"get", "post", "delete"}
    numbers = [operation["operationId"] for _, operation in operations]
    assert len(set(numbers)) == len(numbers)
    assert all(re.fullmatch(r"\w+", number) for number in numbers)
