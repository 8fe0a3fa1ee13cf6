"""How many positions of an image a pass computes."""

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from statistics import median

from autoregressive.serve.engine.engine_config import LookaheadSetting
from kernels.operations import MANY_ROWS

_WINDOWS = (1, 2, 4, 8)
_FIRST_SPANS = 2  # of each window, one after the other, when so many rows run for the first time
# Spans from a trial to the next: so many where the best window has just changed, twice as many each
# time that it has not, and at most so many that trials cost a share of the time.
_FIRST_PAUSE, _LAST_PAUSES, _COST_OF_TRIALS = 4, (8, 64), 0.005
_HALF_LIFE_SPANS = 16  # after which what a window has kept counts half
_COMPARED = 6  # pairs of spans, the last ones, of which the median counts
# A pass of twice the positions takes at least as long. What seems otherwise, or much longer, is a
# batch that has changed in between, or a delay.
_LEAST_RATIO, _MOST_RATIO = 1.0, 4.0
# Passes, of images, that the average of kept tokens reaches back.
_MEMORY_PASSES = 64


class Lookahead:
    """Chooses the window of each span. Only the engine's thread uses `window` and `observe_*`.

    With the setting "auto" it takes the window that brings the most tokens a second. It measures
    both what a pass keeps and what it costs, because neither can be known before: the first depends
    on the model and the sampling, the second on the device too. All windows are measured when so
    many rows run for the first time. Now and then a span tries the next smaller or larger window.
    Where nothing is kept it stays with one token a pass but for these trials.

    Args:
        setting: "off": a token a pass; a number: always that window; "auto".
        most_positions: of all rows together, in passes of "auto" with a window. A pass of more
            than the default may use a library's products, whose sums have no fixed order: the
            tokens would depend on the window.
    """

    def __init__(self, setting: LookaheadSetting, most_positions: int = MANY_ROWS) -> None:
        self._setting = 1 if setting == "off" else setting
        self._most_positions = most_positions
        # The rows, the window and the seconds of a pass of the span that was measured last.
        self._previous: tuple[int, int, float] | None = None
        # [rows, window]: how many times as long a pass takes as one of half the window.
        self._cost_ratios: dict[tuple[int, int], deque[float]] = defaultdict(
            partial(deque, maxlen=_COMPARED)
        )
        # [window]: the tokens that a pass keeps on average, over how many passes of an image, and
        # the span before which that was observed.
        self._kept: dict[int, float] = {1: 1.0}
        self._weights: dict[int, float] = defaultdict(float)
        self._last_observed: dict[int, int] = {}
        self._span = 0  # the number of the span that was planned last
        self._seen_rows: set[int] = set()
        self._first_trials: deque[int] = deque()  # windows to measure because the rows are new
        self._trial_began = 0  # the span of the last trial
        self._best, self._pause = 1, _FIRST_PAUSE  # the pause is in spans
        # [rows, window]: the span of the window's last trial.
        self._tried: dict[tuple[int, int], int] = defaultdict(int)

    def windows(self, rows: int) -> list[int]:
        """The windows that passes of so many rows may be carried out with, in ascending order."""
        if not isinstance(self._setting, str):
            return [self._setting]
        most = self._most_positions
        return [window for window in _WINDOWS if window == 1 or rows * window <= most]

    def window(self, rows: int) -> int:
        """The window for the next span, of so many rows."""
        windows = self.windows(rows)
        if len(windows) == 1:
            return windows[0]
        self._span += 1
        if rows not in self._seen_rows:
            self._seen_rows.add(rows)
            self._first_trials = deque(window for window in windows for _ in range(_FIRST_SPANS))
        while self._first_trials:
            self._trial_began = self._span
            window = self._first_trials.popleft()
            if window in windows:
                return window
        rates = self._rates(rows, windows)
        best = max(rates, key=lambda window: rates[window])
        if best != self._best:
            self._best, self._pause = best, _FIRST_PAUSE
        at = windows.index(best)
        neighbours = windows[max(0, at - 1) : at] + windows[at + 1 : at + 2]
        # the largest first: what is gained may be most there
        trial = min(neighbours, key=lambda each: (each in rates, self._tried[rows, each], -each))
        if self._span < self._trial_began + self._pause_before(trial, best, rates):
            return best
        self._trial_began = self._tried[rows, trial] = self._span
        self._pause = min(2 * self._pause, _LAST_PAUSES[1])
        return trial

    def _pause_before(self, trial: int, best: int, rates: dict[int, float]) -> int:
        """Spans from the trial before to one of a window, while another is the best."""
        if trial not in rates:
            return _FIRST_PAUSE
        lost = 1 - rates[trial] / rates[best]
        shortest, longest = _LAST_PAUSES
        return min(self._pause, max(shortest, round(lost / _COST_OF_TRIALS)), longest)

    def pace(self, window: int) -> float | None:
        """The tokens that a pass has kept on average; None: it is not known."""
        return self._kept.get(window)

    def observe_seconds(self, rows: int, window: int, seconds: float) -> None:
        """Takes note of what a pass of a span has cost. Called for one span after the other.

        Spans side by side are compared, because passes take longer as the images grow.
        """
        before, self._previous = self._previous, (rows, window, seconds)
        if before is None or before[0] != rows:
            return
        pair = sorted([before, self._previous])
        (_, smaller, smaller_seconds), (_, larger, larger_seconds) = pair
        if larger == 2 * smaller:
            ratio = min(max(larger_seconds / smaller_seconds, _LEAST_RATIO), _MOST_RATIO)
            self._cost_ratios[rows, larger].append(ratio)

    def _rates(self, rows: int, windows: Sequence[int]) -> dict[int, float]:
        """By window: the tokens that it brings in the time of a pass of one position. Those of
        which not enough is known are left out.
        """
        rates, longer = {1: 1.0}, 1.0
        for window in windows[1:]:
            compared = self._cost_ratios[rows, window]
            if not compared:
                break
            longer *= median(compared)
            if window in self._kept:
                rates[window] = self._kept[window] / longer
        return rates

    def observe_kept(self, window: int, passes: int, kept: int) -> None:
        """Takes note of what spans have brought.

        Args:
            passes: over all images.
            kept: tokens that they kept.
        """
        if passes == 0:
            return
        age = self._span - self._last_observed.get(window, self._span)
        before = self._weights[window] * 0.5 ** (age / _HALF_LIFE_SPANS)
        mean = self._kept.get(window, 0.0)
        self._kept[window] = mean + (kept / passes - mean) * passes / (before + passes)
        self._weights[window] = min(before + passes, _MEMORY_PASSES)
        self._last_observed[window] = self._span
