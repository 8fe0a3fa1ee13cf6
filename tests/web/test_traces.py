"""Spans of requests, which a stand-in of a collector takes over HTTP."""

import importlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_service import KEY, Service, running_service

from autoregressive.errors import UserError
from autoregressive.serve.web.address_settings import check_traces_endpoint
from autoregressive.serve.worker.messages import (
    Ended,
    EngineRequest,
    Image,
    RequestPhase,
    ServedRequest,
    Started,
)

pytest.importorskip("opentelemetry.sdk", reason="needs the extra [otlp]")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from autoregressive.serve.web.traces import phases

SOON = {"OTEL_BSP_SCHEDULE_DELAY": "50"}  # milliseconds until spans are sent
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Span:
    """A span as the collector has got it."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    seconds: tuple[float, float]  # Unix time of its begin and its end
    attributes: dict[str, Any]
    failed: bool


@dataclass
class Collector:
    """Takes spans, unless it is told to keep its clients waiting."""

    endpoint: str = ""
    services: set[str] = field(default_factory=set)
    spans: list[Span] = field(default_factory=list)
    asked: int = 0
    silent: bool = False

    def take(self, body: bytes) -> None:
        message = ExportTraceServiceRequest.FromString(body)
        for resource in message.resource_spans:
            about = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.services.add(about["service.name"])
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                self.spans.append(
                    Span(
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        (span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9),
                        {
                            one.key: getattr(one.value, one.value.WhichOneof("value") or "")
                            for one in span.attributes
                        },
                        span.status.code == 2,
                    )
                )

    def root(self, service: Service, request_id: str) -> Span:
        """The span of a whole request, once it has come; spans of a request come together."""

        def found() -> list[Span]:
            return [
                span
                for span in list(self.spans)
                if span.attributes.get("gen_ai.request.id") == request_id
            ]

        service.wait_for(lambda: found() != [], 20)
        (root,) = found()
        return root

    def children(self, root: Span) -> list[Span]:
        return [span for span in list(self.spans) if span.parent == root.span_id]


@contextmanager
def running_collector() -> Iterator[Collector]:
    collector, stopping = Collector(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            collector.asked += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/x-protobuf"
            assert self.path == "/v1/traces"
            if collector.silent:
                stopping.wait(60)
            collector.take(body)
            self.send_response(200)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    collector.endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
    try:
        yield collector
    finally:
        stopping.set()
        server.shutdown()
        thread.join(20)
        server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="module", params=["1", "2"])
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Service]:
    """A service with a collector, with one API server and with two."""
    flags = ["--otlp-traces-endpoint", collector.endpoint, "--api-server-count", request.param]
    folder = tmp_path_factory.mktemp("traced")
    with running_service(folder, *flags, environment=SOON) as service:
        yield service


def test_a_request_has_a_span_for_each_phase(traced: Service, collector: Collector) -> None:
    """Fails if a phase is missing, lies outside of its request or before the one that it follows,
    or an answer cannot be found by its id.
    """
    traced.faults.set("step_seconds", "0.005")
    begun = time.time()
    answer = traced.draw(n=2, seed=2**63 - 1)
    ended = time.time()
    traced.faults.clear("step_seconds")
    root = collector.root(traced, answer.headers["X-Request-Id"])
    assert root.name == "POST /v1/images/generations"
    assert (root.parent, root.failed) == ("", False)
    assert collector.services == {"llamagen-serve"}
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/images/generations",
        "http.response.status_code": 200,
        "gen_ai.request.id": answer.headers["X-Request-Id"],
        "gen_ai.response.model": "fake",
        "gen_ai.request.n": 2,
        "gen_ai.usage.output_tokens": 128,
        "llamagen.class_label": 2,
        "llamagen.seed": 2**63 - 1,
        "llamagen.outcome": "success",
    }
    children = collector.children(root)
    assert {child.trace_id for child in children} == {root.trace_id}
    by_name: dict[str, list[Span]] = {}
    for child in sorted(
        children, key=lambda child: child.attributes.get("llamagen.image_index", 0)
    ):
        by_name.setdefault(child.name, []).append(child)
        assert root.seconds[0] - 0.01 <= child.seconds[0] <= child.seconds[1] <= root.seconds[1]
    assert {name: len(spans) for name, spans in by_name.items()} == {
        "queue": 1,
        "steps": 1,
        "pixels": 2,
        "encoding": 2,
    }
    (queue,), (steps,) = by_name["queue"], by_name["steps"]
    assert queue.seconds[1] == pytest.approx(steps.seconds[0], abs=1e-3)
    assert steps.seconds[1] - steps.seconds[0] > 0.2  # 64 tokens at 5 ms
    for index, (pixels, encoding) in enumerate(
        zip(by_name["pixels"], by_name["encoding"], strict=True)
    ):
        assert pixels.attributes == encoding.attributes == {"llamagen.image_index": index}
        assert pixels.seconds[1] <= encoding.seconds[0] + 1e-3
    assert by_name["pixels"][-1].seconds[0] == pytest.approx(steps.seconds[1], abs=1e-3)
    assert begun - 0.05 < root.seconds[0] < root.seconds[1] < ended + 0.05


def test_a_caller_s_trace_goes_on(traced: Service, collector: Collector) -> None:
    """Fails if a request of a traced program begins a trace of its own, is recorded though its
    caller says no, or a malformed header breaks it.
    """

    def draw(traceparent: str) -> str:
        headers = {"traceparent": traceparent}
        body = {"prompt": "cat"}
        answer = traced.client.post("/v1/codes", json=body, headers=headers)
        assert answer.status_code == 200
        return answer.headers["X-Request-Id"]

    unwanted = draw(CALLER[:-2] + "00")
    root = collector.root(traced, draw(CALLER))
    assert (root.trace_id, root.parent) == (CALLER[3:35], CALLER[36:52])
    assert {child.name for child in collector.children(root)} == {"queue", "steps"}
    own = collector.root(traced, draw("00-nonsense"))
    assert own.parent == ""
    assert own.trace_id != root.trace_id
    assert unwanted not in {span.attributes.get("gen_ai.request.id") for span in collector.spans}


def test_failures_have_spans(traced: Service, collector: Collector) -> None:
    """Fails if a trace does not show what went wrong, or takes a client's mistake for ours."""
    traced.faults.set("nan", "7")
    lost = traced.draw(seed=7)
    traced.faults.clear("nan")
    root = collector.root(traced, lost.headers["X-Request-Id"])
    assert (root.failed, root.attributes["http.response.status_code"]) == (True, 500)
    assert root.attributes["error.type"] == "failed"
    assert {child.name for child in collector.children(root)} == {"queue", "steps"}
    wrong = traced.draw(prompt="no such class")
    root = collector.root(traced, wrong.headers["X-Request-Id"])
    assert (root.failed, root.attributes["llamagen.outcome"]) == (False, "invalid")
    assert collector.children(root) == []


