"""The page's files come from memory: what their readers cost, and what a client may ask of them."""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from fake_service import Service, fake_model, running_service
from page_stand_in import demo_pictures
from PIL import Image, ImageChops, ImageStat
from test_service_connections import GET_A_FILE, address

from autoregressive.models.classes import DEMO
from autoregressive.serve.web.app import PAGE

READERS = 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("files")) as service:
        yield service


def test_who_reads_a_file_slowly_holds_one_descriptor_and_a_part_of_it(service: Service) -> None:
    """Fails if the file is open for each reader, or each is taken to hold all of it."""
    folder = f"/proc/{service.process.pid}/fd"
    service.gauges()  # on the connection that is used below, too
    before = len(os.listdir(folder))
    with contextlib.ExitStack() as stack:
        for _ in range(READERS):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(address(service))
            connection.sendall(GET_A_FILE)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        service.wait_for(lambda: service.gauges()["http_buffered_bytes"] > 0, 5)
        assert len(os.listdir(folder)) == before + READERS
        assert service.gauges()["http_buffered_bytes"] < READERS * 200_000  # of 1.5 MB


@pytest.mark.parametrize("name", sorted(path.name for path in PAGE.iterdir()))
def test_a_file_arrives_as_it_is(service: Service, name: str) -> None:
    """Fails if a byte or the type of a file of the page is wrong."""
    answer = service.client.get(f"/static/{name}")
    assert answer.content == (PAGE / name).read_bytes()
    assert int(answer.headers["content-length"]) == len(answer.content)
    kinds = {
        ".js": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".svg": "image/svg+xml",
        ".webp": "image/webp",
    }
    assert answer.headers["content-type"] == kinds[os.path.splitext(name)[1]]


@pytest.mark.parametrize("path", ["/", "/static/api.js", "/docs-assets/swagger-ui.css"])
def test_a_browser_gets_what_has_changed_only(service: Service, path: str) -> None:
    """Fails if a page is loaded anew each time, or an old one is kept."""
    etag = service.client.get(path).headers["etag"]
    for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = service.client.get(path, headers={"If-None-Match": given})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
        assert "content-length" not in answer.headers
    assert service.client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/static", "/static/", "/static/none.js", "/static/api.js/", "/static//api.js"]
)
def test_what_is_no_file_is_a_404(service: Service, path: str) -> None:
    assert service.client.get(path).status_code == 404
    assert service.client.post("/static/api.js").status_code == 405


def test_the_demo_classes_have_their_own_pictures() -> None:
    """Fails if the page has no picture of the demo's classes, shows them with another model's, or
    has a class in another's place.
    """
    model = fake_model("fake")
    assert model.described().class_pictures is None
    address = replace(model, classes=DEMO).described().class_pictures
    assert address is not None
    with Image.open(PAGE.parent / address) as opened:
        sheet = opened.convert("RGB")
    side = sheet.width // 16
    assert sheet.size == (16 * side, len(DEMO) // 16 * side)
    wanted = [picture.resize((16, 16)) for picture in demo_pictures()]
    for label in range(len(DEMO)):
        left, top = side * (label % 16), side * (label // 16)
        found = sheet.crop((left, top, left + side, top + side)).resize((16, 16))
        unlike = [ImageStat.Stat(ImageChops.difference(found, one)).sum for one in wanted]
        assert min(range(len(DEMO)), key=lambda one: sum(unlike[one])) == label
