"""Stored images over HTTP: alive when the answer is sent, refused before drawing, whole while
others are evicted.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_service import LARGE, Service, running_service

from autoregressive.serve.web.store import LOCK_FILE


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that keeps ten images; what killed ones left is there at its start."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "store").mkdir()
    (folder / "store" / ".0123456789abcdef.part.png").write_bytes(b"half")
    with running_service(
        folder,
        "--store-dir",
        str(folder / "store"),
        "--store-images",
        "10",
        environment={LARGE: "1"},
    ) as service:
        yield service


def store_of(service: Service) -> Path:
    return Path(service._log).parent / "store"


def name_of(url: str) -> str:
    """The file of a URL."""
    return url.rsplit("/", 1)[1].partition("?")[0]


def urls_of(service: Service, **body: Any) -> list[str]:
    answer = service.draw(response_format="url", **body)
    assert answer.status_code == 200, answer.text
    return [data["url"] for data in answer.json()["data"]]


def test_leftovers_are_removed_at_the_start_and_the_log_counts_them(service: Service) -> None:
    """Fails if what a killed service left stays for ever."""
    assert not list(store_of(service).glob(".*.part*"))
    line = next(json.loads(line) for line in service.log.splitlines() if "unfinished" in line)
    assert (line["logger"], line["files"]) == ("llamagen.store", 1)


def test_all_urls_of_an_answer_are_alive(service: Service) -> None:
    """Fails if some of an answer's images are evicted for the sake of others."""
    for _ in range(3):
        urls = urls_of(service, n=10)
        assert [service.client.get(url).status_code for url in urls] == [200] * 10
    assert len(list(store_of(service).glob("*.png"))) == 10


def test_what_could_not_be_kept_is_refused(tmp_path: Path) -> None:
    """Fails if images are drawn whose URLs are dead on arrival."""
    (tmp_path / "store").mkdir()
    flags = (
        "--store-dir",
        str(tmp_path / "store"),
        "--store-images",
        "3",
        "--store-max-size",
        "1M",
    )
    with running_service(tmp_path, *flags, environment={LARGE: "1"}) as service:
        # 1 MiB is room for two pictures of 384 x 384
        answer = service.draw(response_format="url", n=3)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "n")
        assert "at most 2" in error["message"]
        assert service.gauges()["generation_tokens_total"] == 0
        assert service.draw(n=4).status_code == 200
        for _ in range(3):
            assert [service.client.get(url).status_code for url in urls_of(service, n=2)] == [
                200,
                200,
            ]
            assert sum(file.stat().st_size for file in (tmp_path / "store").iterdir()) <= 2**20


