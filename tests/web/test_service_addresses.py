"""Where the service is: below a prefix, at a Unix socket, with TLS, for pages of other sites, and
under several names.
"""

import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx2
import pytest
from certificates import make_certificate, trust_in
from fake_service import Service, running_service

from autoregressive.errors import UserError
from autoregressive.serve.web.listeners import listen

SITE = "https://app.example.org"


# Below a prefix


@pytest.fixture(scope="module")
def below(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service at /of/images, which stores images."""
    folder = tmp_path_factory.mktemp("below")
    (folder / "store").mkdir()
    flags = ["--root-path", "/of/images/", "--store-dir", str(folder / "store")]
    with running_service(folder, *flags, "--allowed-origins", SITE) as service:
        yield service


def linked(service: Service, page: str) -> list[str]:
    """What a page of the service leads to, as a browser would ask for it."""
    text = service.client.get(page).text
    names = re.findall(r"""(?:href|src|url)\s*[=:]\s*["']([^"'#]+)["']""", text)
    return [urljoin(f"{service.url}{page}", name) for name in names]


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_what_a_page_links_to_is_below_the_prefix(below: Service, page: str) -> None:
    """Fails if a browser that knows the prefix only is led out of it, or to nothing."""
    urls = linked(below, page)
    assert len(urls) >= 3
    for url in urls:
        assert url.startswith(f"{below.url}/")
        assert below.client.get(url).is_success


def test_the_prefix_may_be_removed_on_the_way_or_not(below: Service) -> None:
    """Fails if only one kind of proxy works."""
    root = f"http://localhost:{urlsplit(below.url).port}"
    assert below.url.endswith("/of/images")
    for path in ("/of/images/v1/models", "/v1/models"):
        assert below.client.get(root + path).json()["data"][0]["id"] == "fake"
        with closing(HTTPConnection("localhost", urlsplit(root).port or 0)) as connection:
            connection.request("GET", root + path)  # a whole URL in the request's line
            assert connection.getresponse().status == 200
    for path in ("/of/imagesv1/models", "/of/images/of/images/v1/models", "/of/v1/models"):
        assert below.client.get(root + path).status_code == 404
    for query in ("", "?class=owl&seed=11&guidance=3"):
        answer = below.client.get(f"{root}/of/images{query}")
        assert (answer.status_code, answer.headers["location"]) == (308, f"/of/images/{query}")
        assert below.logged(answer.headers["x-request-id"])["path"] == "/of/images"


def test_stored_images_are_below_the_prefix(below: Service) -> None:
    """Fails if the URL of an answer leads past the proxy's rule."""
    url = below.draw(response_format="url").json()["data"][0]["url"]
    assert url.startswith(f"{below.url}/v1/files/")
    assert below.client.get(url).content.startswith(b"\x89PNG")


def test_the_document_says_that_the_api_is_beside_it(below: Service) -> None:
    """Fails if /docs sends its requests to another place."""
    document = below.client.get("/openapi.json").json()
    assert [server["url"] for server in document["servers"]] == ["."]
    assert "/v1/models" in document["paths"]


# A Unix socket


@pytest.mark.parametrize("servers", ["1", "2"])
def test_a_unix_socket(tmp_path: Path, servers: str) -> None:
    """Fails if a service cannot be reached at its path, is hindered by what a killed one left
    there, takes the path of a running one, or leaves it behind.
    """
    path = tmp_path / "service.sock"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))
    flags = ["--uds", str(path), "--api-server-count", servers]
    with running_service(tmp_path, *flags) as service:
        assert service.url == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        assert service.draw(n=2).status_code == 200
        (tmp_path / "second").mkdir()
        with (
            pytest.raises(AssertionError, match="already in use; choose another --uds"),
            running_service(tmp_path / "second", *flags),
        ):
            pass
        assert service.client.get("/health").status_code == 200
        assert service.terminate() == 0
    assert not path.exists()


