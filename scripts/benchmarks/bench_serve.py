"""How the service holds up: requests arrive on their own, faster and faster, and each is timed from
when it was due.

    python scripts/benchmarks/bench_serve.py --url http://127.0.0.1:8000 \\
        --rates 1,2,4,8 --seconds 30
    python scripts/benchmarks/bench_serve.py --url http://127.0.0.1:8000 --saturate 64 --seconds 30
    python scripts/benchmarks/bench_serve.py --url http://127.0.0.1:8000 --probe --seconds 30

An open loop: arrivals are Poisson's, drawn from --seed, and do not wait for answers, so a service
that is too slow falls behind and shows it. Requests are streams of previews and images, of random
classes. --saturate instead keeps so many requests under way all the time: the most images a second,
as the slope of images over time, from when as many have come as are asked for at once until no more
are asked for. --probe instead asks for /health and /metrics in turn, each on a connection of its
own, as a supervisor does: how soon they are answered while another process keeps the service busy.
The service runs already; its key, if it has one, is taken from LLAMAGEN_API_KEY. Ends in JSON.
"""

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError, tell

with slow_imports(__name__):
    import httpx2

    from autoregressive.benchmarks.script import (
        add_output,
        add_values,
        bar_chart,
        give_figures,
        listed,
        markdown,
        output_file,
        positive,
        script_parser,
        whole_number,
    )
    from autoregressive.benchmarks.service import (
        PERCENTILES,
        authorization,
        percentiles,
        service_at,
        steady_rate,
    )
    from autoregressive.files import write_whole

_PREVIEW, _COMPLETED = (
    b"event: image_generation.partial_image",
    b"event: image_generation.completed",
)
_TIMEOUT_SECONDS = 600.0
_AFTER_REFUSAL_SECONDS = 0.1  # before a saturating client asks again
_PROBED = ("/health", "/metrics")
_PROBE_SECONDS, _PROBE_TIMEOUT = 0.05, 10.0  # from one question to the next; for an answer
_COLUMNS = (
    "requests/s",
    "requests",
    "images/s",
    f"first preview, {PERCENTILES}",
    f"image, {PERCENTILES}",
    "failures",
)
_BARS = {
    "p50": ("p50", (60, 130, 90)),
    "p90": ("p90", (90, 140, 200)),
    "p99": ("p99", (220, 110, 40)),
}