def test_probes_have_none(traced: Service, collector: Collector) -> None:
    """Fails if probes and the page's files fill the collector."""
    for path in ("/health", "/metrics", "/", "/v1/models", "/v1/images/generations"):
        traced.client.get(path)
    collector.root(traced, traced.draw().headers["X-Request-Id"])
    names = {span.name for span in collector.spans if span.parent == ""}
    assert names <= {"POST /v1/images/generations", "POST /v1/codes"}


def test_spans_have_no_keys(tmp_path: Path, collector: Collector) -> None:
    """Fails if a key that a client puts into its id reaches the collector, a malformed header is
    quoted in the log, or those without a key can fill the collector.
    """
    flags = ["--otlp-traces-endpoint", collector.endpoint]
    environment = {**SOON, "LLAMAGEN_API_KEY": KEY, "OTEL_SERVICE_NAME": "pictures"}
    with running_service(tmp_path, *flags, environment=environment) as service:
        stranger = service.client.post("/v1/codes", headers={"X-Request-Id": "stranger"})
        assert stranger.status_code == 401
        key = {"Authorization": f"Bearer {KEY}"}
        headers = key | {"X-Request-Id": f"id-{KEY}"}
        headers |= {"traceparent": CALLER, "tracestate": f"={KEY}"}
        service.client.post("/v1/codes", json={"prompt": "cat"}, headers=headers)
        collector.root(service, "id-[key]")
        service.client.post("/v1/codes", headers=key | {"traceparent": "x" * 600})
        last = service.client.post("/v1/codes", headers=key)
        collector.root(service, last.headers["X-Request-Id"])
        assert "opentelemetry" not in service.log
        assert KEY not in service.log
    assert collector.services >= {"pictures"}
    assert KEY not in str(collector.spans)
    assert "stranger" not in str(collector.spans)


