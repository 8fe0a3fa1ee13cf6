"""The HTTP connections of this process: how many there may be, what they hold, and which are closed
when that is too much."""

import asyncio
import logging
import resource
import time
from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol

from autoregressive.errors import SettingError, UserError
from autoregressive.serve.web.clients import fits_share

_LOOK_SECONDS = 0.2  # between two looks at the connections
_GRACE_SECONDS = 1.0  # for a new connection to begin its request, before it counts as idle
_ARRIVAL_SECONDS = 0.05  # for the rest of a request that comes in two packets
_LOG_SECONDS = 1.0  # between two lines of the log
_CROWDED_SECONDS = 10.0  # so long after nearly all were busy, each answer is its connection's last
_FREE_SHARE = 0.1  # of the connections: drawings do not take these, so that probes get in
MOST_DESCRIPTORS = 65535  # more are not needed, and some systems allow a thousand million
_DEFAULT_CONNECTIONS = 4096
REFUSED_SOCKETS = 32  # so many refused connections stay open until their clients have the answer
# Beside connections: the standard streams, the event loop's own, listeners, stored files that are
# being written or read (eight at a time), libraries' files, and connections that have been closed
# in this turn of the event loop, or accepted in it, and refused ones.
_RESERVE = 64 + REFUSED_SOCKETS
_RESERVE_FOR_A_CHILD = 4  # a connection to it, its sentinel, and what starting it takes
_log = logging.getLogger("llamagen.connections")


def _descriptor_limits() -> tuple[int, int, int]:
    """The soft limit of open files, the hard one, and the one that this service sets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    known = [MOST_DESCRIPTORS if one == resource.RLIM_INFINITY else one for one in (soft, hard)]
    return soft, hard, max(known[0], min(known[1], MOST_DESCRIPTORS))


def raise_descriptor_limit() -> None:
    """Raises the soft limit of this process and of its children to the hard one, or to
    `MOST_DESCRIPTORS`; the log says so."""
    soft, hard, limit = _descriptor_limits()
    if soft == resource.RLIM_INFINITY or limit <= soft:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError) as error:  # macOS allows fewer than its hard limit says
        fields = {"limit": soft, "reason": str(error)}
        _log.warning("the limit of open files stays", extra={"fields": fields})
    else:
        fields = {"before": soft, "limit": limit}
        _log.info("the limit of open files is raised", extra={"fields": fields})


def connection_limit(asked: int | None, children: int) -> int:
    """How many connections a process that answers HTTP holds at most.

    Args:
        asked: the number that was asked for; None: the default, or as many as fit.
        children: processes that it may start.

    Raises:
        UserError: so many do not fit, or fewer than eight do.
    """
    *_, limit = _descriptor_limits()
    fit = limit - _RESERVE - _RESERVE_FOR_A_CHILD * children
    if fit < 8:
        raise UserError(
            f"the limit of open files is {limit}, which is too low: raise it (ulimit -n 1024)"
        )
    if asked is not None and asked > fit:
        raise SettingError(
            "max_connections",
            asked,
            f"at most {fit} connections fit below the limit of {limit} open files",
            ["ask for fewer or raise it (ulimit -n)"],
        )
    return min(fit, _DEFAULT_CONNECTIONS) if asked is None else asked


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
_BUSY = (Phase.HEAD, Phase.BODY, Phase.UNREAD, Phase.ANSWER)


class Load(NamedTuple):
    """What a connection costs this process."""

    held_bytes: int  # of its requests and answers
    # Until it is dropped if its client goes on like this; None: nothing waits for the client.
    seconds_left: float | None
    client: str = ""
    promised_bytes: int = 0  # of images that are still to come for the client from the engine


class Connection(Protocol):
    """A connection as this module needs it."""

    @property
    def answers_last(self) -> bool:
        """Whether the answer that begins now has to be the connection's last."""

    def look(self, seconds: float) -> Load:
        """Looks whether the client takes its answer; called again and again.

        Args:
            seconds: since the last time.
        """

    def drop(self) -> None:
        """Closes it at once; its answer is cut off, if there is one."""


