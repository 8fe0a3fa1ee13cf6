"""What a request may consist of: JSON's numbers, encodings, types, and slips of the keyboard in a
query or a body.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fake_service import Service, running_service

PATHS = ("/v1/images/generations", "/v1/images/stream", "/v1/codes")
WHOLE = ("class_label", "n", "seed", "cfg_interval", "top_k")
WHOLE_OF_IMAGES = (*WHOLE, "output_compression", "partial_images")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("bodies")) as service:
        yield service


def post(
    service: Service, content: bytes | str, path: str = "/v1/codes", **headers: str
) -> httpx2.Response:
    """A body as it is; underscores in a header's name stand for dashes."""
    named = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return service.client.post(path, content=content, headers=named)


def error_of(answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


# Numbers


def test_a_whole_number_may_be_written_with_a_point(service: Service) -> None:
    """Fails if what the description calls an integer (JSON Schema: 1.0 is one) is refused, or
    changes its value.
    """
    plain = {"class_label": 3, "n": 1, "seed": 12, "cfg_interval": 4, "top_k": 50}
    drawn = post(service, json.dumps(plain)).json()["data"]
    for form in ("{}.0", "{}.000", "{}e0", "{}.0E+0"):
        body = ",".join(f'"{name}":{form.format(value)}' for name, value in plain.items())
        assert post(service, f"{{{body}}}").json()["data"] == drawn, form
    tens = post(service, '{"class_label":0.3e1,"n":1,"seed":1.2e1,"cfg_interval":4,"top_k":5e1}')
    assert tens.json()["data"] == drawn
    for name in ("output_compression", "partial_images"):
        body = f'{{"prompt":"cat","stream":true,"output_format":"jpeg","{name}":2.0}}'
        assert post(service, body, PATHS[0]).status_code == 200


@pytest.mark.parametrize(
    "value", ["1.5", '"1"', '"1.0"', "true", "false", "[1]", "{}", "1e-1", "1e400", "-1e400"]
)
@pytest.mark.parametrize("name", WHOLE_OF_IMAGES)
def test_what_is_no_whole_number_is_refused(service: Service, name: str, value: str) -> None:
    """Fails if a number is rounded, or a text or a truth value passes for one."""
    error = error_of(post(service, f'{{"prompt":"cat","stream":true,"{name}":{value}}}', PATHS[0]))
    assert (error["param"], error["code"]) == (name, "invalid_value")


def test_the_description_calls_integers_what_the_service_takes_as_such(service: Service) -> None:
    """Fails if a field is described as another kind than it is read, or the list above is not of
    all.
    """
    schemas = service.client.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["ImageRequest"]["properties"]
    found = {
        name
        for name, field in fields.items()
        if {"integer"} & {one.get("type") for one in field.get("anyOf", [])}
    }
    assert found == set(WHOLE_OF_IMAGES)


def test_a_number_may_be_whole_where_another_would_do(service: Service) -> None:
    """Fails if reading 1.0 as 1 takes fractions from the fields that want them."""
    whole = post(
        service, '{"prompt":"cat","seed":1,"cfg_scale":2,"temperature":1,"top_p":1}'
    ).json()["data"]
    assert (
        post(
            service, '{"prompt":"cat","seed":1,"cfg_scale":2.0,"temperature":1.0,"top_p":1.0}'
        ).json()["data"]
        == whole
    )
    assert (
        post(
            service, '{"prompt":"cat","seed":1,"cfg_scale":2.0,"temperature":0.1,"top_p":0.1}'
        ).json()["data"]
        != whole
    )


# What is no JSON


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the body is empty"),
        (b'{"prompt":"caf\xe9"}', "is not UTF-8 (at byte 14)"),
        ('{"prompt":"cat"}'.encode("utf-16"), "is not UTF-8 (at byte 0)"),
        (b'{"prompt":"\xed\xa0\x80"}', "is not UTF-8"),
        (b'{"prompt":"\xc0\xaf"}', "is not UTF-8"),
        (gzip.compress(b'{"prompt":"cat"}', mtime=0), "is not UTF-8"),
        ('{"prompt":"cat"}'.encode("utf-16-le"), "is not JSON (at character 1)"),
        (b'{"prompt":"cat"', "is not JSON (at character 15)"),
        (b'{"prompt":"cat",}', "is not JSON"),
        (b"{'prompt':'cat'}", "is not JSON"),
        (b'{"prompt":"cat"} {}', "is not JSON"),
        (b'{"prompt":"a\nb"}', "is not JSON"),
        (b'{"prompt":"cat"} // a cat', "is not JSON"),
        (b'{"prompt":"cat","seed":0x10}', "is not JSON"),
        (b'{"prompt":"cat","seed":01}', "is not JSON"),
        (b'{"prompt":"cat","temperature":NaN}', "JSON has no NaN"),
        (b'{"prompt":"cat","user":NaN}', "JSON has no NaN"),
        (b'{"prompt":"cat","user":[{"a":-Infinity}]}', "JSON has no -Infinity"),
        (b'{"prompt":"cat","seed":1,"seed":2}', "has seed twice"),
        (b'{"prompt":"cat","seed":1,"\\u0073eed":1}', "has seed twice"),
        (b'{"prompt":"cat","user":{"a":1,"a":2}}', "has a twice"),
        (b'{"\\ud800":1,"\\ud800":2}', "has \\ud800 twice"),
        (b'{"prompt":"cat","user":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (
            b'{"prompt":"cat","user":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
            "nested too deeply",
        ),
        (b'{"prompt":"cat","seed":' + b"1" * 5000 + b"}", "a number of too many digits"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"cat"', "must be a JSON object"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_body_is_told_what_is_wrong(
    service: Service, path: str, content: bytes, said: str
) -> None:
    """Fails if somebody is told that "the request cannot be answered", or of a body that has two
    meanings one is drawn.
    """
    error = error_of(post(service, content, path))
    assert said in error["message"]
    assert error["code"] in ("invalid_json", "invalid_body")


def test_a_byte_order_mark_is_passed_over(service: Service) -> None:
    """Fails if bodies from Windows' editors and shells are refused; RFC 8259, section 8.1, allows
    to read them.
    """
    assert post(service, b'\xef\xbb\xbf{"prompt":"cat"}').status_code == 200


JSON_TYPES = [
    "application/json",
    "Application/JSON",
    "application/json; charset=utf-8",
    "application/problem+json",
]
OTHER_TYPES = [
    "text/plain",
    "text/json",
    "application/jsonx",
    "application/x-json",
    "json",
    "",
    "multipart/form-data",
]


@pytest.mark.parametrize("kind", JSON_TYPES)
def test_json_is_known_by_its_type(service: Service, kind: str) -> None:
    """Fails if a way to declare JSON is refused that clients use."""
    assert post(service, b'{"prompt":"cat"}', Content_Type=kind).status_code == 200


@pytest.mark.parametrize("kind", OTHER_TYPES)
@pytest.mark.parametrize("path", PATHS)
def test_another_type_is_a_415_that_says_what_to_send(
    service: Service, path: str, kind: str
) -> None:
    """Fails if the message leaves open what to send."""
    error = error_of(post(service, b'{"prompt":"cat"}', path, Content_Type=kind), 415)
    assert (error["code"], error["param"]) == ("unsupported_media_type", None)
    assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize(
    ("coding", "content"),
    [
        ("gzip", gzip.compress(b'{"prompt":"cat"}', mtime=0)),
        ("GZIP", gzip.compress(b'{"prompt":"cat"}', mtime=0)),
        ("deflate", zlib.compress(b'{"prompt":"cat"}')),
        ("br", b'{"prompt":"cat"}'),
        ("identity, gzip", b'{"prompt":"cat"}'),
    ],
)
def test_a_compressed_body_is_a_415_that_says_so(
    service: Service, coding: str, content: bytes
) -> None:
    """Fails if it is taken for broken JSON, or the answer does not name the coding that is read
    (RFC 9110, 15.5.16).
    """
    answer = post(service, content, Content_Encoding=coding)
    error = error_of(answer, 415)
    assert error["code"] == "unsupported_encoding"
    assert "compressed" in error["message"]
    assert answer.headers["accept-encoding"] == "identity"


def test_a_body_that_is_declared_as_not_compressed_is_read(service: Service) -> None:
    """Fails if any Content-Encoding is refused, whatever it says."""
    assert post(service, b'{"prompt":"cat"}', Content_Encoding="identity").status_code == 200


# Slips of the keyboard


@pytest.mark.parametrize(
    ("target", "param", "said"),
    [
        ("/v1/classes?limt=2", "limt", "did you mean limit?"),
        ("/v1/classes?serach=cat&limit=2", "serach", "did you mean search?"),
        ("/v1/classes?Limit=2", "Limit", "did you mean limit?"),
        ("/v1/classes?limit=2&q=cat", "q", "q is not a known query parameter"),
        ("/v1/classes?limit=2&limit=3", "limit", "has limit twice"),
        ("/v1/classes?%6cimit=2&limit=2", "limit", "has limit twice"),
        ("/v1/classes?=2", "", "is not a known query parameter"),
        ("/v1/models?limit=2", "limit", "limit is not a known query parameter"),
        ("/v1/models/fake?x=", "x", "x is not a known query parameter"),
    ],
)
def test_a_query_parameter_that_there_is_not_is_refused(
    service: Service, target: str, param: str, said: str
) -> None:
    """Fails if a slip passes for a setting, or the answer leaves one to search for it."""
    error = error_of(service.client.get(target))
    assert error["param"] == param
    assert said in error["message"]
    assert len(error["message"]) < 100


def test_fields_in_the_query_are_refused(service: Service) -> None:
    """Fails if a setting that belongs in the body is passed over where it is."""
    for path in PATHS:
        answer = service.client.post(f"{path}?seed=3", json={"prompt": "cat"})
        assert error_of(answer)["message"] == "seed is not a known query parameter"


def test_probes_may_have_any_query(service: Service) -> None:
    """Fails if a monitor that marks its requests, or that goes round caches, finds the service
    dead.
    """
    for path in ("/health", "/ready", "/metrics", "/", "/docs", "/static/api.js", "/openapi.json"):
        assert service.client.get(f"{path}?probe=1").status_code == 200


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cfg_scal", "cfg_scal is not a known field: did you mean cfg_scale?"),
        ("CFG_SCALE", "CFG_SCALE is not a known field: did you mean cfg_scale?"),
        ("temprature", "temprature is not a known field: did you mean temperature?"),
        ("steps", "steps is not a known field"),
        ("x" * 5000, "x" * 100 + "... is not a known field"),
    ],
)
def test_a_field_that_there_is_not_is_refused_with_the_nearest(
    service: Service, name: str, said: str
) -> None:
    """Fails if the nearest name is not told, or a long one comes back whole."""
    error = error_of(post(service, json.dumps({"prompt": "cat", name: 1})))
    assert error["message"] == said
    assert error["code"] == "unknown_field"


def test_only_fields_of_the_route_are_suggested(service: Service) -> None:
    """Fails if a client is led to a field that the route refuses next."""
    assert "mean" not in error_of(post(service, '{"prompt":"cat","partial_image":1}'))["message"]
    assert (
        "mean partial_images?"
        in error_of(post(service, '{"prompt":"cat","partial_image":1}', PATHS[0]))["message"]
    )
