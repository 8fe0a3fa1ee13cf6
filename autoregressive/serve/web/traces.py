"""The spans of requests, sent to a collector that speaks OTLP over HTTP. Only a service with
--otlp-traces-endpoint imports this.

A request's spans are made when its answer has ended, from moments that every service notes on the
way. So a service without a collector does no more than that, and one with a collector makes no span
while images are drawn.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from autoregressive.serve.web.app_state import context_of
from autoregressive.serve.worker.messages import RequestPhase, ServedRequest
from autoregressive.version import PROGRAM, program_version

_LAST_SPANS_SECONDS = 1.0  # to send the spans that are left when the service ends
_NO_FAULT_OF_OURS = ("success", "invalid", "rejected", "disconnected")  # outcomes


class RequestTraces:
    """Makes spans, and sends them in a thread of its own.

    The OTEL_* variables of the environment hold as they do for every program with OpenTelemetry's
    SDK: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and others.

    Args:
        endpoint: the whole URL that spans are posted to.
        model: its name for clients.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        about = {
            "service.name": os.environ.get("OTEL_SERVICE_NAME", PROGRAM),
            "service.version": program_version(),
        }
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        # a line of the log for each malformed header would be the client's to write
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
        self._tracer = self._provider.get_tracer(PROGRAM)
        self._model = model

    def record(self, scope: Scope, line: Mapping[str, Any]) -> None:
        """Makes the spans of a request that has been answered.

        Args:
            line: of the log.
        """
        now = time.monotonic()
        past = time.time_ns() - int(now * 1e9)  # what a moment lacks to Unix time

        def unix(moment: float) -> int:
            return past + int(moment * 1e9)

        attributes = {
            "http.request.method": line["method"],
            "http.route": line["path"],
            "http.response.status_code": line["status"],
            "gen_ai.request.id": line["request_id"],
            "gen_ai.response.model": self._model,
            "gen_ai.request.n": line.get("images"),
            "gen_ai.usage.output_tokens": line.get("tokens"),
            "llamagen.class_label": line.get("class_label"),
            "llamagen.seed": line.get("seed"),
            "llamagen.outcome": line["outcome"],
        }
        span = self._tracer.start_span(
            f"{line['method']} {line['path']}",
            _of_the_caller(scope),
            SpanKind.SERVER,
            {name: value for name, value in attributes.items() if value is not None},
            start_time=unix(now - line["seconds"]),
        )
        if line["outcome"] not in _NO_FAULT_OF_OURS:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", line["outcome"])
        served = context_of(scope).served
        if served is not None and span.is_recording():
            parent = set_span_in_context(span, Context())
            for phase in phases(served, now):
                about = {} if phase.image is None else {"llamagen.image_index": phase.image}
                child = self._tracer.start_span(
                    phase.name, parent, attributes=about, start_time=unix(phase.begun)
                )
                child.end(unix(phase.ended))
        span.end(unix(now))

    def close(self) -> None:
        """Sends the spans that are left, as far as the collector takes them soon."""
        # it may wait half a minute for a collector that does not answer
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_LAST_SPANS_SECONDS)


def phases(served: ServedRequest, now: float) -> Iterator[RequestPhase]:
    """What became of a request: it waited, and its tokens were sampled; then the tokens of each
    image became pixels, and the pixels a file.

    Args:
        now: the end of a phase that has not ended.
    """
    end = now if served.ended is None else served.ended.at
    yield RequestPhase("queue", served.accepted_at, served.started_at or end)
    if served.started_at is not None:
        pixels = [phase for phase in served.phases if phase.name == "pixels"]
        complete = served.images_here == served.request.n
        drawn = max(phase.begun for phase in pixels) if complete else end
        yield RequestPhase("steps", served.started_at, drawn)
    if served.request.pixels:
        yield from served.phases


def _of_the_caller(scope: Scope) -> Context:
    """The span that a caller has named in `traceparent`; an empty context if there is none."""
    names = (b"traceparent", b"tracestate")
    carrier = {
        name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in names
    }
    return TraceContextTextMapPropagator().extract(carrier, Context())
