"""Metrics for Prometheus, under vLLM's names with our prefix, in a registry of their own."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from autoregressive.serve.web.connections import ConnectionStats
from autoregressive.serve.worker.messages import ServedRequest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 40, 80, 160)
_STEP_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)


class _Collected(Collector):
    """Metrics that others keep, read when they are asked for."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    @override
    def collect(self) -> Iterable[Metric]:
        return self._collect()


class Metrics:
    """Counters and histograms, and gauges that are read when they are asked for.

    Args:
        running, waiting, page_use: what the gauges show.

    Attributes:
        connection_stats: tells of the connections of all processes that answer HTTP.
    """

    def __init__(
        self,
        running: Callable[[], float],
        waiting: Callable[[], float],
        page_use: Callable[[], float],
    ) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"llamagen:{name}", text, registry=self.registry).set_function(value)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"llamagen:{name}", text, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"llamagen:{name}", text, labels, registry=self.registry)

        gauge(
            "num_requests_running", "Requests of which at least one image is being drawn.", running
        )
        gauge("num_requests_waiting", "Accepted requests that have not begun.", waiting)
        gauge(
            "kv_cache_usage_perc",
            "Share of the KV cache's pages that are in use, 0 to 1.",
            page_use,
        )
        self._first_token = histogram(
            "time_to_first_token_seconds",
            "From acceptance to when the device was given the first span.",
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Mean time between tokens of an image.", _STEP_SECONDS
        )
        self._end_to_end = histogram(
            "e2e_request_latency_seconds", "From acceptance to the last image."
        )
        self._queue = histogram("request_queue_time_seconds", "From acceptance to the start.")
        self._decode = histogram(
            "pixel_decode_seconds", "From codes to pixels on the host, per image."
        )
        self._prompt_tokens = counter(
            "prompt_tokens", "Class tokens of finished requests, one an image."
        )
        self._tokens = counter("generation_tokens", "Image tokens of finished requests.")
        self._images = counter("images", "Images of finished requests.")
        self.requests = counter("requests", "Requests for images or codes by outcome.", "outcome")
        self.connection_stats: Callable[[], ConnectionStats] = ConnectionStats
        self.registry.register(_Collected(lambda: _of_connections(self.connection_stats())))

    def show_dropped_lines(self, count: Callable[[], int]) -> None:
        """Adds the lines of the log that could not be written."""
        name, text = "llamagen:log_lines_dropped", "Lines of the log that could not be written."
        self.registry.register(_Collected(lambda: [CounterMetricFamily(name, text, count())]))

    def ended(self, served: ServedRequest, tokens_of_image: int) -> None:
        """Counts a request that has come to its end, with any outcome."""
        assert served.ended is not None
        if served.started_at is not None:
            self._queue.observe(served.started_at - served.accepted_at)
        if served.first_token_at is not None:
            self._first_token.observe(served.first_token_at - served.accepted_at)
        if served.ended.outcome != "finished":
            return
        self._end_to_end.observe(served.ended.at - served.accepted_at)
        if served.started_at is not None:
            self._inter_token.observe((served.ended.at - served.started_at) / tokens_of_image)
        if served.request.pixels:
            self._decode.observe(served.decode_seconds / served.request.n)
        self._prompt_tokens.inc(served.request.n)
        self._tokens.inc(served.request.n * tokens_of_image)
        self._images.inc(served.request.n)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' format."""
        return generate_latest(self.registry)


def _of_connections(stats: ConnectionStats) -> Iterator[Metric]:
    name = "llamagen:http_connections"
    yield GaugeMetricFamily(name, "Open HTTP connections.", stats.connections)
    for kind, text, value in (
        ("shed", "Idle connections that were closed for new ones.", stats.shed),
        ("refused", "Connections that were refused: all others were busy.", stats.refused),
        ("dropped", "Connections whose clients read or sent too slowly.", stats.dropped),
    ):
        yield CounterMetricFamily(f"{name}_{kind}", text, value)
    text = "Bytes of unread answers and unfinished requests."
    yield GaugeMetricFamily("llamagen:http_buffered_bytes", text, stats.buffered_bytes)