def test_a_socket_whose_service_hangs_is_in_use(tmp_path: Path) -> None:
    """Fails if a second service waits at the path of one that accepts nothing any more."""
    from test_service_settings import settings

    path = tmp_path / "service.sock"
    with socket.socket(socket.AF_UNIX) as hanging, socket.socket(socket.AF_UNIX) as waiting:
        hanging.bind(str(path))
        hanging.listen(0)
        waiting.connect(str(path))  # has the only place
        with pytest.raises(UserError, match="already in use"), listen(settings("--uds", str(path))):
            pass
    assert path.is_socket()


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    """Fails if a mistyped path deletes something."""
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with (
        pytest.raises(AssertionError, match="already in use"),
        running_service(tmp_path, "--uds", str(path)),
    ):
        pass
    assert path.read_text() == "mine"


# TLS


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a certificate, with few connections."""
    folder = tmp_path_factory.mktemp("secure")
    certificate, key = make_certificate(folder)
    flags = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    flags += ["--max-connections", "8"]
    with running_service(folder, *flags, verify=trust_in(certificate)) as service:
        yield service


def test_tls(secure: Service) -> None:
    """Fails if the service speaks HTTP where it was given a certificate, or streams break."""
    assert secure.url.startswith("https://")
    assert secure.draw(n=3).status_code == 200
    events = secure.draw(stream=True, partial_images=2).text
    assert events.count("event: image_generation.partial_image") == 2
    with pytest.raises(httpx2.TransportError):
        httpx2.get(secure.url.replace("https:", "http:"))


def test_a_body_that_is_too_large_is_answered_through_tls(secure: Service) -> None:
    """Fails if the end of one direction, which TLS does not have, breaks an early answer."""
    answer = secure.draw(prompt="x" * 2**21)
    assert answer.status_code == 413


def test_clients_that_never_shake_hands_hold_up_nobody(secure: Service) -> None:
    """Fails if connections without a handshake keep their places until they time out."""
    target = (urlsplit(secure.url).hostname, urlsplit(secure.url).port)
    silent = [socket.create_connection(target) for _ in range(16)]
    try:
        time.sleep(1.5)  # the time after which one counts as idle
        begun = time.monotonic()
        trust = trust_in(Path(secure._log).parent / "certificate.pem")
        assert httpx2.get(f"{secure.url}/health", verify=trust).status_code == 200
        assert time.monotonic() - begun < 5
    finally:
        for connection in silent:
            connection.close()


# Pages of other sites


def preflight(service: Service, origin: str, method: str = "POST") -> httpx2.Response:
    """What a browser asks before it sends a request with a key and JSON from a page elsewhere."""
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang"
    return service.client.options("/v1/images/generations", headers=headers)


def test_a_page_of_an_allowed_site_may_use_the_service(below: Service) -> None:
    """Fails if a browser refuses what the operator has allowed, or allows more."""
    asked = preflight(below, SITE)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, SITE)
    assert "x-stainless-lang" in asked.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in asked.headers
    drawn = below.client.post(
        "/v1/images/generations", json={"prompt": "no such"}, headers={"Origin": SITE}
    )
    assert (drawn.status_code, drawn.headers["access-control-allow-origin"]) == (400, SITE)
    assert "X-Request-Id" in drawn.headers["access-control-expose-headers"]
    other = preflight(below, "https://evil.example")
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


def test_no_other_site_is_allowed_by_default(locked: Service) -> None:
    """Fails if the service is open to pages of other sites without being told to."""
    answer = preflight(locked, SITE)
    assert answer.status_code == 401
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_first_question_of_a_browser_needs_no_key(tmp_path: Path) -> None:
    """Fails if a service with a key cannot be used from a page, or its errors cannot be read."""
    flags = ["--api-key", "0123456789abcdef", "--allowed-origins", "*"]
    with running_service(tmp_path, *flags) as service:
        assert preflight(service, SITE).headers["access-control-allow-origin"] == "*"
        answer = service.client.get("/v1/models", headers={"Origin": SITE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "*")


# Names, ids, and the log


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose model has two names, and whose log leaves out two paths."""
    names = {"LLAMAGEN_SERVED_MODEL_NAME": "owl dall-e-3"}
    flags = ["--disable-access-log-for", "/ping", "/v1/images/generations"]
    with running_service(tmp_path_factory.mktemp("named"), *flags, environment=names) as service:
        yield service


