"""What the service keeps to itself and whom it lets in: keys, addresses, errors, limits, and what
is no HTTP at all.
"""

import ast
import asyncio
import contextlib
import inspect
import json
import os
import random
import re
import shutil
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit

import httpx2
import pytest
import uvicorn
from fake_service import Service, fake_model, running_service
from fastapi.routing import APIRoute
from source_tree import source_files
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from autoregressive.serve.web import checks, guards, http_protocol
from autoregressive.serve.web.address_settings import OWN_PATHS
from autoregressive.serve.web.app import build_app, build_routes
from autoregressive.serve.web.app_state import AppState, RequestBroker
from autoregressive.serve.web.connections import Connections
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.store import Store
from autoregressive.serve.web.timeouts import Timeouts

KEY = "k9-Zr/very+secret=="
PARTS_OF_KEY = (KEY, quote(KEY, safe=""))
OPEN = {"/", "/health", "/ping", "/ready", "/docs", "/openapi.json"}
OPEN_FOLDERS = ("/static/", "/docs-assets/")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a key, from the environment, that logs as much as it can."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "store").mkdir()
    flags = ("--store-dir", str(folder / "store"), "--log-level", "debug")
    with running_service(folder, *flags, environment={"LLAMAGEN_API_KEY": KEY}) as service:
        yield service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for everybody on this machine."""
    folder = tmp_path_factory.mktemp("open")
    (folder / "store").mkdir()
    flags = ("--store-dir", str(folder / "store"), "--request-timeout", "1", "--log-level", "debug")
    with running_service(folder, *flags) as service:
        yield service


def send(
    service: Service,
    data: bytes,
    *,
    end: bool = False,
    timeout: float = 5,
    source: str = "127.0.0.1",
) -> bytes:
    """Sends bytes as they are; all that comes back until the service closes, or is silent for so
    long.

    Args:
        end: say that no more will come.
        source: the client's address; each has a few wrong keys free.
    """
    address = urlsplit(service.url)
    target = (address.hostname or "", address.port or 0)
    answer = b""
    with socket.create_connection(
        target, timeout=timeout, source_address=(source, 0)
    ) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while received := connection.recv(2**16):
                answer += received
    return answer


def head(target: str = "/health", method: str = "GET", *lines: str, close: bool = True) -> bytes:
    """The part before the body."""
    ending = ["Connection: close"] if close else []
    return "\r\n".join(
        [f"{method} {target} HTTP/1.1", "Host: localhost", *lines, *ending, "", ""]
    ).encode("latin-1")


def statuses(answer: bytes) -> list[int]:
    """Of all answers on a connection."""
    return [int(number) for number in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def error_of(answer: bytes) -> dict[str, Any]:
    """The error in the only answer on a connection; checks its shape."""
    body = json.loads(answer.split(b"\r\n\r\n", 1)[1])
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return cast(dict[str, Any], body["error"])


# 1. The key


def without_engines(
    folder: Path, use: Callable[[ASGIApp], Awaitable[None]], **settings: Any
) -> None:
    """The application in this process; with no engine behind it, whatever draws runs into a bug."""

    async def run() -> None:
        dispatcher = Dispatcher(cast(Any, None), 0, 1, Timeouts(), 64)
        with ThreadPoolExecutor(1) as encoders:
            state = AppState(
                fake_model("fake"), dispatcher, encoders, Store(folder, 3, "http://localhost")
            )
            await use(build_app(state, version="1", docs=True, api_keys=(), **settings))
        dispatcher.stop(at_once=True)

    asyncio.run(run())


def paths_of(routes: Sequence[Any]) -> Iterator[str]:
    """Of every route, whatever it is made of."""
    for route in routes:
        if isinstance(route, (APIRoute, Route, Mount)):
            yield route.path
        else:  # FastAPI's stand-in for a router that was included
            yield from paths_of(route.original_router.routes)


def route_table(folder: Path) -> list[str]:
    """Paths of all routes of the service, as the application itself has them."""
    broker = cast(RequestBroker, None)
    with ThreadPoolExecutor(1) as encoders:
        state = AppState(fake_model("fake"), broker, encoders, Store(folder, 3, "http://localhost"))
        return list(paths_of(build_routes(state, version="1", docs=True).routes))


WRONG_KEYS: list[list[tuple[str, str]]] = [
    [],
    [("Authorization", "")],
    [("Authorization", "Bearer")],
    [("Authorization", "Bearer ")],
    [("Authorization", "Bearer wrong")],
    [("Authorization", KEY)],
    [("Authorization", f"Bearer {KEY[:-1]}")],
    [("Authorization", f"Bearer {KEY}x")],
    [("Authorization", f"Bearer {KEY.upper()}")],
    [("Authorization", f"Bearer {KEY}, Bearer x")],
    [("Authorization", f"Basic {KEY}")],
    [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
    [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer wrong")],
    [("X-Api-Key", KEY)],
    [("Cookie", f"Authorization=Bearer {KEY}")],
    [("X-Forwarded-For", "127.0.0.1"), ("X-Original-URL", "/health")],
]


def test_the_route_table_is_read_whole(tmp_path: Path) -> None:
    """Fails if the test below overlooks routes."""
    found = route_table(tmp_path)
    expected = {
        "/v1/images/generations",
        "/v1/images/stream",
        "/v1/codes",
        "/v1/models",
        "/v1/classes",
        "/v1/files/{name}",
    }
    expected |= {"/metrics", "/version", *OPEN, "/static/api.js", "/docs-assets/swagger-ui.css"}
    assert expected <= set(found)


def test_no_prefix_can_be_a_path_of_the_services_own(tmp_path: Path) -> None:
    """Fails if `--root-path` does not know a route: a request that a proxy has removed the prefix
    from would have it removed once more, or everybody could use that route.
    """
    assert {path.split("/")[1] for path in route_table(tmp_path)} - {""} == OWN_PATHS


def test_no_route_answers_without_the_key(locked: Service, tmp_path: Path) -> None:
    """Also routes that are yet to be written, every method, and paths that lead nowhere or to a
    route by a detour.
    """
    paths = [
        path.replace("{name}", "x")
        for path in route_table(tmp_path)
        if path not in OPEN and not path.startswith(OPEN_FOLDERS)
    ]
    paths += [
        "/nowhere",
        "/v1",
        "/health/",
        "/ready/x",
        "//health",
        "/health/../v1/models",
        "/Health",
        "/static",
        "/static2/a",
    ]
    paths += [
        "//",
        "/%2e%2e/v1/models",
        "/docs/x",
        "/openapi.jso",
        "/v1/models?x=/health",
        "/v1/models/",
        "/health%2f",
    ]
    answered = []
    with httpx2.Client(base_url=locked.url) as client:
        for path in paths:
            for method in METHODS:
                answer = client.request(method, httpx2.URL(f"{locked.url}{path}"))
                if answer.status_code != 401:
                    answered.append((method, path, answer.status_code))
    assert not answered


def test_what_is_open_shows_nothing_else(locked: Service) -> None:
    """Fails if the page's folder is a way to other routes or files; no answer may be anything but
    the page's, or an error.
    """
    for path in (
        "/",
        "/health",
        "/ready",
        "/static/api.js",
        "/docs",
        "/openapi.json",
        "/docs-assets/swagger-ui.css",
    ):
        assert locked.client.get(path).status_code == 200
    for target in (
        "/static/../v1/models",
        "/static/%2e%2e/v1/models",
        "/static/..%2fapp.py",
        "/static//v1/models",
        "/static/%00",
    ):
        assert statuses(send(locked, head(target))) == [404]
    for method in ("POST", "OPTIONS", "PUT", "DELETE"):
        assert locked.client.request(method, "/health").status_code == 405


@pytest.mark.parametrize("headers", WRONG_KEYS, ids=str)
def test_a_wrong_key_is_refused_in_openais_shape(
    locked: Service, headers: list[tuple[str, str]]
) -> None:
    lines = [f"{name}: {value}" for name, value in headers]
    answer = send(
        locked, head("/v1/models", "GET", *lines), source=f"127.0.1.{WRONG_KEYS.index(headers)}"
    )
    assert statuses(answer) == [401]
    assert error_of(answer) | {"message": ""} == {
        "message": "",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert b"www-authenticate: bearer" in answer.lower()
    assert KEY.encode() not in answer
    missing = error_of(send(locked, head("/v1/models")))["message"]
    assert (error_of(answer)["message"] == missing) == (
        not any(name.lower() == "authorization" for name, _ in headers)
    )


def test_a_refused_request_is_not_waited_for(locked: Service) -> None:
    """Fails if somebody without a key can have bodies read."""
    begun = time.monotonic()
    answer = send(locked, head("/v1/codes", "POST", "Content-Length: 1000000"), timeout=1)
    assert statuses(answer)[:1] == [401]
    assert time.monotonic() - begun < 3


def test_with_the_key_every_route_works(locked: Service, tmp_path: Path) -> None:
    """Fails if a route wants something else than the one key."""
    with httpx2.Client(
        base_url=locked.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ) as client:
        for path in ("/v1/images/generations", "/v1/images/stream", "/v1/codes"):
            assert client.post(path, json={"prompt": "cat"}).status_code == 200
        url = client.post(
            "/v1/images/generations", json={"prompt": "cat", "response_format": "url"}
        ).json()["data"][0]["url"]
        assert client.get(url).status_code == 200
        for path in route_table(tmp_path):
            answer = client.get(path.replace("{name}", "x"))
            assert answer.status_code in (200, 404, 405), path


def test_the_key_is_compared_in_constant_time() -> None:
    """Fails if the time of an answer tells how much of a key is right."""
    tree = ast.parse(inspect.getsource(checks.Authentication))
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "hmac.compare_digest" in called
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            assert not re.search(r"\b(_expected|key|given\[|value)\b", ast.unparse(node)), (
                ast.unparse(node)
            )


def test_the_key_is_in_no_log(locked: Service) -> None:
    """Wherever a careless client puts it: the query, the path, the body, the method, another
    header, a broken request.
    """
    quoted = quote(KEY, safe="")
    targets = (
        f"/v1/models?api_key={quoted}",
        f"/{quoted}",
        f"/v1/files/{quoted}",
        f"/v1/{KEY}",
        f"/static/{quoted}?{quoted}",
    )
    for number, target in enumerate(targets):
        for line in (
            f"Authorization: Bearer {KEY}",
            f"Authorization: Basic {KEY}",
            f"X-Api-Key: {KEY}",
        ):
            send(locked, head(target, "GET", line), source=f"127.0.2.{number}")
    send(locked, head("/health", KEY.replace("/", "").replace("=", "")))
    send(locked, f"GET / HTTP/1.1\r\nAuthorization Bearer {KEY}\r\n\r\n".encode())
    for authorized in (KEY, "wrong"):
        for body in (
            {"prompt": KEY},
            {KEY: 1},
            {"prompt": "cat", "model": KEY},
            {"prompt": "cat", "user": KEY},
        ):
            headers = {"Authorization": f"Bearer {authorized}"}
            locked.client.post("/v1/codes", json=body, headers=headers)
    log = locked.log
    assert log.count('"status": 401') > 10
    assert "[key]" in log
    assert not [part for part in PARTS_OF_KEY if part in log]


def test_what_clients_name_is_cut_in_the_log(service: Service) -> None:
    """Fails if a small request makes a large log, or a line that is no JSON."""
    service.client.get("/" + "a" * 50_000)
    send(service, head("/health", "A" * 50_000))
    send(service, head("/%0a%7b%22level%22%3a%22forged%22%7d%0d%1b[31m"))
    lines = service.log.splitlines()
    assert max(map(len, lines)) < 2000
    assert all(json.loads(line)["level"] != "forged" for line in lines)


# 2. Whom it listens to


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_with_a_key_it_listens_to_all(tmp_path: Path, host: str) -> None:
    with running_service(
        tmp_path, "--host", host, ready=False, environment={"LLAMAGEN_API_KEY": KEY}
    ) as service:
        port = urlsplit(service.url).port
        reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}[host]
        assert httpx2.get(f"http://{reached}:{port}/health").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", socket.gethostname() or "example.org"])
def test_without_a_key_it_does_not_start_for_others(tmp_path: Path, host: str) -> None:
    """One line, no traceback, no socket; test_service_settings.py has more addresses, and the
    status.
    """
    with (
        pytest.raises(AssertionError, match="did not start") as refused,
        running_service(tmp_path, "--host", host),
    ):
        pass
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert len(lines) == 1
    assert f"--host {host}: others can reach this address, so set a key" in lines[0]
    assert "Traceback" not in str(refused.value)


def test_by_default_it_listens_on_this_machine_only(service: Service) -> None:
    """Read from the system's table of sockets, which holds addresses as hexadecimal numbers."""
    port = f":{urlsplit(service.url).port or 0:04X}"
    tables = [Path(f"/proc/{service.process.pid}/net/{name}") for name in ("tcp", "tcp6")]
    rows = [
        line.split()
        for table in tables
        if table.exists()
        for line in table.read_text().splitlines()[1:]
    ]
    listening = {
        row[1].removesuffix(port) for row in rows if row[1].endswith(port) and row[3] == "0A"
    }
    assert listening == {"0100007F"}


