"""The HTTP connections of this process: how many there may be, what they hold, and which are closed
when that is too much."""

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

_LOOK_SECONDS = 0.2  # between two looks at the connections
_GRACE_SECONDS = 1.0  # for a new connection to begin its request, before it counts as idle
_ARRIVAL_SECONDS = 0.05  # for the rest of a request that comes in two packets
_LOG_SECONDS = 1.0  # between two lines of the log
_CROWDED_SECONDS = 10.0  # so long after nearly all were busy, each answer is its connection's last
_SHARE = 4  # a client's images may take so many times the bytes that stay free
_FREE_SHARE = 0.1  # of the connections: drawings do not take these, so that probes get in
_log = logging.getLogger("llamagen.connections")


class Phase(Enum):
    """What a connection is doing."""

    NEW = auto()  # the event loop has not looked yet whether a request has come with it
    IDLE = auto()  # no byte of a request has come
    HEAD = auto()  # a part of its headers has
    BODY = auto()  # a part of its body has
    # The answer waits for the client to read it, or is written while the client still sends. It is
    # not a drawing's, so that the client can ask for it again.
    UNREAD = auto()
    # The request is complete, and its answer is made or sent: never closed for another's sake.
    ANSWER = auto()


_INCOMPLETE = (Phase.IDLE, Phase.HEAD, Phase.BODY)  # the first to be closed first


class Connection(Protocol):
    """A connection as this module needs it."""

    @property
    def sends(self) -> bool:
        """Whether the client is in the middle of a body, as far as is known."""

    def look(self, seconds: float) -> None:
        """Looks whether the client takes its answer; called again and again.

        Args:
            seconds: since the last time.
        """

    @property
    def held_bytes(self) -> int:
        """Bytes of its requests and answers that this process holds."""

    @property
    def promised(self) -> tuple[str, int]:
        """Its client, and the bytes of images that are still to come for it from the engine."""

    @property
    def seconds_left(self) -> float | None:
        """Until it is dropped if its client goes on like this; None: nothing waits for the
        client."""

    def drop(self) -> None:
        """Closes it; its answer is cut off, if there is one."""

    def close_idle(self) -> None:
        """Closes it at once, even if this process still holds a part of an answer."""


@dataclass(frozen=True)
class ConnectionStats:
    """Counts for the metrics."""

    connections: int = 0
    shed: int = 0  # closed to make room for new ones
    refused: int = 0  # new ones, because all others were busy
    dropped: int = 0  # because their clients read or sent too slowly
    buffered_bytes: int = (
        0  # answers that wait for their readers, and requests that are not complete
    )

    def __add__(self, other: "ConnectionStats") -> "ConnectionStats":
        return ConnectionStats(
            *(
                ours + theirs
                for ours, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
            )
        )


