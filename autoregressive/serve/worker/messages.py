"""What passes between the service and the process that owns an engine: commands one way, events the other.

A message is a frozen dataclass. A frame on the wire is one message or several: their names and fields as JSON, and behind them
their bytes as they are (pixels, codes). No pickle: neither side runs what the other sends. Moments are of `time.monotonic`, which
all processes of a host share.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from autoregressive.serve.engine.request import SamplingParams

_LENGTH = struct.Struct("<I")  # of the JSON part


@dataclass(frozen=True)
class Submit:
    """Draw `n` images of a class."""

    job: int
    class_label: int
    n: int
    params: SamplingParams  # of each image, so with n = 1
    pixels: bool  # False: codes
    preview_rows: tuple[int, ...] = ()  # rows of the token grid at which a preview is wanted; the last that is reached is sent
    watched: bool = False  # `Drawn` again and again, not only once
    start_by: float | None = None  # moment; whoever has not begun by then ends with `queue_timeout`
    run_seconds: float | None = None  # whoever has not ended that long after the start ends with `run_timeout`


@dataclass(frozen=True)
class Cancel:
    """End a job early."""

    job: int


@dataclass(frozen=True)
class Stop:
    """Leave the loop at once."""


@dataclass(frozen=True)
class Preparing:
    """How much of the start is done."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """The engine takes jobs; what it is like."""

    max_rows: int
    num_pages: int
    pages_per_row: int  # of a whole image


@dataclass(frozen=True)
class Unable:
    """The start failed for a reason that the user can mend: one line."""

    message: str


@dataclass(frozen=True)
class Beat:
    """The loop goes round; with what it holds."""

    used_pages: int


@dataclass(frozen=True)
class Started:
    """A job's first image has been admitted."""

    job: int
    at: float


@dataclass(frozen=True)
class Drawn:
    """How many tokens of a job, over all its images, have been given to the device."""

    job: int
    tokens: int
    at: float


@dataclass(frozen=True)
class Preview:
    """A picture of which the top rows are drawn; pixels uint8 [size, size, 3]."""

    job: int
    image: int
    rows: int
    pixels: bytes


@dataclass(frozen=True)
class Image:
    """A finished image: pixels uint8 [size, size, 3], or codes int32 [tokens]."""

    job: int
    image: int
    at: float
    decode_seconds: float
    data: bytes


@dataclass(frozen=True)
class Ended:
    """A job has ended, and holds nothing any more: `finished`, `cancelled`, or why it failed."""

    job: int
    outcome: str  # one of OUTCOMES
    at: float
    message: str = ""
    tokens: int | None = None  # that were given to the device, over all its images
    used_pages: int | None = None  # of the engine, now that this job's are free


OUTCOMES = ("finished", "cancelled", "queue_timeout", "run_timeout", "out_of_memory", "non_finite", "refused")

Command = Submit | Cancel | Stop
Event = Preparing | Ready | Unable | Beat | Started | Drawn | Preview | Image | Ended
KINDS: dict[str, type] = {kind.__name__: kind for kind in (*Command.__args__, *Event.__args__)}


def _plain(value: object) -> dict[str, Any]:
    """What JSON does not know."""
    if isinstance(value, SamplingParams):
        return vars(value)
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


_as_json = json.JSONEncoder(default=_plain).encode


def bytes_of(message: Any) -> int:
    """How many bytes a message carries beside its other fields."""
    return sum(len(value) for value in vars(message).values() if isinstance(value, bytes))


def encode(messages: Iterable[Any]) -> bytes:
    """Messages, dataclasses with at most one field of bytes each, as one frame."""
    heads: list[tuple[str, dict[str, Any], int]] = []
    parts: list[bytes] = []
    for message in messages:
        fields, size = dict(vars(message)), 0
        for name, value in fields.items():
            if isinstance(value, bytes):
                parts.append(value)
                size, fields[name] = len(value), None
        heads.append((type(message).__name__, fields, size))
    head = _as_json(heads).encode()
    return b"".join((_LENGTH.pack(len(head)), head, *parts))


def decode(frame: bytes, kinds: Mapping[str, type] = KINDS) -> list[Any]:
    """What `encode` made a frame of; `kinds`: those that they may be of, by name."""
    (length,) = _LENGTH.unpack_from(frame)
    place = _LENGTH.size + length
    messages = []
    for name, fields, size in json.loads(frame[_LENGTH.size : place]):
        kind = kinds[name]
        for field, annotation in kind.__annotations__.items():
            if annotation is bytes:
                fields[field] = frame[place : place + size]
            elif annotation is SamplingParams:
                fields[field] = SamplingParams(**fields[field])
            elif isinstance(fields.get(field), list):
                fields[field] = tuple(fields[field])
        place += size
        messages.append(kind(**fields))
    return messages


def receive(connection: Connection, kinds: Mapping[str, type] = KINDS) -> list[Any]:
    """The messages of the next frame, of these kinds; waits for it.

    Raises:
        EOFError: the other side has gone.
    """
    try:
        return decode(connection.recv_bytes(), kinds)
    except OSError as error:  # closed here, or reset by the other side
        raise EOFError from error