# 3. Other sites


@pytest.mark.parametrize(
    "path",
    ["/", "/health", "/v1/models", "/v1/codes", "/static/api.js", "/nowhere", "/openapi.json"],
)
@pytest.mark.parametrize("which", ["service", "locked"])
def test_no_other_site_is_given_leave(
    request: pytest.FixtureRequest, which: str, path: str
) -> None:
    """Fails if a page of another origin may read answers, or a preflight is granted."""
    asked: Service = request.getfixturevalue(which)
    origin = {
        "Origin": "https://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "*",
    }
    for method in ("OPTIONS", "GET", "POST"):
        answer = asked.client.request(
            method, path, headers=origin | {"Access-Control-Request-Private-Network": "true"}
        )
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert "evil.example" not in answer.text
        if method == "OPTIONS":
            assert answer.status_code in (401, 404, 405)


LIES = [
    "Host: evil.example",
    "X-Forwarded-Host: evil.example",
    "X-Forwarded-Proto: https",
    "X-Forwarded-Prefix: /evil.example",
]
LIES += [
    "Forwarded: host=evil.example;proto=https",
    "X-Forwarded-For: evil.example",
    "Referer: http://evil.example/",
]
LIES += ["X-Original-URL: /evil.example", "X-Request-ID: http://evil.example"]
TARGETS = [
    "/",
    "/health",
    "/health/",
    "/v1/models/",
    "/static",
    "/static/",
    "/docs",
    "/docs-assets",
    "/openapi.json",
]
TARGETS += [
    "/v1/files/x/",
    "/version",
    "/metrics",
    "//evil.example/static",
    "http://evil.example/health",
    "/static//evil.example",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("which", ["service", "locked"])
def test_what_a_request_says_of_itself_is_in_no_answer(
    request: pytest.FixtureRequest, which: str, target: str
) -> None:
    """Fails if a redirect, a link or an error leads to where the request says that it came from."""
    lies = LIES if which == "service" else [*LIES, f"Authorization: Bearer {KEY}"]
    lines = "\r\n".join([f"GET {target} HTTP/1.1", *lies, "Connection: close", "", ""])
    answer = send(request.getfixturevalue(which), lines.encode())
    assert statuses(answer)
    assert not 300 <= statuses(answer)[0] < 400
    assert b"evil.example" not in answer


def test_the_urls_of_images_are_the_services_own(locked: Service, tmp_path: Path) -> None:
    """Where it listens, or --public-url; never the request's Host. And a client cannot choose a
    file's name.
    """
    headers = {
        "Host": "evil.example",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "https",
    }
    headers["Authorization"] = f"Bearer {KEY}"  # without a key, such a Host is refused
    body = {"prompt": "cat", "response_format": "url"}
    url = locked.client.post("/v1/images/generations", json=body, headers=headers).json()["data"][
        0
    ]["url"]
    assert re.fullmatch(
        re.escape(locked.url) + r"/v1/files/[0-9a-f]{32}\.png\?expires=\d+&signature=[0-9a-f]{64}",
        url,
    )
    (tmp_path / "store").mkdir()
    flags = (
        "--store-dir",
        str(tmp_path / "store"),
        "--public-url",
        "https://pictures.example/of/",
        "--api-key",
        KEY,
    )
    with running_service(tmp_path, *flags) as public:
        url = public.client.post("/v1/images/generations", json=body, headers=headers).json()[
            "data"
        ][0]["url"]
    assert re.fullmatch(r"https://pictures\.example/of/v1/files/[0-9a-f]{32}\.png\?expires=.+", url)


def test_a_stored_image_that_somebody_deleted_is_a_404(service: Service) -> None:
    url = service.draw(response_format="url").json()["data"][0]["url"]
    folder = Path(service._log).parent / "store"
    (folder / url.rsplit("/", 1)[1].partition("?")[0]).unlink()
    assert service.client.get(url).status_code == 404


@pytest.mark.parametrize(
    "value", ["bytes=garbage", "items=0-1", "bytes=999999999-", "bytes=0-0", "bytes=0-0,2-3,5-9"]
)
def test_ranges_are_passed_over(service: Service, value: str) -> None:
    """Fails if the framework answers for itself, in plain text, or a file comes in pieces that
    nobody has documented.
    """
    for path in ("/", "/static/api.js", "/docs-assets/swagger-ui.css"):
        answer = service.client.get(path, headers={"Range": value})
        assert answer.status_code == 200
        assert answer.content == service.client.get(path).content
    assert service.client.get("/static/api.js").headers["accept-ranges"] == "none"


# 4. Errors

LEAKS = re.compile(
    r"Traceback|File \"|\.py\b|\b0x[0-9a-f]{3,}|site-packages|(?<![\w/])"
    r"/(usr|home|root|tmp|opt|var|etc|proc)\b"
    r"|\b(?!Retry)[A-Z]\w*(Error|Exception|Warning)\b|pydantic|starlette|uvicorn"
    r"|fastapi|torch|asyncio|object at|line \d"
)


def check_error(answer: httpx2.Response, *own: object) -> None:
    """OpenAI's shape, and nothing of how the service is made; `own`: paths that it must
    not tell.
    """
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        answer.status_code, "server_error" if answer.status_code >= 500 else "invalid_request_error"
    )
    assert body["error"]["type"] == kind
    found = LEAKS.search(answer.text)
    assert found is None, f"{found.group()} in {answer.text}"
    assert not [one for one in (sys.prefix, os.getcwd(), *own) if str(one) in answer.text]


