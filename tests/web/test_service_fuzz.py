"""The service against its own description: generated requests, right and wrong ones, and every
answer is checked.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx2
import hypothesis
import pytest
import schemathesis
from fake_service import Service, running_service
from hypothesis import HealthCheck, strategies
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok
from schemathesis.core.transport import DEFAULT_MAX_STREAM_EVENTS

load_all_checks()
FEW, MANY = 300, 10_000
# Left out: what a schema cannot say of a request (which classes there are, that partial_images goes
# with stream), and what needs several operations on one resource, of which there are none.
NAMES = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
]
NAMES += [
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "negative_data_rejection",
]
CHECKED = CHECKS.get_by_names(NAMES)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "store").mkdir()
    with running_service(
        folder, "--store-dir", str(folder / "store"), "--store-images", "50"
    ) as service:
        yield service


def check_event_stream(text: str) -> None:
    """Comments and named events with JSON in them; the last one is an end."""
    events = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    for event in events:
        name, data = event.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    if len(events) >= DEFAULT_MAX_STREAM_EVENTS:  # schemathesis does not read on
        return
    assert events[-1].split("\n")[0] in (
        "event: done",
        "event: image_generation.completed",
        "event: error",
    )


def sensible(case: Any, stored: str) -> Any:
    """A right request is mostly for a class, a model or an image that there is not; this one is for
    those that there are.
    """
    if isinstance(case.body, dict):
        wrong = ("model", "size", "class_label", "partial_images", "response_format")
        case.body = {name: value for name, value in case.body.items() if name not in wrong} | {
            "prompt": "cat"
        }
    if "name" in case.path_parameters:
        case.path_parameters["name"] = stored
    return case


def fuzz(service: Service, requests: int) -> Counter[tuple[str, int]]:
    """Sends generated requests to every operation; how many answers of each status each
    has given.
    """
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) == 14
    seen: Counter[tuple[str, int]] = Counter()
    stored = service.draw(response_format="url").json()["data"][0]["url"]
    stored = stored.rsplit("/", 1)[1].partition("?")[0]
    varied = [one for one in operations if one.body or len(list(one.iter_parameters()))]
    each = math.ceil(1.05 * requests / len(varied))  # some have fewer cases
    for operation in operations:
        modes = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]
        modes.append(modes[0].map(partial(sensible, stored=stored)))

        @hypothesis.settings(
            max_examples=each if operation in varied else 1,
            deadline=None,
            database=None,
            derandomize=requests == FEW,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=strategies.one_of(modes))
        def send(case: Any) -> None:
            response = case.call(timeout=30)
            seen[case.operation.label, response.status_code] += 1
            streamed = response.headers.get("content-type", [""])[0].startswith("text/event-stream")
            if streamed:
                check_event_stream(response.text)
            left_out = CHECKS.get_by_names(["response_schema_conformance"]) if streamed else []
            case.validate_response(
                response, checks=[check for check in CHECKED if check not in left_out]
            )

        send()
    return seen


def check(service: Service, seen: Counter[tuple[str, int]], requests: int) -> None:
    """That so many were sent, that right ones were among them, and that the service is as
    it was.
    """
    assert sum(seen.values()) >= requests
    for path in ("/v1/images/generations", "/v1/images/stream", "/v1/codes"):
        assert {status for label, status in seen if label == f"POST {path}"} >= {200, 400}
    assert {status for _, status in seen} <= {200, 400, 403, 404, 405}, seen
    assert service.client.get("/ready").status_code == 200
    service.wait_for(service.is_empty, 5)
    assert '"level": "error"' not in service.log
    assert "Traceback" not in service.log


def test_the_description_is_kept(service: Service) -> None:
    """Fails if a request makes a 5xx, or an answer has a status, a type or a shape that
    /openapi.json does not have.
    """
    check(service, fuzz(service, FEW), FEW)


@pytest.mark.soak
def test_the_description_is_kept_for_long(service: Service) -> None:
    """The same with 10,000 requests."""
    seen = fuzz(service, MANY)
    print(sum(seen.values()), "requests:", dict(seen))
    check(service, seen, MANY)


def test_what_is_described_is_what_there_is(service: Service) -> None:
    """Fails if a route has no description, or promises less than every request can meet: limits of
    size, a missing key.
    """
    document = service.client.get("/openapi.json").json()
    paths = document["paths"]
    assert set(paths) == {
        "/v1/images/generations",
        "/v1/images/stream",
        "/v1/images/stream/{drawing_id}",
        "/v1/codes",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/classes",
        "/v1/files/{name}",
        "/version",
        "/health",
        "/ping",
        "/ready",
        "/metrics",
    }
    for path, operations in paths.items():
        for method, operation in operations.items():
            answers = operation["responses"]
            success = "204" if method == "delete" else "200"
            assert set(answers) >= {success, "400", "413", "431", "500"}, (method, path)
            assert ("401" in answers) == (path not in ("/health", "/ping", "/ready"))
            for status, described in answers.items():
                if int(status) >= 400:
                    shape = described["content"]["application/json"]["schema"]
                    assert shape == {"$ref": "#/components/schemas/ErrorAnswer"}, (status, path)
    for path in ("/v1/images/generations", "/v1/images/stream", "/v1/codes"):
        assert set(paths[path]["post"]["responses"]) >= {"401", "404", "429", "503", "504"}


def test_openais_description_of_a_request_is_followed(service: Service) -> None:
    """Fails if a field is described under another name or range than it is read."""
    schemas = service.client.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["ImageRequest"]["properties"]
    assert schemas["ImageRequest"]["additionalProperties"] is False
    for name, limits in (
        ("n", (1, 10)),
        ("output_compression", (0, 100)),
        ("partial_images", (0, 3)),
    ):
        described = fields[name]["anyOf"][0]
        assert (described["minimum"], described["maximum"]) == limits
        for value in (limits[0] - 1, limits[1] + 1):
            body = {"prompt": "cat", "stream": True, name: value}
            with httpx2.Client(base_url=service.url) as client:
                assert client.post("/v1/images/generations", json=body).status_code == 400