def test_a_model_may_have_several_names(named: Service) -> None:
    """Fails if a client that uses another name is refused, or a name is not listed."""
    listed = named.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["owl", "dall-e-3"]
    assert named.client.get("/v1/models/dall-e-3").json()["id"] == "dall-e-3"
    for name in ("owl", "dall-e-3"):
        assert named.draw(model=name).json()["model"] == "owl"
    assert named.draw(model="gpt-image-1").status_code == 404


def test_every_metric_has_the_models_name(named: Service) -> None:
    """Fails if a dashboard of several models cannot tell them apart."""
    lines = named.client.get("/metrics").text.splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert len(samples) > 100
    assert all('model_name="owl"' in line for line in samples)


@pytest.mark.parametrize("number", ["a", "3f2504e0-4f89-11d3-9a0c-030", "x" * 128, "A:1._"])
def test_the_callers_id_is_taken_over(named: Service, number: str) -> None:
    """Fails if the caller's log and this one cannot be brought together."""
    answer = named.client.get("/version", headers={"X-Request-Id": number})
    assert answer.headers.get_list("x-request-id") == [number]
    assert named.logged(number)["path"] == "/version"


@pytest.mark.parametrize("number", ["", "x" * 129, "a b", 'a"b', "é", "a,b", "a/b"])
def test_an_id_that_is_not_well_formed_is_replaced(named: Service, number: str) -> None:
    """Fails if a caller can write whatever it likes into headers and logs."""
    answer = named.client.get("/version", headers=[(b"X-Request-Id", number.encode())])
    assert answer.headers["x-request-id"].startswith("req_")
    twice = [("X-Request-Id", "a"), ("X-Request-Id", "b")]
    assert named.client.get("/version", headers=twice).headers["x-request-id"].startswith("req_")


def test_a_key_that_is_sent_as_an_id_is_not_logged(locked: Service) -> None:
    """Fails if a mistake of a client writes its key into the log."""
    key = "k" * 32
    headers = {"X-Request-Id": f"id-{key}", "Authorization": f"Bearer {key}"}
    locked.client.get("/version", headers=headers)
    locked.wait_for(lambda: '"id-[key]"' in locked.log, 5)
    assert key not in locked.log


def test_paths_that_are_left_out_of_the_log_keep_their_errors(named: Service) -> None:
    """Fails if probes fill the log though they were to be left out, or an error is lost."""
    for number, path in (("p1", "/ping"), ("p2", "/health"), ("p3", "/ping")):
        assert named.client.get(path, headers={"X-Request-Id": number}).json() == {
            "status": "alive"
        }
    named.client.post("/v1/images/generations", json={}, headers={"X-Request-Id": "p4"})
    assert named.logged("p4")["status"] == 400
    assert named.logged("p2")["status"] == 200
    assert '"p1"' not in named.log
    assert '"p3"' not in named.log


def test_ping_needs_no_key(locked: Service) -> None:
    """Fails if a platform that probes /ping takes the service for dead."""
    assert locked.client.get("/ping").json() == {"status": "alive"}


# What is refused at the start