BODIES: dict[str, str | bytes] = {
    "no body": b"",
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "a string": b'"cat"',
    "deep": b"[" * 100_000,
    "deep in a field": b'{"user":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "many fields": json.dumps({f"f{index}": 1 for index in range(60_000)}),
    "an endless number": b'{"n":' + b"1" * 5000 + b"}",
    "a huge class": b'{"class_label":' + b"1" * 4000 + b"}",
    "a huge seed": b'{"prompt":"cat","seed":' + b"9" * 30 + b"}",
    "a huge scale": b'{"prompt":"cat","cfg_scale":' + b"9" * 400 + b"}",
    "an infinite scale": b'{"prompt":"cat","cfg_scale":1e999}',
    "NaN": b'{"prompt":"cat","temperature":NaN}',
    "half a character": b'{"prompt":"\\ud800"}',
    "half a character in a name": b'{"\\ud800":1}',
    "half a character as model": b'{"prompt":"cat","model":"\\udfff"}',
    "NUL": b'{"prompt":"\\u0000"}',
    "control characters": b'{"prompt":"a\\u001b[31m\\u202e\\r\\nSet-Cookie: a=b"}',
    "a long prompt": json.dumps({"prompt": "a" * 900_000}),
    "a slow prompt": json.dumps({"prompt": "e a o " * 160}),
    "a digit of another script": '{"prompt":"²"}',
    "an unknown field": b'{"prompt":"cat","__class__":{"__init__":1}}',
    "an object as prompt": b'{"prompt":{"$gt":""}}',
    "a format string": b'{"prompt":"{0.__class__.__init__.__globals__} %s%n"}',
    "a true count": b'{"prompt":"cat","n":true}',
    "a size beyond the model": b'{"prompt":"cat","size":"99999x99999"}',
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/stream", "/v1/codes"])
def test_a_wrong_body_is_a_400_that_tells_nothing(service: Service, path: str, name: str) -> None:
    """Fails if it is a 500, takes long enough to hold up others, or shows what the service is made
    of.
    """
    begun = time.monotonic()
    answer = service.client.post(
        path, content=BODIES[name], headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    check_error(answer)
    assert time.monotonic() - begun < 3  # on a busy machine; alone it is 0.2
    if name == "many fields":  # not one finding for each, which took most of a second
        assert answer.json()["error"]["message"] == "f0 is not a known field"


TYPES = [
    "",
    "text/plain",
    "text/json",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
    'a;;=;"',
    "\xff",
    "json",
]


@pytest.mark.parametrize("kind", TYPES)
def test_a_body_of_an_odd_type_is_a_415(service: Service, kind: str) -> None:
    lines = (f"Content-Type: {kind}", "Content-Length: 2")
    answer = send(service, head("/v1/codes", "POST", *lines) + b"{}")
    assert statuses(answer) == [415]
    assert not LEAKS.search(json.dumps(error_of(answer)))


PATHS = [
    "/nowhere",
    "/v1",
    "/static/",
    "/static/%00",
    f"/static/{'a' * 300}",
    f"/static/{'a/' * 3000}",
    "/v1/files/%00",
    "/%ff",
]
PATHS += [
    "/v1/files/..%2fstderr",
    "/v1/files/%2e%2e",
    "/v1/models/",
    "/static/%2fetc%2fpasswd",
    "/docs-assets/%00",
    "/static/\\x",
]
PATHS += [
    "/v1/files/" + "0" * 32 + ".png",
    "/static/..%5c..%5capp.py",
    "/v1/files/" + "a" * 60_000,
    "/static/.",
    "//",
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:30])
def test_a_wrong_path_is_a_404_that_tells_nothing(service: Service, path: str) -> None:
    check_error(answer := service.client.get(httpx2.URL(service.url + path)))
    assert answer.status_code == 404


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=x", "limit=" + "9" * 5000, f"search={'a' * 201}", "limit=1&limit=%00"],
)
def test_a_wrong_query_is_a_400_that_tells_nothing(service: Service, query: str) -> None:
    check_error(answer := service.client.get(f"/v1/classes?{query}"))
    assert answer.status_code == 400


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "BREW", "get"])
@pytest.mark.parametrize(
    "path",
    ["/", "/health", "/v1/codes", "/v1/models", "/static/api.js", "/metrics", "/openapi.json"],
)
def test_a_wrong_method_is_a_405(service: Service, method: str, path: str) -> None:
    """Fails if it is answered, or echoed as TRACE would be."""
    answer = service.client.request(method, path, headers={"X-Secret": "echo"})
    if (method, path) == ("get", "/health"):
        return
    assert answer.status_code == 405 or method == "get"
    if answer.status_code == 405:
        check_error(answer)
        assert "GET" in answer.headers["allow"] or "POST" in answer.headers["allow"]
        assert "echo" not in answer.text


