"""Other sites: names that are not the service's (DNS rebinding), requests that a page elsewhere can
have a browser send, frames.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from fake_service import KEY, Service, running_service

PUBLIC = "pictures.example"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Without a key, and known to its clients by another name too."""
    with running_service(
        tmp_path_factory.mktemp("hosts"), "--public-url", f"https://{PUBLIC}:8443/of"
    ) as service:
        yield service


def ask(service: Service, *lines: str, body: str = "") -> tuple[int, dict[str, Any]]:
    """Sends a request as it is; the status of the answer, and its body if that is JSON."""
    target = urlsplit(service.url)
    text = "\r\n".join([*lines, "Connection: close", "", body])
    with socket.create_connection(
        (target.hostname or "", target.port or 0), timeout=10
    ) as connection:
        connection.sendall(text.encode("latin-1"))
        with connection.makefile("rb") as answer:
            head, _, content = answer.read().partition(b"\r\n\r\n")
    found: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        found = json.loads(content)
    return int(head.split()[1]), found


OURS = ["localhost", "LocalHost", "localhost:8000", "localhost.", "localhost.:80", "localhost:"]
OURS += ["127.0.0.1", "127.0.0.1:9", "127.3.2.1", "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]"]
OURS += ["[::ffff:127.0.0.1]", PUBLIC, f"{PUBLIC}:8443", f"{PUBLIC}:1", "PICTURES.example"]
OTHERS = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "evil-localhost",
    "example",
]
OTHERS += ["127.0.0.1.evil.example", "0.0.0.0", "192.0.2.1", "[::2]", "[2001:db8::1]:80", "127.1"]
OTHERS += ["2130706433", "0x7f000001", "", ":80", "localhost:80:80", "localhost:x", "[::1", "::1"]
OTHERS += ["evil.example@localhost", "localhost@evil.example", "localhost/evil.example", "*"]
OTHERS += [
    "localhost, evil.example",
    "localhost evil.example",
    f"not-{PUBLIC}",
    f"{PUBLIC}.evil.example",
]
OTHERS += ["[localhost]", "localhost..", "\xb9localhost"]
EVERYWHERE = (
    "GET /",
    "GET /health",
    "GET /v1/models",
    "GET /static/api.js",
    "HEAD /docs",
    "POST /v1/codes",
    "OPTIONS *",
)


@pytest.mark.parametrize("host", OURS)
def test_the_services_own_names_are_answered(service: Service, host: str) -> None:
    """Fails if a browser, a tunnel or a proxy on this machine is refused under a name that is this
    machine's, or --public-url's.
    """
    assert ask(service, "GET /health HTTP/1.1", f"Host: {host}")[0] == 200


@pytest.mark.parametrize("host", OTHERS)
def test_other_names_are_refused_on_every_path(service: Service, host: str) -> None:
    """Fails if a page whose name was made to lead here reads or draws; the answer says what to set,
    and not the name.
    """
    lines = [f"Host: {host}", "Content-Type: application/json", "Content-Length: 16"]
    statuses = set()
    for target in EVERYWHERE:
        status, answer = ask(service, f"{target} HTTP/1.1", *lines, body='{"prompt":"cat"}')
        statuses.add(status)
        if status == 421 and answer:
            error = answer["error"]
            assert (error["code"], error["type"]) == ("unknown_host", "invalid_request_error")
            assert "--public-url" in error["message"]
            assert "evil" not in error["message"]
    assert statuses <= {400, 421}  # 400: h11 takes it for no host at all


def test_a_host_is_needed_once(service: Service) -> None:
    """Fails if a second Host passes behind the first.

    Without one, in HTTP/1.0, it is no browser: probes of load balancers.
    """
    assert ask(service, "GET /health HTTP/1.1", "Host: localhost", "Host: evil.example")[0] == 400
    assert ask(service, "GET /health HTTP/1.1", "Host: localhost", "Host: localhost")[0] == 400
    assert ask(service, "GET /health HTTP/1.1")[0] == 400
    assert ask(service, "GET /health HTTP/1.0")[0] == 200
    assert ask(service, "GET /health HTTP/1.0", "Host: evil.example")[0] == 421


