"""Who may wait: places in the queue, of which no client can take so many that none is left for
another.
"""

from collections import Counter

_SHARE = 4  # a client's places may be so many times those that stay free


class WaitingPlaces:
    """Counts the requests that wait for others, by client.

    With shares, a client that waits already gets one more place only if it then has at most four
    times as many as stay free; a client that does not wait gets any place that is free. These are
    the dynamic thresholds by which switches share memory among their queues (Choudhury and Hahne,
    1998). One client alone can fill four fifths of the queue, two can fill four ninths each, N can
    fill 4 / (4 N + 1) each. As nobody who waits is sent away, a client that came early may have
    more for a while; until enough of its requests have started, it gets no further place.

    Args:
        size: how many may wait.
        shared: without shares, whoever comes first gets the place.
    """

    def __init__(self, size: int, *, shared: bool) -> None:
        self.size = size
        self._shared = shared
        self._taken: Counter[str] = Counter()
        self._total = 0

    @property
    def taken(self) -> int:
        """Requests that wait."""
        return self._total

    def taken_by(self, client: str) -> int:
        """Requests of a client that wait."""
        return self._taken[client]

    @property
    def full(self) -> bool:
        """Whether no place is free."""
        return self._total >= self.size

    def admits(self, client: str) -> bool:
        """Whether one more request of a client may wait."""
        own = self._taken[client]
        if self.full or not self._shared or own == 0:
            return not self.full
        return own + 1 <= _SHARE * (self.size - self._total - 1)

    def take(self, client: str) -> None:
        """A request waits."""
        self._taken[client] += 1
        self._total += 1

    def give_back(self, client: str) -> None:
        """A request does not wait any more."""
        self._taken[client] -= 1
        self._total -= 1
        if not self._taken[client]:
            del self._taken[client]