class Connections:
    """Used in one event loop.

    When `most` are open and a new one comes, the one that has been idle for longest is closed; if
    none is idle, one whose client does not read its answer, unless it is a drawing's. When
    they hold more than half of `most_bytes`, no drawings are accepted; when they hold more than all
    of it, the slowest clients are dropped. A drawing is not accepted either if what they hold, the
    images that are still to come, and its own would be more than `most_bytes`: an engine can draw
    faster than this process writes files. A client that waits for images already may ask for more
    only as long as it has at most four times as much as stays free, so that none keeps others out.

    Args:
        most: that may be open.
        most_bytes: that they may hold.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.buffered_bytes = 0  # when they were last looked at, and what has come since then
        # Bytes of images that are to come for each client: then, and of those accepted since then.
        self._promised: Counter[str] = Counter()
        self._phases: dict[Connection, Phase] = {}
        # Since when each has been waiting for a request, for the rest of one, or for its reader;
        # the longest first, or nearly so.
        self._by_phase: dict[Phase, dict[Connection, float]] = {phase: {} for phase in Phase}
        # of connections by what became of them, now and when they were last logged
        self._counts: Counter[str] = Counter()
        self._logged: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0
        self._logged_at = 0.0
        self._crowded_until = 0.0

    @property
    def stats(self) -> ConnectionStats:
        """The counts of this moment."""
        shed, refused, dropped = (self._counts[kind] for kind in ("shed", "refused", "dropped"))
        return ConnectionStats(len(self._phases), shed, refused, dropped, self.buffered_bytes)

    @property
    def overload(self) -> str | None:
        """Why no drawing is accepted now."""
        if self.buffered_bytes > self.most_bytes // 2:
            return "too much waits for clients that read or send slowly: try again later"
        if self._nearly_all_busy:
            return "too many connections are busy: try again later"
        return None

    def has_room_for(self, count: int, client: str) -> bool:
        """Whether a client may ask for images of so many bytes."""
        free = self.most_bytes - self.buffered_bytes - self._promised.total() - count
        own = self._promised[client]
        return free >= 0 and (own == 0 or own + count <= _SHARE * free)

    def promise(self, count: int, client: str) -> None:
        """Notes that a client has asked for images of so many bytes."""
        self._promised[client] += count

    @property
    def crowded(self) -> bool:
        """Whether nearly all have been busy a moment ago. Each answer should then be the last of
        its connection: a client that pipelines requests would keep its place for all of them."""
        now = time.monotonic()
        if self._nearly_all_busy:
            self._crowded_until = now + _CROWDED_SECONDS
        return now < self._crowded_until

    @property
    def _nearly_all_busy(self) -> bool:
        return len(self._by_phase[Phase.ANSWER]) >= self.most - max(1, int(self.most * _FREE_SHARE))

    @property
    def has_room(self) -> bool:
        """Whether another connection may be opened now."""
        return len(self._phases) < self.most or self._first_to_close() is not None

    def make_room(self) -> bool:
        """Whether another connection may be opened; closes one for it if it must."""
        if len(self._phases) < self.most or self.shed():
            return True
        self._counts["refused"] += 1
        return False

    def shed(self) -> bool:
        """Closes a connection; returns whether there was one that may be closed."""
        connection = self._first_to_close()
        if connection is None:
            return False
        self.remove(connection)
        self._counts["shed"] += 1
        connection.close_idle()
        return True

    def _first_to_close(self) -> Connection | None:
        """The one that has been idle for longest; if none has been for a while, the one that has
        been sending its headers for longest, then its body, then the one that has left its answer
        unread for longest.

        If there is none of these, it is the oldest, unless that one has only just come: its request
        may be here and not read yet, or the rest of it may be on its way.
        """
        now = time.monotonic()
        oldest = [self._oldest(phase) for phase in _INCOMPLETE if self._by_phase[phase]]
        for connection, since in oldest:
            if since <= now - _GRACE_SECONDS:
                return connection
        if self._by_phase[Phase.UNREAD]:
            return self._oldest(Phase.UNREAD)[0]
        oldest = [one for one in oldest if one[1] <= now - _ARRIVAL_SECONDS]
        return min(oldest, key=lambda one: one[1])[0] if oldest else None

    def _oldest(self, phase: Phase) -> tuple[Connection, float]:
        return next(iter(self._by_phase[phase].items()))

    def starve(self) -> None:
        """Closes a connection, because the system has no descriptor or no memory for another."""
        self._counts["out_of_descriptors"] += 1
        self.shed()

    def move(self, connection: Connection, phase: Phase) -> None:
        """Notes what a connection is doing; it may be new."""
        before = self._phases.get(connection)
        if before is phase:
            return
        since = time.monotonic()
        if before is not None:
            waited_since = self._by_phase[before].pop(connection)
            if before in _INCOMPLETE and phase in _INCOMPLETE:
                since = waited_since
        self._phases[connection] = phase
        self._by_phase[phase][connection] = since
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._looked_at = loop.time()
            self._timer = loop.call_later(_LOOK_SECONDS, self._look)

    def remove(self, connection: Connection) -> None:
        """Forgets a connection that is closed, or about to be; without effect if it is not
        known.
        """
        phase = self._phases.pop(connection, None)
        if phase is not None:
            del self._by_phase[phase][connection]

    def add_bytes(self, count: int) -> None:
        """Counts bytes that have come. They count until the next look."""
        self.buffered_bytes += count

    def count_dropped(self) -> None:
        """Counts a client that was too slow."""
        self._counts["dropped"] += 1

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        # While this process stood still no client could be served, so that time does not count.
        seconds, self._looked_at = min(now - self._looked_at, 2 * _LOOK_SECONDS), now
        busy = [
            connection
            for phase in (Phase.HEAD, Phase.BODY, Phase.UNREAD, Phase.ANSWER)
            for connection in self._by_phase[phase]
        ]
        for connection in busy:
            connection.look(seconds)
        held = {
            connection: connection.held_bytes for connection in busy if connection in self._phases
        }
        self.buffered_bytes = sum(held.values())
        self._promised.clear()
        for connection in held:
            client, count = connection.promised
            if count:
                self._promised[client] += count
        if self.buffered_bytes > self.most_bytes:
            self._drop_slowest(held)
        self._log(now)
        self._timer = loop.call_later(_LOOK_SECONDS, self._look) if self._phases else None

    def _drop_slowest(self, held: dict[Connection, int]) -> None:
        """Drops the slowest until the rest fits, but none that holds no more than its share."""
        share = self.most_bytes // self.most
        slow = [
            (left, connection)
            for connection in held
            if (left := connection.seconds_left) is not None
        ]
        for _, connection in sorted(slow, key=lambda one: one[0]):
            if self.buffered_bytes <= self.most_bytes:
                return
            if held[connection] > share:
                self.buffered_bytes -= held[connection]
                self.remove(connection)
                self.count_dropped()
                connection.drop()

    def _log(self, now: float) -> None:
        """At most a line a second, however many connections come and go."""
        new = self._counts - self._logged
        if not new or (self._phases and now - self._logged_at < _LOG_SECONDS):
            return
        self._logged, self._logged_at = self._counts.copy(), now
        fields = {kind: new[kind] for kind in ("shed", "refused", "dropped", "out_of_descriptors")}
        known = {
            "connections": len(self._phases),
            "most": self.most,
            "buffered_bytes": self.buffered_bytes,
        }
        _log.warning("connections were closed", extra={"fields": fields | known})