@pytest.mark.timing
@pytest.mark.parametrize("servers", ["1", "2"])
def test_a_collector_that_does_not_answer_holds_up_nothing(tmp_path: Path, servers: str) -> None:
    """Fails if requests, or the end of the service, wait for the collector; or if the spans of the
    last requests are lost where it answers.
    """
    with running_collector() as collector:
        flags = ["--otlp-traces-endpoint", collector.endpoint, "--api-server-count", servers]
        with running_service(tmp_path, *flags) as service:
            last = service.draw().headers["X-Request-Id"]
            assert service.terminate() == 0
            assert collector.root(service, last)
        collector.silent = True
        (tmp_path / "silent").mkdir()
        with running_service(tmp_path / "silent", *flags, environment=SOON) as service:
            service.draw()
            service.wait_for(lambda: collector.asked > 1, 10)
            begun = time.monotonic()
            assert service.draw().status_code == 200
            assert time.monotonic() - begun < 1
            assert service.terminate() == 0
            assert time.monotonic() - begun < 5


def test_nothing_of_it_is_imported_without_the_flag(tmp_path: Path, collector: Collector) -> None:
    """Fails if a service without a collector loads what sends spans."""
    loaded = []
    for name, flags in (("on", ["--otlp-traces-endpoint", collector.endpoint]), ("off", [])):
        (tmp_path / name).mkdir()
        with running_service(tmp_path / name, *flags) as service:
            service.draw()
            maps = Path(f"/proc/{service.process.pid}/maps").read_text()
            loaded.append("google/_upb" in maps)  # protobuf's
    assert loaded == [True, False]


def test_the_extra_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing package ends in a traceback, or the message does not say what to do."""
    module = "autoregressive.serve.web.traces"
    monkeypatch.delitem(sys.modules, module)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError) as raised:
        check_traces_endpoint("http://127.0.0.1:4318/v1/traces")
    said = raised.value.spelled(lambda name: f"--{name.replace('_', '-')}")
    assert said.startswith("--otlp-traces-endpoint: opentelemetry.sdk is")
    assert said.endswith(" not installed: pip install 'llamagen-serve[otlp]'")
    monkeypatch.undo()
    importlib.import_module(module)


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http:///v1", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    """Fails if spans go nowhere and nobody says so."""
    from test_service_settings import refusal

    assert refusal(f"--otlp-traces-endpoint={url}").startswith(f"--otlp-traces-endpoint {url}")


def test_a_request_that_is_not_complete_has_the_phases_that_it_reached() -> None:
    """Fails if a request that ended in the queue, or in the middle, has phases without an end."""
    request = EngineRequest(0, 2, 2, params=None, pixels=True)  # type: ignore[arg-type]
    served = ServedRequest(request, 10.0)
    assert list(phases(served, 11.0)) == [RequestPhase("queue", 10.0, 11.0)]
    served.take(Started(0, 12.0))
    served.take(Image(0, 1, 14.0, 15.0, 0.5, b""))
    found = [
        RequestPhase("queue", 10.0, 12.0),
        RequestPhase("steps", 12.0, 16.0),
        RequestPhase("pixels", 14, 15, 1),
    ]
    assert list(phases(served, 16.0)) == found
    served.take(Ended(0, "run_timeout", 15.5))
    found[1] = RequestPhase("steps", 12.0, 15.5)
    assert list(phases(served, 16.0)) == found
