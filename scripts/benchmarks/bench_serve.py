"""How the service holds up: requests arrive on their own, faster and faster, and each is timed from
when it was due.

    python scripts/benchmarks/bench_serve.py --url http://127.0.0.1:8000 \\
        --rates 1,2,4,8 --seconds 30
    python scripts/benchmarks/bench_serve.py --url http://127.0.0.1:8000 --saturate 64 --seconds 30

An open loop: arrivals are Poisson's, drawn from --seed, and do not wait for answers, so a service
that is too slow falls behind and shows it. Requests are streams of previews and images, of random
classes. --saturate instead keeps so many requests under way all the time: the most images a second,
as the slope of images over time, from when as many have come as are asked for at once until no more
are asked for. The service runs already; its key, if it has one, is taken from LLAMAGEN_API_KEY.
Ends in JSON.
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

    from autoregressive.benchmarks.arguments import (
        add_output,
        give_figures,
        output_file,
        positive,
        script_parser,
        whole_number,
    )
    from autoregressive.benchmarks.serve_report import (
        PERCENTILES,
        chart,
        markdown,
        percentiles,
        steady_rate,
    )
    from autoregressive.benchmarks.service import add_url, authorization, service_at
    from autoregressive.files import write_whole

_PREVIEW, _COMPLETED = (
    b"event: image_generation.partial_image",
    b"event: image_generation.completed",
)
_TIMEOUT_SECONDS = 600.0
_AFTER_REFUSAL_SECONDS = 0.1  # before a saturating client asks again


@dataclass(frozen=True)
class Load:
    """What is asked for, again and again."""

    url: str
    n: int
    previews: int  # of each image
    classes: int
    seconds: float
    seed: int
    output_format: str

    def client(self) -> httpx2.AsyncClient:
        """A client without a limit of connections."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx2.AsyncClient(
            base_url=self.url, headers=authorization(), timeout=_TIMEOUT_SECONDS, limits=limits
        )

    def bodies(self) -> Iterator[dict[str, Any]]:
        """Endless bodies of requests, the same ones for one seed."""
        generator = random.Random(self.seed)  # noqa: S311 -- arrivals, no secrets
        while True:
            label, seed = generator.randrange(self.classes), generator.randrange(2**31)
            yield {
                "class_label": label,
                "seed": seed,
                "n": self.n,
                "stream": True,
                "partial_images": self.previews,
                "output_format": self.output_format,
            }


@dataclass
class Measured:
    """What was measured at one rate."""

    rate: float | None  # requests a second that were due; None: as many as there were answers
    requests: int = 0
    images: int = 0
    # from the first that was due to the last answer, or the first that counts to the last
    seconds: float = 0.0
    pace: float = 0.0  # images a second
    # seconds from when each request was due
    first_preview: list[float] = field(default_factory=list)
    image: list[float] = field(default_factory=list)  # the same, of every image
    # at which images came, by the clock that all processes share
    moments: list[float] = field(default_factory=list)
    until: float = 0.0  # moment of that clock from which nothing more was asked for
    failures: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "rate": self.rate,
            "requests": self.requests,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.pace, 3),
            "first_preview_seconds": percentiles(self.first_preview),
            "image_seconds": percentiles(self.image),
            "failures": dict(self.failures),
        }


async def request(
    client: httpx2.AsyncClient, body: dict[str, Any], due: float, measured: Measured
) -> None:
    """Sends one request, which is timed from `due` on, and adds what came of it to `measured`."""
    measured.requests += 1
    try:
        async with client.stream("POST", "/v1/images/generations", json=body) as answer:
            if answer.status_code != 200:
                measured.failures[str(answer.status_code)] += 1
                return
            seen_preview, images, tail = False, 0, b""
            async for chunk in answer.aiter_raw():
                text = tail + chunk
                if not seen_preview and _PREVIEW in text:
                    seen_preview = True
                    measured.first_preview.append(time.monotonic() - due)
                completed = text.count(_COMPLETED)
                now = time.monotonic()
                measured.image += [now - due] * completed
                measured.moments += [now] * completed
                images += completed
                tail = (
                    text[-len(_PREVIEW) + 1 :]
                    if completed == 0
                    else text[text.rindex(_COMPLETED) + len(_COMPLETED) :]
                )
                tail = tail[-len(_PREVIEW) + 1 :]
            measured.images += images
            if images < body["n"]:
                measured.failures["incomplete"] += 1
    except httpx2.TransportError as error:
        measured.failures[type(error).__name__] += 1