def test_a_whole_url_counts_before_the_host(service: Service) -> None:
    """Fails if a request line with a URL (RFC 9112, 3.2.2) is not understood, or the header's host
    hides the URL's.
    """
    assert ask(service, "GET http://localhost:8000/health HTTP/1.1", "Host: localhost") == (
        200,
        {"status": "alive"},
    )
    assert (
        ask(service, "GET HTTPS://LOCALHOST/v1/classes?limit=1 HTTP/1.1", "Host: evil.example")[1][
            "total"
        ]
        == 10
    )
    assert ask(service, "GET http://localhost HTTP/1.1", "Host: localhost")[0] == 200
    for target in (
        "http://evil.example/health",
        "http://evil.example",
        "http://localhost@evil.example/",
        "http:///health",
    ):
        assert ask(service, f"GET {target} HTTP/1.1", "Host: localhost")[0] == 421
    assert ask(service, "GET ftp://localhost/health HTTP/1.1", "Host: localhost")[0] == 404
    body = '{"prompt":"cat"}'
    lines = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    before = service.gauges().get('requests_total{outcome="success"}', 0)
    assert ask(service, "POST http://localhost/v1/codes HTTP/1.1", *lines, body=body)[0] == 200
    assert service.gauges()['requests_total{outcome="success"}'] == before + 1


def test_a_whole_url_is_no_way_past_the_key(locked: Service) -> None:
    """Fails if the guards look at another path than the routes."""
    for target in ("/v1/models", "/health/../v1/models", "//health", "/metrics"):
        assert ask(locked, f"GET http://localhost{target} HTTP/1.1", "Host: localhost")[0] == 401
    assert ask(locked, "GET http://localhost/health HTTP/1.1", "Host: localhost")[0] == 200
    key = f"Authorization: Bearer {KEY}"
    assert ask(locked, "GET http://evil.example/v1/models HTTP/1.1", "Host: x", key)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "192.0.2.1:80", "", "[::2]"])
def test_with_a_key_every_name_is_answered(locked: Service, host: str) -> None:
    """Fails if a service with a key has to be told all of its names: there the key keeps others
    out.
    """
    assert ask(locked, "GET /health HTTP/1.1", f"Host: {host}")[0] == 200
    assert ask(locked, "GET /v1/models HTTP/1.1", f"Host: {host}")[0] == 401


# What a page elsewhere can have a browser send to localhost without being asked for leave (the
# Fetch standard's "simple" requests).
SIMPLE: list[dict[str, str]] = [
    {"Content-Type": "text/plain"},
    {"Content-Type": "text/plain;application/json"},
    {"Content-Type": "text/plain; charset=application/json"},
    {"Content-Type": "application/x-www-form-urlencoded"},
    {"Content-Type": "multipart/form-data; boundary=application/json"},
    {"Content-Type": ""},
    {},
]


@pytest.mark.parametrize("headers", SIMPLE, ids=str)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/stream", "/v1/codes"])
def test_a_page_elsewhere_cannot_have_anything_drawn(
    service: Service, path: str, headers: dict[str, str]
) -> None:
    """Fails if a request that needs no preflight draws, though its answer could not be read."""
    before = service.gauges()["images_total"]
    site = {
        "Origin": "https://evil.example",
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "no-cors",
    }
    with httpx2.Client(base_url=service.url) as client:
        answer = client.post(path, content=b'{"prompt":"cat"}', headers=headers | site)
        assert answer.status_code == 415
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        preflight = client.options(path, headers=site | asked)
    assert preflight.status_code == 405
    assert not [
        name for name in (*answer.headers, *preflight.headers) if name.startswith("access-control")
    ]
    assert service.gauges()["images_total"] == before


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/static/api.js", "/docs-assets/swagger-ui-bundle.js"]
)
def test_no_page_can_be_framed_or_run_what_is_not_its_own(service: Service, path: str) -> None:
    """Fails if a page has no content policy, or one that lets another site frame it or add scripts
    to it.
    """
    headers = service.client.get(path).headers
    policy = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert (
        policy["default-src"]
        == policy["frame-ancestors"]
        == policy["base-uri"]
        == policy["form-action"]
        == "'none'"
    )
    assert set(policy["connect-src"].split()) == {"'self'"}
    assert "'unsafe-inline'" not in policy["script-src"]
    assert "'unsafe-eval'" not in policy["script-src"]
    assert headers["x-content-type-options"] == "nosniff"
