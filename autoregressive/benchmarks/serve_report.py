"""What bench_serve.py makes of its figures: percentiles, the pace of images, a table and
a chart.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import linear_regression
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PERCENTILES = "p50 / p90 / p99"
# of images, that a run at full load has to last at least for `steady_rate`: the start takes up to
# four, and has a third
WAVES = 15
_RANKS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_COLOURS = {"p50": (60, 130, 90), "p90": (90, 140, 200), "p99": (220, 110, 40)}
_LABEL_HEIGHT = 15
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 420, 70, 60, 50, 60


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """The percentiles by nearest rank, in seconds; None if there are no values."""
    ordered = sorted(seconds)
    if not ordered:
        return None
    return {
        name: round(ordered[math.ceil(rank * len(ordered)) - 1], 4) for name, rank in _RANKS.items()
    }


def steady_rate(
    moments: Iterable[float], first: int, begun: float, until: float
) -> tuple[int, float, float]:
    """The pace of images while a service is kept busy: neither its start nor its end, where there
    is less to do, counts.

    Images may come in waves, so how many lie between two moments depends on where waves are cut:
    the pace is the slope of the straight line (least squares) through the images counted over time.
    It is right to a tenth with three waves, to a hundredth with eight, whatever their shape.

    Args:
        moments: seconds, at which images came
        first: so many are of the start, one or more.
        begun, until: moments from which on the service was kept busy, and left alone.

    Returns:
        How many images count, seconds from the first of them to the last, images a second; (0, 0,
        0) if the start took more than a
        third of the time, or what counts came within less than a third: there are too few waves
            then, or none.
    """
    ordered = sorted(moment for moment in moments if begun <= moment <= until)
    counted, third = ordered[first:], (until - begun) / 3
    if not counted or ordered[first - 1] - begun > third or counted[-1] - counted[0] < third:
        return 0, 0.0, 0.0
    return (
        len(counted),
        counted[-1] - counted[0],
        linear_regression(counted, range(len(counted))).slope,
    )


def markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown with one line for each rate."""
    lines = [
        f"| requests/s | requests | images/s | first preview, {PERCENTILES} | image, {PERCENTILES} "
        "| failures |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for summary in summaries:
        rate = "saturated" if summary["rate"] is None else f"{summary['rate']:g}"
        failures = (
            ", ".join(f"{count} x {name}" for name, count in summary["failures"].items()) or "none"
        )
        times = [_cell(summary[name]) for name in ("first_preview_seconds", "image_seconds")]
        cells = [
            rate,
            str(summary["requests"]),
            f"{summary['images_per_second']:.2f}",
            *times,
            failures,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(times: dict[str, float] | None) -> str:
    return "-" if times is None else " / ".join(f"{value:.3f}" for value in times.values())


def chart(summaries: Sequence[dict[str, Any]], title: str) -> Image.Image:
    """Seconds to an image over requests a second, a line a percentile; both axes begin at 0."""
    points = [
        (summary["rate"] or 0.0, summary["image_seconds"])
        for summary in summaries
        if summary["image_seconds"]
    ]
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    draw.text((_LEFT, 14), title, fill="black", font=ImageFont.load_default(size=17))
    rates = _ticks(max((rate for rate, _ in points), default=0.0))
    seconds = _ticks(max((value for _, times in points for value in times.values()), default=0.0))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(rate: float, value: float) -> tuple[float, float]:
        return _LEFT + (right - _LEFT) * rate / rates[-1], bottom - (
            bottom - _TOP
        ) * value / seconds[-1]

    for value in seconds:
        y = place(0, value)[1]
        draw.line([(_LEFT, y), (right, y)], fill=(225, 225, 225))
        draw.text((_LEFT - 8, y), f"{value:g} s", fill="black", font=font, anchor="rm")
    for rate in rates:
        draw.text(
            (place(rate, 0)[0], bottom + 8), f"{rate:g}", fill="black", font=font, anchor="ma"
        )
    draw.text(
        ((_LEFT + right) / 2, _HEIGHT - 14), "requests/s", fill="black", font=font, anchor="ms"
    )
    label_y = math.inf
    for name, colour in _COLOURS.items():  # from the lowest line to the highest
        line = [place(rate, times[name]) for rate, times in points]
        if len(line) > 1:
            draw.line(line, fill=colour, width=3)
        for x, y in line:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        if line:
            label_y = min(line[-1][1], label_y - _LABEL_HEIGHT)
            draw.text((line[-1][0] + 8, label_y), name, fill=colour, font=font, anchor="lm")
    return picture


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to at least `most`, six at most."""
    scale = 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0
    step = (
        next(step for step in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if step * scale * 5 >= most) * scale
    )
    return [round(step * part, 9) for part in range(max(1, math.ceil(round(most / step, 9))) + 1)]