async def at_rate(load: Load, rate: float) -> Measured:
    """Sends requests at random times for a while, then waits for the last answer."""
    measured, bodies = Measured(rate), load.bodies()
    generator = random.Random(load.seed)  # noqa: S311 -- arrivals, no secrets
    async with load.client() as client:
        begun = due = time.monotonic()
        tasks = []
        while (due := due + generator.expovariate(rate)) < begun + load.seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(request(client, next(bodies), due, measured)))
        await asyncio.gather(*tasks)
        measured.until, measured.seconds = begun + load.seconds, time.monotonic() - begun
    measured.pace = measured.images / max(measured.seconds, load.seconds)
    return measured


async def saturated(load: Load, concurrency: int) -> Measured:
    """So many requests under way all the time; the images that come first, as many as are asked for
    at once, do not count.
    """
    measured, bodies = Measured(None), load.bodies()
    async with load.client() as client:
        measured.until = time.monotonic() + load.seconds

        async def keep_asking() -> None:
            while time.monotonic() < measured.until:
                refused = measured.failures.total()
                await request(client, next(bodies), time.monotonic(), measured)
                if measured.failures.total() > refused:
                    await asyncio.sleep(_AFTER_REFUSAL_SECONDS)

        await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    begun, first = measured.until - load.seconds, concurrency * load.n
    measured.images, measured.seconds, measured.pace = steady_rate(
        measured.moments, first, begun, measured.until
    )
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags, measures, prints a table and JSON.

    Raises:
        UserError: no service is there, or it does not take the key.
    """
    arguments = parse_arguments(argv)
    model, classes = describe(arguments.url)
    load = Load(
        arguments.url,
        arguments.n,
        arguments.previews,
        classes,
        arguments.seconds,
        arguments.seed,
        arguments.output_format,
    )
    results: list[Measured] = []
    if arguments.saturate is not None:
        results.append(asyncio.run(saturated(load, arguments.saturate)))
    for rate in arguments.rates if arguments.saturate is None else []:
        results.append(asyncio.run(at_rate(load, rate)))
        tell(f"{rate:g} requests/s: {results[-1].summary()['images_per_second']} images/s")
    if arguments.saturate is not None and not results[0].images and not arguments.moments:
        why = "the first requests took more than a third of that, or too few came after them"
        if results[0].failures:
            why = f"failures: {dict(results[0].failures)}"
        raise UserError(f"--seconds {arguments.seconds:g}: {why}; give more seconds")
    summaries = [result.summary() for result in results]
    print(
        f"{model}, n = {load.n}, {load.seconds:g} s a rate; seconds from when a request was due, "
        f"{PERCENTILES}\n"
    )
    print(markdown(summaries))
    if arguments.plot is not None:
        picture = chart(summaries, f"{model}: seconds to an image")
        write_whole(arguments.plot, lambda path: picture.save(path, format="PNG"))
    options = {
        name: getattr(load, name) for name in ("n", "previews", "output_format", "seconds", "seed")
    }
    options["saturate"] = arguments.saturate
    if arguments.moments:
        for summary, result in zip(summaries, results, strict=True):
            summary |= {
                "moments": [round(moment, 4) for moment in result.moments],
                "until": round(result.until, 4),
            }
    give_figures(
        {"benchmark": "serve", "model": model, "options": options, "results": summaries},
        arguments.output,
    )


def describe(url: str) -> tuple[str, int]:
    """The served model's name and how many classes it has.

    Raises:
        UserError: see `main`.
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


def rates(typed: str) -> list[float]:
    """A type of flag: comma-separated numbers of requests a second."""
    try:
        values = [float(word) for word in typed.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value <= 10_000 for value in values):
        raise argparse.ArgumentTypeError(
            f"{typed}: must be numbers above 0, at most 10000, with commas between them"
        )
    return values


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; files that cannot be written are refused before any measuring."""
    parser = script_parser(__doc__)
    add_url(parser)
    parser.add_argument(
        "--rates",
        type=rates,
        default=[1, 2, 4],
        metavar="NUMBERS",
        help="requests a second (default: 1,2,4)",
    )
    parser.add_argument(
        "--saturate",
        type=whole_number(1),
        metavar="N",
        help="so many requests at a time instead of --rates",
    )
    parser.add_argument(
        "--seconds", type=positive, default=30.0, metavar="S", help="for each rate (default: 30)"
    )
    parser.add_argument(
        "--n",
        type=whole_number(1, 10),
        default=1,
        metavar="N",
        help="images a request, at most 10 (default: 1)",
    )
    parser.add_argument(
        "--previews",
        type=whole_number(0, 3),
        default=1,
        metavar="N",
        help="of each image, 0 to 3 (default: 1)",
    )
    parser.add_argument(
        "--output-format",
        choices=("png", "jpeg", "webp"),
        default="png",
        help="of images (default: png)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="of arrivals, classes and images (default: 0)",
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
