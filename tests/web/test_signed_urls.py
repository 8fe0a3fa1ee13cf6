"""URLs of stored images that open in a browser: signed, and for a while only."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from fake_service import KEY, Service, running_service

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.signed_urls import UrlSigner

NAME = f"{'0' * 32}.png"
SIGNING_KEY = "s" * 16
BEARER = {"Authorization": f"Bearer {KEY}"}


def scope_of(url: str) -> dict[str, Any]:
    """Of a request for a URL."""
    parts = urlsplit(url)
    return {"path": parts.path, "query_string": parts.query.encode()}


def code_of(signer: UrlSigner, url: str) -> str:
    """Of the error that a URL is refused with."""
    with pytest.raises(ApiError) as refused:
        signer.admits(scope_of(url))
    assert refused.value.status == 403
    return refused.value.code


def test_a_signed_url_is_let_in_until_it_expires() -> None:
    """Fails if it works for ever, or not even at first."""
    now = 1000.0
    signer = UrlSigner("secret", 60, lambda: now)
    url = signer.signed(f"http://x/v1/files/{NAME}")
    assert parse_qs(urlsplit(url).query)["expires"] == ["1060"]
    assert signer.admits(scope_of(url))
    now = 1059.9
    assert signer.admits(scope_of(url))
    now = 1060.0
    assert code_of(signer, url) == "expired_url"


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("expires=1060", "expires=9999"),
        ("expires=1060", "expires="),
        ("expires=1060&", ""),
        ("expires=1060", "expires=1060.0"),
        (NAME, f"{'1' * 32}.png"),
        ("signature=", "signature=0"),
        ("signature=", "signature=&x="),
        ("signature=", "expires=soon&signature="),
        ("signature=", "signature=0&signature="),
        ("signature=", "signature=%ff&x="),
    ],
)
def test_a_url_that_was_changed_is_refused(part: str, other: str) -> None:
    """Fails if a client can prolong a URL, or use it for another image."""
    signer = UrlSigner("secret", 60, lambda: 1000.0)
    url = signer.signed(f"http://x/v1/files/{NAME}")
    assert code_of(signer, url.replace(part, other, 1)) == "invalid_signature"


def test_only_a_signer_with_the_same_key_lets_it_in() -> None:
    """Fails if the key has no effect, or services with one key refuse the URLs of each other."""
    url = UrlSigner("secret", 60).signed(f"http://x/v1/files/{NAME}")
    assert UrlSigner("secret", 5).admits(scope_of(url))
    assert code_of(UrlSigner("other", 60), url) == "invalid_signature"


def test_what_has_no_signature_is_left_to_others() -> None:
    """Fails if the key is not asked for, or other routes are opened by a signature."""
    signer = UrlSigner("secret", 60)
    query = urlsplit(signer.signed(f"http://x/v1/files/{NAME}")).query
    assert not signer.admits(scope_of(f"http://x/v1/files/{NAME}"))
    for path in ("/v1/models", "/metrics", f"/v1/filesx/{NAME}"):
        assert not signer.admits(scope_of(f"http://x{path}?{query}"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With keys for clients and for URLs, and with two processes that answer HTTP."""
    folder = tmp_path_factory.mktemp("signed")
    (folder / "store").mkdir()
    flags = ["--store-dir", str(folder / "store"), "--api-server-count", "2"]
    keys = {"LLAMAGEN_API_KEY": KEY, "LLAMAGEN_URL_SIGNING_KEY": SIGNING_KEY}
    with running_service(folder, *flags, "--url-lifetime", "600", environment=keys) as service:
        yield service


def image_url(service: Service) -> str:
    body = {"prompt": "cat", "response_format": "url"}
    answer = service.client.post("/v1/images/generations", json=body, headers=BEARER)
    url: str = answer.json()["data"][0]["url"]
    return url


def test_an_image_opens_without_a_header_for_a_while(service: Service) -> None:
    """Fails if a browser cannot show an image, one of the processes does not know the key of the
    other, or the URL works for longer than was said.
    """
    url = image_url(service)
    answers = [httpx2.get(url) for _ in range(16)]  # connections of their own, to both processes
    assert {answer.status_code for answer in answers} == {200}
    assert answers[0].content.startswith(b"\x89PNG")
    kept = answers[0].headers["cache-control"]
    assert kept in [f"private, max-age={seconds}, immutable" for seconds in range(500, 601)]
    assert httpx2.head(url).status_code == 200
    # a client that sends its key everywhere
    assert httpx2.get(url, headers={"Authorization": "Bearer of-another-service"}).is_success
    plain = url.partition("?")[0]
    late = httpx2.get(UrlSigner(SIGNING_KEY, 600, lambda: time.time() - 600).signed(plain))
    assert (late.status_code, late.json()["error"]["code"]) == (403, "expired_url")
    assert httpx2.get(plain).status_code == 401
    assert httpx2.get(plain, headers=BEARER).is_success


def test_a_tampered_url_is_forbidden(service: Service) -> None:
    """Fails if anything but the URL that was given out opens the image."""
    url = image_url(service)
    wrong = [url[:-1], url.replace("expires=", "expires=9")]
    wrong += [f"{url}&signature=x", f"{url}&expires=soon", f"{url}&expires=9999999999"]
    for answer in map(httpx2.get, wrong):
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "invalid_signature"


def test_a_key_from_the_environment_outlives_the_service(tmp_path: Path) -> None:
    """Fails if URLs die with the process though the operator has given a key."""
    (tmp_path / "store").mkdir()
    flags = ["--store-dir", str(tmp_path / "store")]
    for environment, status in (({"LLAMAGEN_URL_SIGNING_KEY": "s" * 16}, 200), ({}, 403)):
        with running_service(tmp_path, *flags, environment=environment) as service:
            url = urlsplit(service.draw(response_format="url").json()["data"][0]["url"])
        with running_service(tmp_path, *flags, environment=environment) as service:
            assert service.client.get(f"{url.path}?{url.query}").status_code == status


def test_a_short_signing_key_is_refused() -> None:
    """Fails if a key that can be guessed is taken."""
    from test_service_settings import refusal

    for key in ("s" * 15, "", "ü" * 20):
        assert "--url-signing-key: must be printable ASCII of at least 16" in refusal(
            f"--url-signing-key={key}"
        )
