"""How benchmarks show their figures: a table on stdout, a table in Markdown, bars, and JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from autoregressive.files import write_whole

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM, _BAR, _GAP = 900, 110, 80, 60, 60, 18, 16
_GRID, _GREY = (225, 225, 225), (90, 90, 90)
Colour = tuple[int, int, int]


class Table:
    """Lines below a heading, printed as they come.

    Args:
        columns: title -> how a value is written: side, width and format, as ">9.3f".
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._formats = tuple(columns.values())
        self.row(*columns)

    def row(self, *values: object) -> None:
        """Prints one line. None is a dash; words take the column's width alone."""
        print(" ".join(map(_cell, values, self._formats)), flush=True)


def _cell(value: object, form: str) -> str:
    value = "-" if value is None else value
    return format(value, form.partition(".")[0] if isinstance(value, str) else form)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bar_chart(
    title: str, groups: Mapping[str, Mapping[str, float]], kinds: Mapping[str, tuple[str, Colour]]
) -> Image.Image:
    """Horizontal bars of seconds on a logarithmic scale, values beside them.

    Args:
        groups: label of a group -> kind of a bar -> seconds.
        kinds: kind of a bar -> its words in the legend, and its colour.
    """
    height = _TOP + sum(len(bars) * _BAR + _GAP for bars in groups.values()) + _BOTTOM
    image = Image.new("RGB", (_WIDTH, height), "white")
    draw, font, small = ImageDraw.Draw(image), *map(ImageFont.load_default, (15, 12))
    draw.text((_LEFT, 12), f"{title} (seconds, logarithmic)", fill="black", font=font)
    values = [seconds for bars in groups.values() for seconds in bars.values()] or [1.0]
    low, high = math.floor(math.log10(min(values) / 1.5)), math.ceil(math.log10(max(values) * 1.2))

    def x(seconds: float) -> float:
        return _LEFT + (math.log10(seconds) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    for power in range(low, high + 1):
        at = x(10.0**power)
        draw.line([(at, _TOP - 8), (at, height - 52)], fill=_GRID)
        draw.text((at, _TOP - 10), f"{10.0**power:g}", fill=_GREY, font=small, anchor="ms")
    y = _TOP
    for label, bars in groups.items():
        middle = y + max(len(bars), 1) * _BAR / 2
        draw.text((_LEFT - 10, middle), label, fill="black", font=font, anchor="rm")
        for kind, seconds in bars.items():
            end = x(seconds)
            draw.rectangle([(_LEFT, y + 2), (end, y + _BAR - 2)], fill=kinds[kind][1])
            beside = (end + 5, y + _BAR / 2)
            draw.text(beside, f"{seconds:.3g}", fill="black", font=small, anchor="lm")
            y += _BAR
        y += _GAP
    for number, (words, colour) in enumerate(kinds.values()):
        left, top = _LEFT + 140 * number, height - 28
        draw.rectangle([(left, top), (left + 12, top + 12)], fill=colour)
        draw.text((left + 18, top + 6), words, fill="black", font=small, anchor="lm")
    return image


def give_figures(figures: Mapping[str, object], path: Path | None = None) -> None:
    """Prints the figures as one line of JSON, the last of a benchmark's output, and writes them
    where --output says.
    """
    print(json.dumps(figures))
    if path is not None:
        write_whole(path, lambda part: part.write_text(json.dumps(figures, indent=1) + "\n"))
