"""What passes between the service and the process that owns an engine: commands one way, events the
other.

A message is a frozen dataclass. They go over a pair of sockets in frames of one message or several,
so that the more there is to say, the less each costs: two lengths, names and fields as JSON, and
behind them the messages' bytes as they are (pixels, codes). No pickle: neither side runs what the
other sends. Moments are of `time.monotonic`, which all processes of a host share.

A kind of message may have `SUPERSEDES`: names of fields. A newer message of the kind with the same
values in these fields then supersedes an older one that still waits to be sent (see `backlog`).
"""

import json
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from autoregressive.serve.engine.request import SamplingParams

_HEAD = struct.Struct("<II")  # bytes of the JSON part, and of what is behind it
HEAD_BYTES = _HEAD.size


@dataclass(frozen=True)
class Submit:
    """Draw `n` images of a class."""

    job: int
    class_label: int
    n: int
    params: SamplingParams  # of each image, so with n = 1
    pixels: bool  # False: codes
    preview_rows: tuple[
        int, ...
    ] = ()  # rows of the token grid at which a preview is wanted; the last that is reached is sent
    watched: bool = False  # `Drawn` again and again, not only once
    start_by: float | None = None  # moment; whoever has not begun by then ends with `queue_timeout`
    run_seconds: float | None = (
        None  # whoever has not ended that long after the start ends with `run_timeout`
    )
    client: str = ""  # whose it is, as `client_of` names it


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
class Heartbeat:
    """The process lives. A thread of its own sends it, so it says nothing of the loop, which may
    hang.
    """


@dataclass(frozen=True)
class LoopStats:
    """The engine's loop has gone round; sent some times a second while it does."""

    used_pages: int
    SUPERSEDES: ClassVar[tuple[str, ...]] = ()


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
    SUPERSEDES: ClassVar[tuple[str, ...]] = ("job",)


@dataclass(frozen=True)
class Preview:
    """A picture of which the top rows are drawn; pixels uint8 [size, size, 3]."""

    job: int
    image: int
    rows: int
    pixels: bytes
    SUPERSEDES: ClassVar[tuple[str, ...]] = ("job", "image")


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


OUTCOMES = (
    "finished",
    "cancelled",
    "queue_timeout",
    "run_timeout",
    "out_of_memory",
    "non_finite",
    "refused",
)

Command = Submit | Cancel | Stop
Event = (
    Preparing | Ready | Unable | Heartbeat | LoopStats | Started | Drawn | Preview | Image | Ended
)
KINDS: dict[str, type] = {kind.__name__: kind for kind in (*Command.__args__, *Event.__args__)}


def _plain(value: object) -> dict[str, Any]:
    """What JSON does not know."""
    if isinstance(value, SamplingParams):
        return vars(value)
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


_as_json = json.JSONEncoder(default=_plain).encode


def encode(messages: Iterable[Any]) -> bytes:
    """Messages, dataclasses with at most one field of bytes each, as one frame."""
    told: list[tuple[str, dict[str, Any], int]] = []
    parts: list[bytes] = []
    for message in messages:
        fields, size = dict(vars(message)), 0
        for name, value in fields.items():
            if isinstance(value, bytes):
                parts.append(value)
                size, fields[name] = len(value), None
        told.append((type(message).__name__, fields, size))
    text = _as_json(told).encode()
    return b"".join((_HEAD.pack(len(text), sum(map(len, parts))), text, *parts))


def frame_bytes(head: bytes | bytearray) -> int:
    """How long the frame is, head and all, of which this is the head."""
    return HEAD_BYTES + sum(_HEAD.unpack_from(head))


def decode(frame: bytes | bytearray, kinds: Mapping[str, type] = KINDS) -> list[Any]:
    """What `encode` made a frame of; `kinds`: those that they may be of, by name."""
    length, _ = _HEAD.unpack_from(frame)
    place = HEAD_BYTES + length
    messages = []
    for name, fields, size in json.loads(frame[HEAD_BYTES:place]):
        kind = kinds[name]
        for field, annotation in kind.__annotations__.items():
            if annotation is bytes:
                fields[field] = bytes(memoryview(frame)[place : place + size])
            elif annotation is SamplingParams:
                fields[field] = SamplingParams(**fields[field])
            elif isinstance(fields.get(field), list):
                fields[field] = tuple(fields[field])
        place += size
        messages.append(kind(**fields))
    return messages


def receive(connection: socket.socket, kinds: Mapping[str, type] = KINDS) -> list[Any]:
    """The messages of the next frame, of these kinds; waits for it.

    Raises:
        EOFError: the other side has gone.
    """
    head = _receive_bytes(connection, HEAD_BYTES)
    return decode(head + _receive_bytes(connection, frame_bytes(head) - HEAD_BYTES), kinds)


def _receive_bytes(connection: socket.socket, count: int) -> bytearray:
    received = bytearray(count)
    missing = memoryview(received)
    while missing:
        try:
            size = connection.recv_into(missing)
        except OSError as error:  # closed here, or reset by the other side
            raise EOFError from error
        if size == 0:
            raise EOFError
        missing = missing[size:]
    return received