def test_failures_of_the_engine_tell_nothing(service: Service) -> None:
    """500, 503, 504: what the engine says is for the log."""
    folder = Path(service._log).parent
    for fault, text, status in (
        ("nan", "0", 500),
        ("out_of_memory", "", 503),
        ("step_seconds", "0.1", 504),
    ):
        service.faults.set(fault, text)
        answer = service.draw(seed=0)
        service.faults.clear(fault)
        assert answer.status_code == status
        check_error(answer, folder)
    assert service.draw(seed=0).status_code == 200


def test_a_full_disk_tells_nothing(service: Service) -> None:
    """503, without the folder's name; the service lives on, and works once the folder is back."""
    folder = Path(service._log).parent / "store"
    shutil.rmtree(folder)
    answer = service.draw(response_format="url")
    folder.mkdir()
    assert answer.status_code == 503
    check_error(answer, folder)
    assert service.draw(response_format="url").status_code == 200


def test_an_engine_that_is_lost_tells_nothing(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:
        service.faults.set("raise")
        answers = [service.draw()]
        service.wait_for(lambda: service.client.get("/health").status_code == 503, 2)
        answers += [service.client.get("/health"), service.client.get("/ready"), service.draw()]
        for answer in answers:
            assert answer.status_code == 503
            check_error(answer, tmp_path)
            assert "no known kind" not in answer.text


def test_a_request_right_after_the_loss_of_the_engine_is_not_left_hanging(tmp_path: Path) -> None:
    """Fails if somebody who asks within the fifth of a second before the watch looks gets no
    answer, or a bare 500 at the end.
    """
    with running_service(tmp_path) as service:
        service.faults.set("raise")
        service.draw()
        assert (
            service.client.post("/v1/codes", json={"prompt": "cat"}, timeout=3).status_code == 503
        )


def test_a_request_that_the_end_cuts_off_is_told_so() -> None:
    """Fails if it is a bare 500: uvicorn cancels what outlasts the end."""
    sent: list[dict[str, Any]] = []

    async def forever(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def keep(message: Any) -> None:
        sent.append(dict(message))

    async def run() -> None:
        scope: Any = {"type": "http", "method": "GET", "path": "/", "client": None, "headers": []}
        task = asyncio.create_task(
            cast(
                Any,
                guards.RequestLog(forever, cast(Any, None), ())(scope, cast(Any, None), keep),
            )
        )
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    asyncio.run(run())
    assert sent[0]["status"] == 503
    error = json.loads(sent[1]["body"])["error"]
    assert (error["code"], error["message"]) == (
        "stopping",
        "the service is stopping: try again later",
    )


def test_while_it_is_loaded_it_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow_start").write_text("30")
    with running_service(tmp_path, ready=False) as service:
        for answer in (service.client.get("/ready"), service.draw()):
            assert answer.status_code == 503
            check_error(answer, tmp_path)


def test_a_bug_tells_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A 500 in the same shape and with a number; the traceback is in the log, under that number."""

    async def draw(app: ASGIApp) -> None:
        transport = httpx2.ASGITransport(cast(Any, app))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for path in ("/v1/images/generations", "/v1/images/stream", "/v1/codes"):
                answer = await client.post(path, json={"prompt": "cat"})
                assert answer.status_code == 500
                check_error(answer, tmp_path)
                record = caplog.records[-1]
                assert cast(Any, record).fields["request_id"] == answer.headers["x-request-id"]
                assert record.exc_info

    with caplog.at_level("INFO", logger="llamagen"):
        without_engines(tmp_path, draw)


# 5. Limits of size

MEBIBYTE = 2**20


def body_of(size: int) -> bytes:
    """A valid request of so many bytes."""
    frame = b'{"prompt":"cat","user":""}'
    return frame[:-2] + b"a" * (size - len(frame)) + frame[-2:]


def in_chunks(body: bytes, size: int = 50_000) -> bytes:
    """As the chunked coding has it."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


@pytest.mark.parametrize(
    ("size", "status"), [(MEBIBYTE, 200), (MEBIBYTE + 1, 413), (4 * MEBIBYTE, 413)]
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_a_mebibyte_is_a_413(
    service: Service, size: int, status: int, chunked: bool
) -> None:
    """Fails if a byte less is refused, a byte more is read, or the limit counts only where a length
    is announced.
    """
    body = body_of(size)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    request = head("/v1/codes", "POST", "Content-Type: application/json", length) + (
        in_chunks(body) if chunked else body
    )
    answer = send(service, request)
    assert statuses(answer)[:1] == [status]
    if status == 413:
        assert error_of(answer)["code"] == "body_too_large"


def test_a_body_is_refused_by_its_announced_length(service: Service) -> None:
    """Fails if a gigabyte has to arrive before it is refused."""
    for length in (MEBIBYTE + 1, 2**30, 10**18):
        answer = send(service, head("/v1/codes", "POST", f"Content-Length: {length}"), timeout=1)
        assert statuses(answer)[:1] == [413]
        assert error_of(answer)["code"] == "body_too_large"


def number_of(answer: bytes) -> str:
    """The request's number, as the client is told."""
    return answer.partition(b"x-request-id: ")[2].split()[0].decode()


def sized_head(size: int, where: str) -> bytes:
    """A request of so many bytes, the most of them in one place."""

    def build(filler: int) -> bytes:
        match where:
            case "one header":
                return head("/health", "GET", f"X: {'a' * filler}")
            case "many headers":
                return head(
                    "/health",
                    "GET",
                    *["X: " + "a" * 995] * (filler // 1000),
                    f"Y: {'b' * (filler % 1000)}",
                )
            case "the query":
                return head(f"/health?{'a' * filler}")
            case _:
                return head(f"/static/{'a' * filler}")

    fits = build(size - 200)
    return build(size - 200 + size - len(fits))


@pytest.mark.parametrize("where", ["one header", "many headers", "the query", "the path"])
def test_headers_beyond_64_kib_are_a_431(service: Service, where: str) -> None:
    """Fails if what is far below is refused, or what is above is let in because it came in one
    piece.
    """
    fits = statuses(send(service, sized_head(60 * 2**10, where)))
    assert fits == ([404] if where == "the path" else [200])
    for size in (66 * 2**10, 100 * 2**10, 250 * 2**10):
        answer = send(service, sized_head(size, where))
        assert statuses(answer) == [431], size
        assert error_of(answer)["code"] == "headers_too_large"
        number = number_of(answer)
        assert service.logged(number)["status"] == 431
    assert service.client.get("/health").status_code == 200


def test_answers_do_not_wait_for_the_client_to_confirm_them(service: Service) -> None:
    """Fails if the system holds the second part of an answer back: 40 ms, on every connection but
    the first request's.
    """
    with httpx2.Client(base_url=service.url) as client:
        times = []
        for _ in range(21):
            begun = time.monotonic()
            client.get("/health")
            times.append(time.monotonic() - begun)
    assert sorted(times)[10] < 0.03


def test_requests_in_a_row_and_in_a_bunch_are_answered_in_order(service: Service) -> None:
    """Keep-alive and pipelining, also behind errors whose requests were complete."""
    post = (
        head(
            "/v1/codes", "POST", "Content-Type: application/json", "Content-Length: 2", close=False
        )
        + b"{}"
    )
    chunked = head(
        "/v1/codes",
        "POST",
        "Content-Type: application/json",
        "Transfer-Encoding: chunked",
        close=False,
    )
    drawn = chunked + in_chunks(b'{"prompt":"cat"}', 5)
    get, nowhere = head(close=False), head("/nowhere", close=False)
    assert statuses(send(service, get + post + nowhere + drawn + get + head())) == [
        200,
        400,
        404,
        200,
        200,
        200,
    ]
    with httpx2.Client(base_url=service.url) as client:
        answers = [client.get("/health") for _ in range(50)] + [
            client.post("/v1/codes", json={"prompt": "cat"})
        ]
    assert {answer.status_code for answer in answers} == {200}


# 6. What is no HTTP

SMUGGLED = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


def garbage() -> dict[str, bytes]:
    """What scanners, broken proxies and the malicious send."""
    draw = random.Random(1)
    post = ("/v1/codes", "POST")
    chunked = head(*post, "Transfer-Encoding: chunked", close=False)
    shapes = {f"random {index}": draw.randbytes(3000) + b"\r\n\r\n" for index in range(5)}
    shapes |= {
        "TLS": bytes.fromhex("16030100c8010000c40303") + draw.randbytes(180) + b"\r\n\r\n",
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "HTTP/0.9": b"GET /\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "no version": b"GET /health \r\n\r\n",
        "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "NUL bytes": b"\0" * 1000 + b"\r\n\r\n",
        "NUL in a header": b"GET /health HTTP/1.1\r\nHost: a\0b\r\n\r\n",
        "NUL in the path": b"GET /hea\0lth HTTP/1.1\r\nHost: a\r\n\r\n",
        "empty lines": b"\r\n" * 50_000,
        "a header without colon": head("/health", "GET", "abc"),
        "a header without name": head("/health", "GET", ": abc"),
        "a name with a space": head("/health", "GET", "Content-Length : 5"),
        "a name that is not ASCII": head("/health", "GET", "\xe9: 1"),
        "bare returns": b"GET /health HTTP/1.1\rHost: a\r\r",
        "10,000 headers": head("/health", "GET", *["a: b"] * 10_000),
        "a long method": head("/health", "A" * 70_000),
        "a method of symbols": head("/health", "G(E)T"),
        "a path that is not ASCII": head("/\xe9\xff"),
        "no path": b"GET  HTTP/1.1\r\nHost: a\r\n\r\n",
        "asterisk": head("*", "OPTIONS"),
        "CONNECT": head("evil.example:443", "CONNECT"),
        "negative length": head(*post, "Content-Length: -1"),
        "signed length": head(*post, "Content-Length: +2") + b"{}",
        "hexadecimal length": head(*post, "Content-Length: 0x2") + b"{}",
        "length of 5,000 digits": head(*post, f"Content-Length: {'9' * 5000}"),
        "length of 20 digits": head(*post, f"Content-Length: {'9' * 20}"),
        "length in another script": head(*post, "Content-Length: \xb2"),
        "two lengths": head(*post, "Content-Length: 2", "Content-Length: 3") + b"{}x",
        "two lengths in one": head(*post, "Content-Length: 2, 3") + b"{}x",
        "length and chunks": head(
            *post, "Content-Length: 5", "Transfer-Encoding: chunked", close=False
        )
        + b"0\r\n\r\n"
        + SMUGGLED,
        "chunks and length": head(
            *post, "Transfer-Encoding: chunked", "Content-Length: 48", close=False
        )
        + b"0\r\n\r\n"
        + SMUGGLED,
        "two codings": head(*post, "Transfer-Encoding: chunked", "Transfer-Encoding: identity")
        + b"0\r\n\r\n",
        "an unknown coding": head(*post, "Transfer-Encoding: xchunked", close=False)
        + b"0\r\n\r\n"
        + SMUGGLED,
        "a coding behind a tab": head(*post, "Transfer-Encoding:\x0bchunked", close=False)
        + b"0\r\n\r\n"
        + SMUGGLED,
        "a coding that is last": head(*post, "Transfer-Encoding: gzip, chunked", close=False)
        + b"0\r\n\r\n"
        + SMUGGLED,
        "a huge chunk": chunked + b"f" * 16 + b"\r\nabc\r\n",
        "an endless chunk size": chunked + b"f" * 100_000,
        "a negative chunk": chunked + b"-1\r\nabc\r\n",
        "a hexadecimal chunk": chunked + b"0x3\r\nabc\r\n",
        "a chunk of the wrong size": chunked + b"2\r\nabc\r\n0\r\n\r\n",
        "an endless extension": chunked + b"1;a=" + b"b" * 100_000,
        "endless trailers": chunked + b"0\r\n" + b"a: b\r\n" * 30_000,
        "broken off": b"POST /v1/codes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        "broken off in a header": b"GET /health HTTP/1.1\r\nHo",
        "broken off in a chunk": chunked + b"5\r\nab",
        "an upgrade": head(
            "/health",
            "GET",
            "Upgrade: websocket",
            "Connection: upgrade",
            "Sec-WebSocket-Key: a",
            close=False,
        ),
        "an upgrade to HTTP/2": head(
            "/health", "GET", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", close=False
        ),
        "garbage behind a request": head(close=False) + b"\xff" * 100 + b"\r\n\r\n",
        "garbage behind a drawing": head(*post, "Content-Length: 16", close=False)
        + b'{"prompt":"cat"}'
        + b"\x16" * 99
        + b"\n\n",
    }
    return shapes


@pytest.mark.parametrize("name", garbage())
def test_garbage_harms_nobody(service: Service, name: str) -> None:
    """Fails if it is a 500, a traceback, an answer to what was smuggled in, or the end of the
    service.
    """
    known = len(service.log)
    answer = send(service, garbage()[name], end=True, timeout=3)
    found = statuses(answer)
    assert all(status in (200, 400, 404, 405, 413, 415, 431) for status in found), answer[:500]
    assert len(found) <= 2
    assert answer.lower().count(b"\r\nx-request-id: req_") == len(found)
    assert b'{"version"' not in answer
    assert not LEAKS.search(answer.decode("latin-1").replace("\r\n\r\n", "").partition("{")[2])
    assert service.client.get("/health").status_code == 200
    written = service.log[known:]
    assert "Traceback" not in written
    assert '"level": "error"' not in written


def test_a_body_that_breaks_off_into_garbage_is_one_request(service: Service) -> None:
    """Fails if the log has another number than the client, or two, or it counts as a client that
    left.
    """
    before = service.gauges()
    # The log is written a moment later than answers are: the lines of all before have come with
    # this one.
    service.logged(service.client.get("/version").headers["x-request-id"])
    known = len(service.log)
    answer = send(service, garbage()["a hexadecimal chunk"], timeout=3)
    assert statuses(answer) == [400]
    number = number_of(answer)
    line = service.logged(number)
    assert (line["method"], line["path"], line["status"], line["outcome"]) == (
        "POST",
        "/v1/codes",
        400,
        "invalid",
    )
    assert service.log[known:].count('"request_id"') == service.log[known:].count("/metrics") + 1
    after, name = service.gauges(), 'requests_total{outcome="invalid"}'
    assert after[name] == before.get(name, 0) + 1
    counted = {key for key in after if key.startswith("requests_total")}
    assert all(after[key] == before.get(key, 0) for key in counted - {name})


def test_a_request_with_two_lengths_is_the_connections_last(service: Service) -> None:
    """Fails if a proxy that goes by the one and a service that goes by the other can be set at
    odds.
    """
    for name in ("length and chunks", "chunks and length"):
        answer = send(service, garbage()[name])
        assert statuses(answer) == [400]
        assert b"connection: close" in answer.lower()


def test_many_tiny_chunks_do_not_hold_up_others_for_long(service: Service) -> None:
    """Each byte in a chunk of its own: what the limit leaves of that is a fraction of a second at a
    time.
    """
    request = head(
        "/v1/codes", "POST", "Content-Type: application/json", "Transfer-Encoding: chunked"
    )
    begun = time.monotonic()
    answer = send(service, request + in_chunks(body_of(30_000), 1), timeout=20)
    assert statuses(answer) == [200]
    assert time.monotonic() - begun < 5


def test_who_sends_a_byte_at_a_time_is_dropped_and_others_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time counts from the first byte, so that dripping does not stretch it; and whoever waits
    for an answer is not dropped.
    """
    monkeypatch.setattr(http_protocol, "SEND_SECONDS", 0.6)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/slow":
            await asyncio.sleep(1.2)
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
        )
        await send({"type": "http.response.body", "body": b"ok"})

    async def drip(port: int, data: bytes) -> float:
        """How long the connection lasts."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        begun = time.monotonic()
        closed = asyncio.create_task(reader.read())
        for byte in data:
            if closed.done():
                break
            with contextlib.suppress(OSError):
                writer.write(bytes([byte]))
                await writer.drain()
            await asyncio.wait({closed}, timeout=0.05)
        with contextlib.suppress(OSError):
            assert b"HTTP/1.1 200" not in await closed
        writer.close()
        return time.monotonic() - begun

    async def ask(port: int, path: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(path))
        answer = await reader.read()
        writer.close()
        return answer

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            protocol: Any = partial(
                http_protocol.PatientProtocol, connections=Connections(most=2**20, most_bytes=2**40)
            )
            config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None)
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            body = head("/", "POST", "Content-Length: 500", close=False)
            drips = [
                drip(port, data)
                for data in (head("/", "GET", f"X: {'a' * 500}"), body + b"a" * 500)
            ]
            silent = drip(port, b"")
            dripping = asyncio.gather(*drips, silent)
            while not dripping.done():
                assert b" 200 " in await asyncio.wait_for(ask(port, "/quick"), 2)
                await asyncio.sleep(0.05)
            for seconds in dripping.result():
                assert 0.5 <= seconds < 3
            assert (await ask(port, "/slow")).endswith(b"ok")
            server.should_exit = True
            await serving

    asyncio.run(run())


# 7. What the service never does


def test_numpy_never_unpickles() -> None:
    """Fails if an array could run code; ruff's S rules see to pickle, torch, YAML and shells."""
    sources = {path: path.read_text() for path in source_files()}
    assert len(sources) > 100
    assert not [path for path, source in sources.items() if "allow_pickle" in source]
