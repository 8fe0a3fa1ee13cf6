"""What passes between the dispatcher's process and a front's, beside what passes between it and an
engine's.

A front sends `Up`, then `Submit`, `Cancel`, `Count` and `AskMetrics`. It is answered by `Accepted`
or `Refused`, then by what the engine tells of the job, under the front's own numbers, and by
`MetricsText`. It is told of each change of `State`, and to `Finish`. Several times a second it is
sent a `Heartbeat`, and sends `Up` and each `Count`, if nothing else waits to be written. What
nothing else has to precede (`Refused`, `MetricsText`, `Finish` at once) overtakes what waits to be
written.
"""

from dataclasses import dataclass
from typing import ClassVar

from autoregressive.serve.worker import messages


@dataclass(frozen=True)
class Up:
    """The front answers, and has these connections: the fields of a `ConnectionStats`. Its event
    loop says so several times a second: it is the front's heartbeat."""

    connections: int
    shed: int
    refused: int
    dropped: int
    buffered_bytes: int


@dataclass(frozen=True)
class Accepted:
    """A job is let in."""

    job: int
    ahead: int  # jobs that wait before it


@dataclass(frozen=True)
class Refused:
    """A job is not let in: the fields of an `ApiError`."""

    job: int
    status: int
    message: str
    code: str
    param: str | None
    retry_after: int | None


@dataclass(frozen=True)
class State:
    """What a front answers from without asking."""

    unhealthy: str | None  # why the service is not alive
    refusal: str | None  # why nothing is accepted now
    refusal_retry_after: int
    retry_after: int  # what a request takes these days
    waiting: tuple[int, ...]  # watched jobs that wait
    ahead: tuple[int, ...]  # how many wait before each
    SUPERSEDES: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Count:
    """Requests have been answered."""

    outcome: str
    requests: int


@dataclass(frozen=True)
class AskMetrics:
    """For Prometheus."""

    question: int


@dataclass(frozen=True)
class MetricsText:
    """The answer."""

    question: int
    text: bytes


@dataclass(frozen=True)
class Finish:
    """Take no more connections, wait for answers to be read, and end."""

    at_once: bool  # without waiting


FrontMessage = Up | Accepted | Refused | State | Count | AskMetrics | MetricsText | Finish
KINDS: dict[str, type] = messages.KINDS | {kind.__name__: kind for kind in FrontMessage.__args__}
