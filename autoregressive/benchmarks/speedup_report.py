"""The timings of speedup_table.py, kept in a file, its table and its bar chart."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from autoregressive.benchmarks.models import empty_transformer
from autoregressive.errors import UserError
from autoregressive.files import write_whole

METHODS = ("naive", "compile", "paged")
_COLUMNS = (
    "Method",
    "params",
    "baseline(s)",
    "compile(s)",
    "paged(s)",
    "speed-up",
    "over compile",
    "floor(s)",
    "share",
)
_LONGEST_REASON = 100
_COLOURS = {
    "naive": (150, 150, 150),
    "compile": (90, 140, 200),
    "paged": (220, 110, 40),
    "floor": (70, 70, 70),
}
_LABELS = {"naive": "plain loop", "compile": "compiled", "paged": "engine", "floor": "memory floor"}
_WIDTH, _LEFT, _RIGHT, _TOP, _BAR, _GAP = 900, 110, 80, 60, 18, 16


@dataclass(frozen=True)
class ModelRow:
    """What is known of one model."""

    model: str
    parameters: int
    seconds: dict[str, float]  # by method, where it finished
    errors: dict[str, str]  # by method, where it failed
    floor_seconds: float | None


@dataclass(frozen=True)
class SpeedupJob:
    """What every method is timed on; results of another job are not mixed with these."""

    image_size: int | None  # None: the models' default
    images: int | None  # None: all labels
    device: str
    device_name: str
    torch: str
    # of the product's sources: what was measured before a change is not what is measured after it
    code: str
    repeats: int
    naive_repeats: int  # of the plain loop

    def medians_of(self) -> str:
        """A sentence that says what the times of the table are medians of."""
        plain = (
            f" (the plain loop: of {self.naive_repeats})"
            if self.naive_repeats != self.repeats
            else ""
        )
        return f"Each time is the median of {self.repeats} after one warm-up{plain}."


@dataclass(frozen=True)
class Timing:
    """One finished method of one model."""

    seconds: float  # median
    repeats: list[float]
    warm_up_seconds: float  # of the warm-up, which for `compile` includes compiling
    trained: bool
    start_seconds: float | None = None  # of the engine: compiling kernels and capturing
    floor_seconds: float | None = None
    read_bytes_per_second: float | None = None
    operations_per_second: float | None = None


class Results:
    """The finished timings of one job, kept in a file after each."""

    def __init__(self, path: Path, job: SpeedupJob) -> None:
        self._path, self._job = path, asdict(job)
        # model -> method -> {"timing": a Timing} or {"error": why}
        self.timings: dict[str, dict[str, dict[str, Any]]] = {}
        if path.exists():
            try:
                kept = json.loads(path.read_text())
                kept_job, self.timings = kept["job"], dict(kept["results"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} is no file of this script's: remove it, or choose another --output-dir"
                ) from error
            if kept_job != self._job:
                raise UserError(
                    f"{path} holds the results of another job ({kept_job}): choose another "
                    "--output-dir"
                )

    def timing(self, model: str, method: str) -> dict[str, Any]:
        """The timing of a finished method; it is empty if the method failed or was not run."""
        timing: dict[str, Any] = self.timings.get(model, {}).get(method, {}).get("timing", {})
        return timing

    def missing(self, model: str, methods: Sequence[str]) -> list[str]:
        """Methods that have not finished; failed ones are tried again."""
        return [method for method in methods if not self.timing(model, method)]

    def keep(self, model: str, method: str, outcome: dict[str, Any]) -> None:
        """Adds a timing or an error, and writes the file."""
        self.timings.setdefault(model, {})[method] = outcome
        self.save()

    def save(self) -> None:
        """Writes the file."""
        text = json.dumps(self.report(), indent=1) + "\n"
        write_whole(self._path, lambda part: part.write_text(text))

    def report(self) -> dict[str, Any]:
        """All results, ready for JSON."""
        return {
            "benchmark": "speedup",
            "job": self._job,
            "highest_read_bytes_per_second": self._highest_bandwidth(),
            "floor_seconds": {model: self._floor_seconds(model) for model in self.timings},
            "results": self.timings,
        }

    def _highest_bandwidth(self) -> float | None:
        """Of all models' processes, bytes a second: the same GPU, which measures less when it is
        hot. None: not measured.
        """
        rates = (self.timing(model, "paged").get("read_bytes_per_second") for model in self.timings)
        return max(filter(None, rates), default=None)

    def _floor_seconds(self, model: str) -> float | None:
        """At the highest bandwidth; eight pictures' rows are too few for arithmetic to bound a
        product.
        """
        timing, highest = self.timing(model, "paged"), self._highest_bandwidth()
        if highest is None or timing.get("floor_seconds") is None:
            return None
        seconds: float = timing["floor_seconds"] * timing["read_bytes_per_second"] / highest
        return seconds

    def row(self, model: str, methods: Sequence[str]) -> ModelRow:
        """A model's line of the table."""
        kept = self.timings.get(model, {})
        done = {method: kept[method] for method in methods if method in kept}
        return ModelRow(
            model,
            parameters_of(model, self._job["image_size"]),
            {name: done[name]["timing"]["seconds"] for name in done if "timing" in done[name]},
            {name: done[name]["error"] for name in done if "error" in done[name]},
            self._floor_seconds(model) if "paged" in done else None,
        )


