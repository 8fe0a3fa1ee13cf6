"""What Prometheus is told, under vLLM's names with our prefix. A registry of its own, not the
library's global one.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from autoregressive.serve.web.connections import ConnectionStats
from autoregressive.serve.web.jobs import Job

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 40, 80, 160)
_STEP_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)


class _Count(Collector):
    """A counter that others keep."""

    def __init__(self, name: str, text: str, value: Callable[[], int]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Reads the values at the moment that they are asked for."""
        yield CounterMetricFamily(self._name, self._text, value=self._value())


class _ConnectionCollector(Collector):
    """What the processes that answer HTTP tell of their connections.

    Args:
        stats: their sum.
    """

    def __init__(self, stats: Callable[[], ConnectionStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The values of this moment."""
        stats = self._stats()
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
        self.registry.register(_ConnectionCollector(lambda: self.connection_stats()))

    def show_dropped_lines(self, count: Callable[[], int]) -> None:
        """Adds the lines of the log that could not be written."""
        self.registry.register(
            _Count(
                "llamagen:log_lines_dropped", "Lines of the log that could not be written.", count
            )
        )

    def ended(self, job: Job, tokens_of_image: int) -> None:
        """A job has come to its end, whatever that is."""
        assert job.ended is not None
        if job.started_at is not None:
            self._queue.observe(job.started_at - job.accepted_at)
        if job.first_token_at is not None:
            self._first_token.observe(job.first_token_at - job.accepted_at)
        if job.ended.outcome != "finished":
            return
        self._end_to_end.observe(job.ended.at - job.accepted_at)
        if job.started_at is not None:
            self._inter_token.observe((job.ended.at - job.started_at) / tokens_of_image)
        if job.order.pixels:
            self._decode.observe(job.decode_seconds / job.order.n)
        self._prompt_tokens.inc(job.order.n)
        self._tokens.inc(job.order.n * tokens_of_image)
        self._images.inc(job.order.n)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' format."""
        return generate_latest(self.registry)
