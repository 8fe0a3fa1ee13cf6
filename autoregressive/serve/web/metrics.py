"""Metrics for Prometheus, under vLLM's names with our prefix, in a registry of their own."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from autoregressive.serve.web.connections import ConnectionStats
from autoregressive.serve.worker.messages import Ended, ServedRequest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 40, 80, 160)
_STEP_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)
_HISTOGRAMS = {
    "time_to_first_token_seconds": (
        "From acceptance to when the device was given the first span.",
        _SECONDS,
    ),
    "inter_token_latency_seconds": ("Mean time between tokens of an image.", _STEP_SECONDS),
    "e2e_request_latency_seconds": ("From acceptance to the last image.", _SECONDS),
    "request_queue_time_seconds": ("From acceptance to the start.", _SECONDS),
    "pixel_decode_seconds": ("From codes to pixels on the host, per image.", _SECONDS),
}
_COUNTERS = {
    "prompt_tokens": "Class tokens of finished requests, one an image.",
    "generation_tokens": "Image tokens of finished requests.",
    "images": "Images of finished requests.",
    "spec_decode_num_drafts": "Passes of finished requests with lookahead, for each image.",
    "spec_decode_num_draft_tokens": "Guesses that finished requests tried.",
    "spec_decode_num_accepted_tokens": "Guesses of finished requests that held.",
}


class Metrics(Collector):
    """Counters and histograms, and gauges that are read when they are asked for.

    Args:
        running, waiting, page_use: what the gauges show.

    Attributes:
        connection_stats: tells of the connections of all processes that answer HTTP.
        dropped_lines: tells how many lines of the log could not be written, where it is known.
        model_name: the label of every metric.
    """

    connection_stats: Callable[[], ConnectionStats] = ConnectionStats
    dropped_lines: Callable[[], int] | None = None
    model_name = ""

    def __init__(
        self,
        running: Callable[[], float],
        waiting: Callable[[], float],
        page_use: Callable[[], float],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        for name, value, text in (
            (
                "num_requests_running",
                running,
                "Requests of which at least one image is being drawn.",
            ),
            ("num_requests_waiting", waiting, "Accepted requests that have not begun."),
            (
                "kv_cache_usage_perc",
                page_use,
                "Share of the KV cache's pages that are in use, 0 to 1.",
            ),
        ):
            Gauge(f"llamagen:{name}", text, registry=registry).set_function(value)
        self._histograms = {
            name: Histogram(f"llamagen:{name}", text, buckets=buckets, registry=registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(f"llamagen:{name}", text, registry=registry)
            for name, text in _COUNTERS.items()
        }
        self.requests = Counter(
            "llamagen:requests",
            "Requests for images or codes by outcome.",
            ["outcome"],
            registry=registry,
        )
        registry.register(self)

    @override
    def collect(self) -> Iterator[Metric]:
        """What others count, read when it is asked for."""
        stats, name = self.connection_stats(), "llamagen:http_connections"
        yield GaugeMetricFamily(name, "Open HTTP connections.", stats.connections)
        for kind, text, value in (
            ("shed", "Idle connections that were closed for new ones.", stats.shed),
            ("refused", "Connections that were refused: all others were busy.", stats.refused),
            ("dropped", "Connections whose clients read or sent too slowly.", stats.dropped),
        ):
            yield CounterMetricFamily(f"{name}_{kind}", text, value)
        yield GaugeMetricFamily(
            "llamagen:http_buffered_bytes",
            "Bytes of unread answers and unfinished requests.",
            stats.buffered_bytes,
        )
        if self.dropped_lines is not None:
            yield CounterMetricFamily(
                "llamagen:log_lines_dropped",
                "Lines of the log that could not be written.",
                self.dropped_lines(),
            )

    def ended(self, served: ServedRequest, tokens_of_image: int) -> None:
        """Counts a request that has come to its end, with any outcome."""
        ended, accepted_at, images = served.ended, served.accepted_at, served.request.n
        assert ended is not None
        seconds = {}
        if served.started_at is not None:
            seconds["request_queue_time_seconds"] = served.started_at - accepted_at
        if served.first_token_at is not None:
            seconds["time_to_first_token_seconds"] = served.first_token_at - accepted_at
        if ended.outcome == "finished":
            seconds["e2e_request_latency_seconds"] = ended.at - accepted_at
            if served.started_at is not None:
                drawing = ended.at - served.started_at
                seconds["inter_token_latency_seconds"] = drawing / tokens_of_image
            if served.request.pixels:
                seconds["pixel_decode_seconds"] = served.decode_seconds / images
            self._count_finished(ended, images, images * tokens_of_image)
        for name, value in seconds.items():
            self._histograms[name].observe(value)

    def _count_finished(self, ended: Ended, images: int, tokens: int) -> None:
        for name, count in (
            ("prompt_tokens", images),
            ("generation_tokens", tokens),
            ("images", images),
            # A pass keeps one token of an image, and one more for each guess that held.
            ("spec_decode_num_drafts", tokens - ended.accepted if ended.drafted else 0),
            ("spec_decode_num_draft_tokens", ended.drafted),
            ("spec_decode_num_accepted_tokens", ended.accepted),
        ):
            self._counters[name].inc(count)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' format."""
        return generate_latest(_Labelled(self.registry, {"model_name": self.model_name}))


class _Labelled(CollectorRegistry):
    """The metrics of another registry, with labels that all of them share."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        super().__init__()
        self._registry, self._labels = registry, labels

    @override
    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [
                sample._replace(labels=self._labels | sample.labels) for sample in metric.samples
            ]
            yield metric