REFUSED = {
    "--root-path=images": "--root-path images: must be the beginning of a path",
    "--root-path=/a//b": "--root-path /a//b",
    "--root-path=/a/../b": "--root-path",
    "--root-path=/a?b": "--root-path",
    "--root-path=https://example.org/a": "--root-path",
    "--root-path=/v1": "--root-path /v1: /v1 is a path of the service itself",
    "--root-path=/metrics/": "/metrics is a path of the service itself",
    "--root-path=/static/images": "/static is a path of the service itself",
    "--allowed-origins=app.example.org": "--allowed-origins app.example.org: must be as browsers",
    "--allowed-origins=https://app.example.org/": "without a path",
    "--allowed-origins=https://App.example.org": "small letters",
    "--allowed-origins=https://app.example.org:443": "the usual port",
    "--allowed-origins=http://app.example.org:99999": "must be as browsers send it",
    "--allowed-origins=http://[::1]:80": "the usual port",
    "--allowed-origins=null": "--allowed-origins null",
    "--allowed-origins=": "--allowed-origins",
    "--uds=/no/such/folder/x.sock": "there is no folder /no/such/folder; make it first",
    "--uds=/": "is a folder; name a socket in it",
    f"--uds=/tmp/{'x' * 110}": "at most 107 bytes",
    "--ssl-certfile=/no/such.pem": "--ssl-certfile /no/such.pem: there is no such file",
    "--ssl-keyfile=/no/such.pem": "--ssl-keyfile goes with --ssl-certfile",
    "--disable-access-log-for=health": "--disable-access-log-for health: must be a path",
    "--disable-access-log-for=/health,/metrics": "spaces separate several",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_what_is_refused_at_the_start(typed: str) -> None:
    """Fails if a value is taken that has no effect, or another one than was meant."""
    from test_service_settings import refusal

    assert REFUSED[typed] in refusal(typed)
    assert "\n" not in refusal(typed)


def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    """Fails if a wrong file ends in a traceback, or is found out by the first client."""
    from test_service_settings import refusal

    certificate, key = make_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = make_certificate(tmp_path / "other")
    for wrong in (key, Path(__file__), Path(os.devnull).parent):
        assert "--ssl-certfile" in refusal("--ssl-certfile", str(wrong))
    said = refusal("--ssl-certfile", str(certificate), "--ssl-keyfile", str(other))
    assert "cannot be used" in said
    locked = tmp_path / "locked.pem"
    os.system(f"openssl ec -in {key} -aes128 -passout pass:x -out {locked} 2>/dev/null")
    assert "no password" in refusal(
        "--ssl-certfile", str(certificate), "--ssl-keyfile", str(locked)
    )


def test_images_at_a_unix_socket_need_a_public_url(tmp_path: Path) -> None:
    """Fails if answers have URLs that no browser can open."""
    from test_service_settings import refusal

    flags = ("--uds", str(tmp_path / "x.sock"), "--store-dir", str(tmp_path))
    assert "at --uds the images' URLs need an address: give --public-url" in refusal(*flags)


def test_the_prefix_is_part_of_the_public_url_once() -> None:
    """Fails if stored images have the prefix twice, or not at all."""
    from test_service_settings import settings

    for url in ("https://images", "https://images/", "https://images/images"):
        found = settings("--public-url", url, "--root-path", "/images")
        assert found.base_url("http://x") == "https://images/images"
    assert settings("--root-path", "/a/b").base_url("http://x:1") == "http://x:1/a/b"
    assert settings().base_url("http://x:1") == "http://x:1"


def test_several_values_come_from_every_layer(tmp_path: Path) -> None:
    """Fails if the environment or the file can give one value only."""
    from autoregressive.serve.web.server_flags import read_arguments

    (tmp_path / "x.yaml").write_text("served-model-name: [a b, c]\nallowed-origins: '*'\n")
    config = ["--config", str(tmp_path / "x.yaml")]
    exported = {"LLAMAGEN_ALLOWED_ORIGINS": "http://a  http://b"}
    found = read_arguments(config, exported)
    assert found.served_model_name == ["a b", "c"]
    assert found.allowed_origins == ["http://a", "http://b"]
    found = read_arguments([*config, "--served-model-name", "d", "e", "--port", "1"], {})
    assert (found.served_model_name, found.port) == (["d", "e"], 1)