@dataclass(frozen=True)
class ConnectionStats:
    """Counts for the metrics."""

    connections: int = 0
    shed: int = 0  # closed to make room for new ones
    refused: int = 0  # new ones, because all others were busy
    dropped: int = 0  # because their clients read or sent too slowly
    # answers that wait for their readers, and requests that are not complete
    buffered_bytes: int = 0


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

    Attributes:
        buffered_bytes: when they were last looked at, and what has come since then.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.buffered_bytes = 0
        # Bytes of images that are to come for each client: at the last look, and of those accepted
        # since then.
        self._promised: Counter[str] = Counter()
        self._phases: dict[Connection, Phase] = {}
        # Since when each has been waiting for a request, for the rest of one, or for its reader;
        # the longest first, or nearly so.
        self._by_phase: dict[Phase, dict[Connection, float]] = {phase: {} for phase in Phase}
        # of connections by what became of them, now and when they were last logged
        self._counts = Counter(shed=0, refused=0, dropped=0, out_of_descriptors=0)
        self._logged = self._counts.copy()
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = self._logged_at = self._crowded_until = 0.0

    @property
    def stats(self) -> ConnectionStats:
        """The counts of this moment."""
        return ConnectionStats(
            connections=len(self._phases),
            shed=self._counts["shed"],
            refused=self._counts["refused"],
            dropped=self._counts["dropped"],
            buffered_bytes=self.buffered_bytes,
        )

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
        return fits_share(self._promised[client], count, free)

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
        if connection is not None:
            self.drop(connection, "shed")
        return connection is not None

    def starve(self) -> None:
        """Closes a connection, because the system has no descriptor or no memory for another."""
        self._counts["out_of_descriptors"] += 1
        self.shed()

    def drop(self, connection: Connection, why: str = "dropped") -> None:
        """Closes a connection, and counts why: by default because its client is too slow."""
        self.remove(connection)
        self._counts[why] += 1
        connection.drop()

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
        if (phase := self._phases.pop(connection, None)) is not None:
            del self._by_phase[phase][connection]

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        # While this process stood still no client could be served, so that time does not count.
        seconds, self._looked_at = min(now - self._looked_at, 2 * _LOOK_SECONDS), now
        busy = [connection for phase in _BUSY for connection in self._by_phase[phase]]
        loads = {connection: connection.look(seconds) for connection in busy}
        loads = {one: load for one, load in loads.items() if one in self._phases}
        self.buffered_bytes = sum(load.held_bytes for load in loads.values())
        self._promised.clear()
        for load in loads.values():
            self._promised[load.client] += load.promised_bytes
        if self.buffered_bytes > self.most_bytes:
            self._drop_slowest(loads)
        self._log(now)
        self._timer = loop.call_later(_LOOK_SECONDS, self._look) if self._phases else None

    def _drop_slowest(self, loads: dict[Connection, Load]) -> None:
        """Drops the slowest until the rest fits, but none that holds no more than its share."""
        share = self.most_bytes // self.most
        slow = [
            (load.seconds_left, load.held_bytes, connection)
            for connection, load in loads.items()
            if load.seconds_left is not None and load.held_bytes > share
        ]
        for _, held_bytes, connection in sorted(slow, key=lambda one: one[0]):
            if self.buffered_bytes <= self.most_bytes:
                return
            self.buffered_bytes -= held_bytes
            self.drop(connection)

    def _log(self, now: float) -> None:
        """At most a line a second, however many connections come and go."""
        new = self._counts - self._logged
        if not new or (self._phases and now - self._logged_at < _LOG_SECONDS):
            return
        fields = {
            **{kind: new[kind] for kind in self._counts},
            "connections": len(self._phases),
            "most": self.most,
            "buffered_bytes": self.buffered_bytes,
        }
        self._logged, self._logged_at = self._counts.copy(), now
        _log.warning("connections were closed", extra={"fields": fields})
