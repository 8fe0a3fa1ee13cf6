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
_OLD = 16  # spans after which what was kept counts half
_COMPARED = 6  # pairs of spans, the last ones, of which the median counts
# A pass of twice the positions takes at least as long, and at most twice as long. If it seems
# otherwise, the batch has changed in between, or something held the device up.
_LEAST_LONGER, _MOST_LONGER = 0.9, 2.2
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
        self._last: tuple[int, int, float] | None = None  # rows, window, seconds of a pass
        # By rows and window: how many times longer a pass takes than one of half the window.
        self._longer: dict[tuple[int, int], deque[float]] = defaultdict(
            partial(deque, maxlen=_COMPARED)
        )
        self._kept: dict[int, float] = {1: 1.0}  # tokens of a pass, by window
        self._passes: dict[int, float] = defaultdict(float)  # that `_kept` is the average of
        self._observed: dict[int, int] = {}  # by window, the span after which `_kept` was observed
        self._span = 0
        self._met: set[int] = set()  # how many rows have run
        self._first: deque[int] = deque()  # the windows to measure first
        self._trial_began = 0  # a span
        self._best, self._pause = 1, _FIRST_PAUSE  # at the last choice; in spans
        self._tried: dict[tuple[int, int], int] = defaultdict(int)  # in which span, as `_longer`

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
        if rows not in self._met:
            self._met.add(rows)
            self._first = deque(window for window in windows for _ in range(_FIRST_SPANS))
        while self._first:
            self._trial_began = self._span
            window = self._first.popleft()
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
        before, self._last = self._last, (rows, window, seconds)
        if before is None or before[0] != rows:
            return
        (_, smaller, sooner), (_, larger, later) = sorted([before, self._last])
        if larger == 2 * smaller and _LEAST_LONGER <= later / sooner <= _MOST_LONGER:
            self._longer[rows, larger].append(later / sooner)

    def _rates(self, rows: int, windows: Sequence[int]) -> dict[int, float]:
        """By window: the tokens that it brings in the time of a pass of one position. Those of
        which not enough is known are left out.
        """
        rates, longer = {1: 1.0}, 1.0
        for window in windows[1:]:
            compared = self._longer[rows, window]
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
        age = self._span - self._observed.get(window, self._span)
        before = self._passes[window] * 0.5 ** (age / _OLD)
        mean = self._kept.get(window, 0.0)
        self._kept[window] = mean + (kept / passes - mean) * passes / (before + passes)
        self._passes[window] = min(before + passes, _MEMORY_PASSES)
        self._observed[window] = self._span