@dataclass
class LoadGenerator:
    """What is asked for, again and again, and what has come of it."""

    options: argparse.Namespace
    classes: int
    requests: int = 0
    # seconds from when each request was due
    first_preview: list[float] = field(default_factory=list)
    image: list[float] = field(default_factory=list)  # the same, of every image
    # at which images came, by the clock that all processes share
    moments: list[float] = field(default_factory=list)
    until: float = 0.0  # moment of that clock from which nothing more was asked for
    failures: Counter[str] = field(default_factory=Counter)

    def client(self) -> httpx2.AsyncClient:
        """A client without a limit of connections."""
        return httpx2.AsyncClient(
            base_url=self.options.url,
            headers=authorization(),
            timeout=_TIMEOUT_SECONDS,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def bodies(self) -> Iterator[dict[str, Any]]:
        """Endless bodies of requests, the same ones for one seed."""
        generator = random.Random(self.options.seed)  # noqa: S311 -- arrivals, no secrets
        while True:
            yield {
                "class_label": generator.randrange(self.classes),
                "seed": generator.randrange(2**31),
                "n": self.options.n,
                "stream": True,
                "partial_images": self.options.previews,
                "output_format": self.options.output_format,
            }

    async def request(self, client: httpx2.AsyncClient, body: dict[str, Any], due: float) -> None:
        """Sends one request, which is timed from `due` on."""
        self.requests += 1
        try:
            async with client.stream("POST", "/v1/images/generations", json=body) as answer:
                if answer.status_code != 200:
                    self.failures[str(answer.status_code)] += 1
                    return
                seen_preview, images, tail = False, 0, b""
                async for chunk in answer.aiter_raw():
                    text, now = tail + chunk, time.monotonic()
                    if not seen_preview and _PREVIEW in text:
                        seen_preview = True
                        self.first_preview.append(now - due)
                    completed = text.count(_COMPLETED)
                    self.image += [now - due] * completed
                    self.moments += [now] * completed
                    images += completed
                    # the start of what the next chunk ends
                    tail = text.rpartition(_COMPLETED)[2][-len(_PREVIEW) + 1 :]
                if images < body["n"]:
                    self.failures["incomplete"] += 1
        except httpx2.TransportError as error:
            self.failures[type(error).__name__] += 1

    def summary(
        self, rate: float | None, images: int, seconds: float, pace: float
    ) -> dict[str, Any]:
        """The figures, ready for JSON.

        Args:
            rate: requests a second that were due; None: as many as there were answers.
            images: that count.
            seconds: from the first that was due to the last answer, or of the images that count.
            pace: images a second.
        """
        figures: dict[str, Any] = {
            "rate": rate,
            "requests": self.requests,
            "images": images,
            "seconds": round(seconds, 3),
            "images_per_second": round(pace, 3),
            "first_preview_seconds": percentiles(self.first_preview),
            "image_seconds": percentiles(self.image),
            "failures": dict(self.failures),
        }
        if self.options.moments:
            figures["moments"] = [round(moment, 4) for moment in self.moments]
            figures["until"] = round(self.until, 4)
        return figures


async def at_rate(load: LoadGenerator, rate: float) -> dict[str, Any]:
    """Sends requests at random times for a while, then waits for the last answer."""
    bodies, seconds = load.bodies(), load.options.seconds
    generator = random.Random(load.options.seed)  # noqa: S311 -- arrivals, no secrets
    async with load.client() as client:
        begun = due = time.monotonic()
        load.until = begun + seconds
        tasks = []
        while (due := due + generator.expovariate(rate)) < load.until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(load.request(client, next(bodies), due)))
        await asyncio.gather(*tasks)
        lasted = time.monotonic() - begun
    images = len(load.moments)
    return load.summary(rate, images, lasted, images / max(lasted, seconds))


async def saturated(load: LoadGenerator, concurrency: int) -> dict[str, Any]:
    """So many requests under way all the time; the images that come first, as many as are asked for
    at once, do not count.

    Raises:
        UserError: no images count.
    """
    bodies, seconds = load.bodies(), load.options.seconds
    async with load.client() as client:
        load.until = time.monotonic() + seconds

        async def keep_asking() -> None:
            while time.monotonic() < load.until:
                refused = load.failures.total()
                await load.request(client, next(bodies), time.monotonic())
                if load.failures.total() > refused:
                    await asyncio.sleep(_AFTER_REFUSAL_SECONDS)

        await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    counted = steady_rate(
        load.moments, concurrency * load.options.n, load.until - seconds, load.until
    )
    if not counted[0] and not load.options.moments:
        why = "the first requests took more than a third of that, or too few came after them"
        if load.failures:
            why = f"failures: {dict(load.failures)}"
        raise UserError(f"--seconds {seconds:g}: {why}; give more seconds")
    return load.summary(None, *counted)


def probe(url: str, seconds: float) -> dict[str, dict[str, Any]]:
    """How many times each path was answered, and how soon.

    Raises:
        UserError: nobody answers at `url`, or an answer is not 200.
    """
    took: dict[str, list[float]] = {path: [] for path in _PROBED}
    headers = {"Connection": "close"} | authorization()
    with (
        service_at(url),
        httpx2.Client(base_url=url, headers=headers, timeout=_PROBE_TIMEOUT) as client,
    ):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for path in _PROBED:
                asked = time.monotonic()
                status = client.get(path).status_code
                took[path].append(time.monotonic() - asked)
                if status != 200:
                    raise UserError(f"--url {url}: {path} answers {status}, not 200")
                time.sleep(max(0.0, asked + _PROBE_SECONDS - time.monotonic()))
    return {
        path: {"answers": len(times), "seconds": percentiles(times)} for path, times in took.items()
    }