def parameters_of(model: str, image_size: int | None) -> int:
    """The number of the model's parameters."""
    return sum(parameter.numel() for parameter in empty_transformer(model, image_size).parameters())


def markdown(rows: list[ModelRow]) -> str:
    """One line a model; a method that failed says why in its cell, one that was not run
    is a dash.
    """
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    lines += [_line(_cells(row)) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: ModelRow) -> list[str]:
    times = [_time_cell(row, method) for method in METHODS]
    paged = row.seconds.get("paged")
    gains = [_ratio(row.seconds.get(method), paged) for method in ("naive", "compile")]
    floor = "-" if row.floor_seconds is None else f"{row.floor_seconds:.3f}"
    share = (
        "-" if row.floor_seconds is None or paged is None else f"{row.floor_seconds / paged:.0%}"
    )
    return [row.model, _in_words(row.parameters), *times, *gains, floor, share]


def _time_cell(row: ModelRow, method: str) -> str:
    if method in row.seconds:
        seconds = row.seconds[method]
        return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3f}"
    if method in row.errors:
        reason = " ".join(row.errors[method].split()).replace("|", "/")
        return f"failed: {reason[:_LONGEST_REASON]}"
    return "-"


def _ratio(slow: float | None, fast: float | None) -> str:
    return "-" if slow is None or fast is None else f"{slow / fast:.1f}x"


def _in_words(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 999_500_000 else f"{parameters / 1e6:.0f}M"


def chart(rows: list[ModelRow], device_name: str) -> Image.Image:
    """Seconds of every method, a bar each, on a logarithmic scale, values beside them."""
    bars = [(row, _bars_of(row)) for row in rows]
    height = _TOP + sum(len(found) * _BAR + _GAP for _, found in bars) + 60
    image = Image.new("RGB", (_WIDTH, height), "white")
    draw, font, small = (
        ImageDraw.Draw(image),
        ImageFont.load_default(size=15),
        ImageFont.load_default(size=12),
    )
    draw.text(
        (_LEFT, 12),
        f"Seconds for the tokens of one job, {device_name} (logarithmic)",
        fill="black",
        font=font,
    )
    values = [seconds for _, found in bars for _, seconds in found] or [1.0]
    low, high = math.floor(math.log10(min(values) / 1.5)), math.ceil(math.log10(max(values) * 1.2))

    def x(seconds: float) -> float:
        return _LEFT + (math.log10(seconds) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    for power in range(low, high + 1):
        at = x(10.0**power)
        draw.line([(at, _TOP - 8), (at, height - 52)], fill=(225, 225, 225))
        draw.text((at, _TOP - 10), f"{10.0**power:g}", fill=(90, 90, 90), font=small, anchor="ms")
    y = _TOP
    for row, found in bars:
        draw.text(
            (_LEFT - 10, y + max(len(found), 1) * _BAR / 2),
            row.model,
            fill="black",
            font=font,
            anchor="rm",
        )
        for kind, seconds in found:
            draw.rectangle([(_LEFT, y + 2), (x(seconds), y + _BAR - 2)], fill=_COLOURS[kind])
            draw.text(
                (x(seconds) + 5, y + _BAR / 2),
                f"{seconds:.3g}",
                fill="black",
                font=small,
                anchor="lm",
            )
            y += _BAR
        y += _GAP
    _draw_legend(draw, small, height - 28)
    return image


def _bars_of(row: ModelRow) -> list[tuple[str, float]]:
    found = [(method, row.seconds[method]) for method in METHODS if method in row.seconds]
    return found if row.floor_seconds is None else [*found, ("floor", row.floor_seconds)]


def _draw_legend(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, y: int
) -> None:
    x = _LEFT
    for kind, label in _LABELS.items():
        draw.rectangle([(x, y), (x + 12, y + 12)], fill=_COLOURS[kind])
        draw.text((x + 18, y + 6), label, fill="black", font=font, anchor="lm")
        x += 140