@pytest.mark.parametrize(
    ("output_format", "media_type"),
    [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")],
)
def test_a_stored_image_has_its_type_and_may_be_kept(
    service: Service, output_format: str, media_type: str
) -> None:
    """Fails if the type depends on the system's table, or a browser asks again for what never
    changes.
    """
    url = urls_of(service, output_format=output_format)[0]
    answer = service.client.get(url)
    assert answer.headers["content-type"] == media_type
    assert "immutable" in answer.headers["cache-control"]
    size = (store_of(service) / name_of(url)).stat().st_size
    assert int(answer.headers["content-length"]) == len(answer.content) == size
    for tag in (answer.headers["etag"], f'"x", W/{answer.headers["etag"]}', "*"):
        again = service.client.get(url, headers={"If-None-Match": tag})
        assert (again.status_code, again.content, again.headers["etag"]) == (
            304,
            b"",
            answer.headers["etag"],
        )
    assert service.client.get(url, headers={"If-None-Match": '"x"'}).status_code == 200


def test_a_store_that_fails_is_told_before_drawing_and_recovers(service: Service) -> None:
    """Fails if work is done for nothing, the log gives no reason, the answer gives one, or the
    failure lasts.
    """
    folder, drawn = store_of(service), service.gauges()["generation_tokens_total"]
    shutil.rmtree(folder)
    folder.write_text("")  # a file where the folder was: also the superuser cannot write into it
    try:
        answer = service.draw(response_format="url", n=2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_failed")
        assert int(answer.headers["retry-after"]) > 0
        assert str(folder) not in answer.text
        assert service.gauges()["generation_tokens_total"] == drawn
        assert service.draw().status_code == 200  # b64_json goes on
        assert service.client.get(f"/v1/files/{'0' * 32}.png").status_code == 404
    finally:
        folder.unlink()
        folder.mkdir()
    line = next(json.loads(line) for line in service.log.splitlines() if "cannot be stored" in line)
    assert (line["folder"], line["errno"], line["level"]) == (str(folder), "ENOTDIR", "error")
    assert service.client.get(urls_of(service)[0]).status_code == 200


def test_a_folder_with_a_pictures_name_does_no_harm(service: Service) -> None:
    """Fails if it is an error of the service's own, or is removed."""
    odd = store_of(service) / f"{'0' * 32}.png"
    odd.mkdir()
    try:
        assert service.client.get(urls_of(service, n=10)[0]).status_code == 200
        assert service.client.get(f"/v1/files/{odd.name}").status_code == 404
    finally:
        odd.rmdir()


def test_a_second_service_in_the_folder_ends_with_status_2(tmp_path: Path) -> None:
    """Fails if two services delete each other's pictures, or the reason is not told; several fronts
    are one service.
    """
    (tmp_path / "store").mkdir()
    flags = ("--store-dir", str(tmp_path / "store"), "--api-server-count", "2")
    with running_service(tmp_path, *flags) as service:
        second = tmp_path / "second"
        second.mkdir()
        why = r"status 2: [^\n]*another service keeps its images there[^\n]*\n$"
        with pytest.raises(AssertionError, match=why), running_service(second, *flags):
            pass
        assert service.client.get(urls_of(service)[0]).status_code == 200
        service.process.kill()
        service.process.wait()
    with running_service(tmp_path, *flags) as service:  # the lock went with the process
        assert service.client.get(urls_of(service)[0]).status_code == 200
    assert (tmp_path / "store" / LOCK_FILE).exists()


def test_eviction_beside_reading_cuts_no_answer(service: Service) -> None:
    """Fails if a picture that is evicted while it is read is an error, or ends in the middle."""
    known, seen, end = [urls_of(service)[0]], Counter[object](), time.monotonic() + 4

    def write() -> None:
        with httpx2.Client(base_url=service.url, timeout=60) as client:
            while time.monotonic() < end:
                body = {"prompt": "cat", "response_format": "url", "n": 5}
                known.extend(
                    data["url"]
                    for data in client.post("/v1/images/generations", json=body).json()["data"]
                )

    def read() -> None:
        with httpx2.Client(timeout=60) as client:
            while time.monotonic() < end:
                for url in known[-12:]:
                    try:
                        answer = client.get(url)
                    except httpx2.HTTPError as error:
                        seen[type(error)] += 1
                        continue
                    whole = answer.status_code == 404 or answer.content[-8:-4] == b"IEND"
                    seen[answer.status_code if whole else "cut"] += 1

    threads = [threading.Thread(target=target) for target in (write, write, read, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {200, 404}, seen
    assert len(list(store_of(service).glob("*.png"))) <= 10


def test_descriptors_of_readers_that_leave_are_closed(service: Service) -> None:
    """Fails if a client that leaves in the middle costs a descriptor."""
    url = urls_of(service)[0]
    descriptors = Path(f"/proc/{service.process.pid}/fd")

    def in_store() -> set[str]:
        """The names of the store's files that it has open; one may be closed meanwhile."""
        places = []
        for descriptor in descriptors.iterdir():
            with contextlib.suppress(FileNotFoundError):
                places.append(os.readlink(descriptor))
        inside = [place for place in places if place.startswith(f"{store_of(service)}/")]
        return {Path(place).name.split(" ")[0] for place in inside}

    for _ in range(50):
        with httpx2.Client() as client, client.stream("GET", url) as answer:
            next(answer.iter_raw(1))
    service.wait_for(lambda: in_store() <= {LOCK_FILE}, 5)
