"""Debian's nginx in front of the service, with the file of deploy/nginx: below a prefix, with TLS,
and streams that arrive as they are sent.
"""

import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urljoin, urlsplit

import httpx2
import pytest
from certificates import make_certificate, trust_in
from fake_service import Service, running_service

if TYPE_CHECKING:
    from page_stand_in import StandIn

ROOT = Path(__file__).resolve().parents[2]
_AROUND = """\
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/llamagen.conf;
}}
"""


@dataclass
class Proxied:
    """A service behind nginx, and a client of nginx."""

    service: Service
    client: httpx2.Client
    url: str


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("needs nginx (Debian's nginx-light)")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    certificate, key = make_certificate(folder)
    (folder / "store").mkdir()
    url, trust = f"https://localhost:{port}/images", trust_in(certificate)
    flags = ["--root-path", "/images", "--forwarded-allow-ips", "127.0.0.1"]
    flags += ["--store-dir", str(folder / "store"), "--public-url", url]
    with running_service(folder, *flags) as service:
        text = (ROOT / "deploy/nginx/llamagen.conf").read_text()
        for found, put in (
            ("127.0.0.1:8000", f"127.0.0.1:{urlsplit(service.url).port}"),
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("/etc/ssl/llamagen/certificate.pem", str(certificate)),
            ("/etc/ssl/llamagen/key.pem", str(key)),
        ):
            assert found in text
            text = text.replace(found, put)
        (folder / "llamagen.conf").write_text(text)
        (folder / "nginx.conf").write_text(_AROUND.format(folder=folder))
        command = [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf")]
        checked = subprocess.run([*command, "-t"], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
        client = httpx2.Client(verify=trust, timeout=60)
        try:
            service.wait_for(lambda: answers(port, trust), 20)
            yield Proxied(service, client, url)
        finally:
            client.close()
            process.terminate()
            process.wait(20)


def answers(port: int, trust: ssl.SSLContext) -> bool:
    try:
        return httpx2.get(f"https://localhost:{port}/images/health", verify=trust).is_success
    except httpx2.TransportError:
        return False


def test_the_page_and_its_description_are_below_the_prefix(proxied: Proxied) -> None:
    """Fails if a browser that comes through the proxy gets no page, or a page without its files."""
    start = proxied.client.get(proxied.url, follow_redirects=True)
    assert (start.url, start.status_code) == (f"{proxied.url}/", 200)
    for page, names in (("/", ["static/app.js", "static/style.css"]), ("/docs", ["openapi.json"])):
        text = proxied.client.get(f"{proxied.url}{page}").text
        for name in names:
            assert name in text
            assert proxied.client.get(urljoin(f"{proxied.url}{page}", name)).is_success
    assert proxied.client.get(proxied.url.replace("/images", "/health")).status_code == 404


def test_a_stored_image_opens_through_the_proxy(proxied: Proxied) -> None:
    """Fails if the URL of an answer leads past the proxy."""
    body = {"prompt": "cat", "response_format": "url"}
    answer = proxied.client.post(f"{proxied.url}/v1/images/generations", json=body)
    url = answer.json()["data"][0]["url"]
    assert url.startswith(f"{proxied.url}/v1/files/")
    assert proxied.client.get(url).content.startswith(b"\x89PNG")
    # the id that nginx has given is in the log, with the address of the client
    line = proxied.service.logged(answer.headers["x-request-id"])
    assert len(line["request_id"]) == 32
    assert line["client"] == "127.0.0.1"
    # that of a caller reaches the service
    numbered = proxied.client.get(f"{proxied.url}/v1/models", headers={"X-Request-Id": "trace-7"})
    assert numbered.headers["x-request-id"] == "trace-7"


def test_events_arrive_as_they_are_sent(proxied: Proxied) -> None:
    """Fails if the proxy keeps events until the answer is complete."""
    proxied.service.faults.set("step_seconds", "0.02")
    arrived: dict[str, float] = {}
    body = {"prompt": "cat", "n": 1}
    with proxied.client.stream("POST", f"{proxied.url}/v1/images/stream", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                arrived.setdefault(json.loads(line[6:])["type"], time.monotonic())
    proxied.service.faults.clear("step_seconds")
    assert arrived["done"] - arrived["queued"] > 0.5  # 64 tokens at 20 ms
    assert arrived["queued"] < arrived["progress"] < arrived["done"]


@pytest.mark.parametrize("name", ["chromium", "firefox"])
def test_the_page_draws_below_the_prefix(proxied: Proxied, name: str) -> None:
    """Fails if the page asks beside the prefix, loses the settings of its address there, or cannot
    follow or cancel what it has begun.
    """
    pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")
    from page_browser import opened_pages, run_ends, started_browser

    proxied.service.faults.set("step_seconds", "0.05")  # 64 of them
    with (
        started_browser(name) as browser,
        opened_pages(browser, cast("StandIn", proxied)) as open_page,
    ):
        page = open_page(query="?class=dog&seed=11&pictures=1", ignore_https_errors=True)
        assert page.url.startswith(f"{proxied.url}/?class=dog")
        page.get_by_role("button", name="Generate").click()
        page.locator(".run[data-state=drawing]").wait_for()
        page.reload()  # which follows the drawing by its id
        run_ends(page)
        assert page.locator(".tile-open").count() == 1
        proxied.service.faults.set("step_seconds", "0.2")
        page.get_by_role("button", name="Generate").click()
        page.locator(".run[data-state=drawing]").wait_for()
        page.get_by_role("button", name="Cancel: dog").click()
        proxied.service.wait_for(proxied.service.is_empty, 6)
    proxied.service.faults.clear("step_seconds")