def describe(url: str) -> tuple[str, int]:
    """The served model's name and how many classes it has.

    Raises:
        UserError: no service is there, it does not take the key, or it is another one.
    """
    with service_at(url):
        answer = httpx2.get(f"{url}/v1/models", headers=authorization(), timeout=10)
    if answer.status_code == 401:
        raise UserError(f"--url {url}: the service wants a key: set LLAMAGEN_API_KEY")
    try:
        model = answer.json()["data"][0]
        return str(model["id"]), int(model["num_classes"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"--url {url}: what answers there is not this service") from error


def show(summaries: Sequence[dict[str, Any]]) -> None:
    """Prints a table in Markdown with one line for each rate."""

    def cell(times: dict[str, float] | None) -> str:
        return " / ".join(f"{value:.3f}" for value in times.values()) if times else "-"

    rows = [
        (
            "saturated" if summary["rate"] is None else f"{summary['rate']:g}",
            str(summary["requests"]),
            f"{summary['images_per_second']:.2f}",
            cell(summary["first_preview_seconds"]),
            cell(summary["image_seconds"]),
            ", ".join(f"{count} x {name}" for name, count in summary["failures"].items()) or "none",
        )
        for summary in summaries
    ]
    print(markdown(_COLUMNS, rows))


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, measures, prints a table and JSON."""
    options = parse_arguments(argv)
    if options.probe:
        probed = probe(options.url, options.seconds)
        for path, answers in probed.items():
            times = " / ".join(f"{value:.4f}" for value in (answers["seconds"] or {}).values())
            print(f"{path}: {answers['answers']} answers, {PERCENTILES} {times} s")
        give_figures({"benchmark": "probes", "results": probed}, options.output)
        return
    model, classes = describe(options.url)
    if options.saturate is not None:
        summaries = [asyncio.run(saturated(LoadGenerator(options, classes), options.saturate))]
    else:
        summaries = []
        for rate in options.rates:
            summaries.append(asyncio.run(at_rate(LoadGenerator(options, classes), rate)))
            tell(f"{rate:g} requests/s: {summaries[-1]['images_per_second']} images/s")
    print(
        f"{model}, n = {options.n}, {options.seconds:g} s a rate; seconds from when a request was "
        f"due, {PERCENTILES}\n"
    )
    show(summaries)
    if options.plot is not None:
        groups = {
            f"{summary['rate'] or 0:g} a second": summary["image_seconds"] or {}
            for summary in summaries
        }
        picture = bar_chart(f"{model}: time to an image by requests", groups, _BARS)
        write_whole(options.plot, lambda path: picture.save(path, format="PNG"))
    told = ("n", "previews", "output_format", "seconds", "seed", "saturate")
    figures = {
        "benchmark": "serve",
        "model": model,
        "options": {name: getattr(options, name) for name in told},
        "results": summaries,
    }
    give_figures(figures, options.output)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; files that cannot be written are refused before any measuring."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--url",
        type=lambda typed: typed.rstrip("/"),
        metavar="URL",
        default="http://127.0.0.1:8000",
        help="where the service is (default: %(default)s)",
    )
    at_once = "so many requests at a time instead of --rates"
    add_values(
        parser,
        ("--rates", listed(positive), "1,2,4", "NUMBERS", "requests a second"),
        ("--saturate", whole_number(1), None, "N", at_once),
        ("--seconds", positive, 30.0, "S", "of each rate, of --saturate or of --probe"),
        ("--n", whole_number(1, 10), 1, "N", "images a request, at most 10"),
        ("--previews", whole_number(0, 3), 1, "N", "of each image, 0 to 3"),
        ("--seed", whole_number(0), 0, "N", "of arrivals, classes and images"),
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="ask for /health and /metrics instead of images",
    )
    parser.add_argument(
        "--output-format",
        choices=("png", "jpeg", "webp"),
        default="png",
        help="of images (default: png)",
    )
    parser.add_argument(
        "--moments",
        action="store_true",
        help="also when images came and asking ended, for others to count",
    )
    parser.add_argument(
        "--plot",
        type=output_file("--plot", ".png"),
        metavar="FILE.png",
        help="seconds to an image over the rate",
    )
    add_output(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
