"""Messages between the service and the process that owns an engine: commands one way, events the
other.

A message is a frozen dataclass. Messages go over a pair of sockets in frames of one or several, so
that each costs less when there are many. A frame is two lengths, then names and fields as JSON,
then the messages' bytes as they are (pixels, codes). There is no pickle: neither side runs what the
other sends. Moments are of `time.monotonic`, which all processes of a host share.

A kind of message may have `SUPERSEDES`: names of fields. A newer message of the kind with the same
values in these fields then supersedes an older one that still waits to be sent (see `Backlog`).
"""

import json
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, ClassVar, cast

from autoregressive.models.sampling import SamplingParams
from autoregressive.serve.worker.child import receive_bytes

_HEAD = struct.Struct("<II")  # bytes of the JSON part, and of what is behind it
HEAD_BYTES = _HEAD.size


@dataclass(frozen=True)
class EngineRequest:
    """A command: draw `n` images of a class.

    The route fills in what to draw; the dispatcher fills in the id and the deadlines.
    """

    request_id: int
    class_label: int
    n: int
    params: SamplingParams  # of each image, so with n = 1
    pixels: bool  # False: codes
    # Rows of the token grid at which a preview is wanted. Of those that are reached, the last is
    # sent.
    preview_rows: tuple[int, ...] = ()
    watched: bool = False  # `Progress` is sent again and again, not only for the first token
    start_by: float | None = None  # moment; later it ends with `queue_timeout`
    run_seconds: float | None = None  # from its start; after these it ends with `run_timeout`
    client: str = ""  # whose it is, as `client_id` names it


@dataclass(frozen=True)
class Cancel:
    """A command: end a request early."""

    request_id: int


@dataclass(frozen=True)
class Stop:
    """A command: leave the loop at once."""


@dataclass(frozen=True)
class Preparing:
    """How much of the start is done."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """The engine takes requests; its size."""

    max_rows: int
    num_pages: int
    pages_per_row: int  # of a whole image


@dataclass(frozen=True)
class StartFailed:
    """The start failed for a reason that the user can mend: one line."""

    message: str


@dataclass(frozen=True)
class Heartbeat:
    """The process lives. A thread of its own sends it, so it says nothing of the loop, which may
    hang.
    """


@dataclass(frozen=True)
class LoopStats:
    """The engine's loop advances. It is sent some times a second."""

    used_pages: int
    SUPERSEDES: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Started:
    """A request's first image has been admitted."""

    request_id: int
    at: float


@dataclass(frozen=True)
class Progress:
    """How many tokens of a request, over all its images, have been given to the device."""

    request_id: int
    tokens: int
    at: float
    SUPERSEDES: ClassVar[tuple[str, ...]] = ("request_id",)


@dataclass(frozen=True)
class Preview:
    """A picture of which the top rows are drawn; pixels uint8 [size, size, 3]."""

    request_id: int
    index: int  # of the image in its request
    rows: int
    pixels: bytes
    SUPERSEDES: ClassVar[tuple[str, ...]] = ("request_id", "index")


@dataclass(frozen=True)
class Image:
    """A finished image: pixels uint8 [size, size, 3], or codes int32 [tokens]."""

    request_id: int
    index: int  # of the image in its request
    at: float
    decode_seconds: float
    data: bytes


@dataclass(frozen=True)
class Ended:
    """A request has ended, and the engine holds nothing for it any more.

    The outcome is `finished`, `cancelled`, or the reason of the failure.
    """

    request_id: int
    outcome: str  # one of OUTCOMES
    at: float
    message: str = ""
    tokens: int | None = None  # that were given to the device, over all its images
    used_pages: int | None = None  # of the engine, now that this request's are free


OUTCOMES = (
    "finished",
    "cancelled",
    "queue_timeout",
    "run_timeout",
    "out_of_memory",
    "non_finite",
    "refused",
)

Command = EngineRequest | Cancel | Stop
RequestEvent = Started | Progress | Preview | Image | Ended  # of one request
Event = Preparing | Ready | StartFailed | Heartbeat | LoopStats | RequestEvent
KINDS: dict[str, type] = {kind.__name__: kind for kind in (*Command.__args__, *Event.__args__)}


_as_json = json.JSONEncoder(default=vars).encode  # of a dataclass within a message: its fields


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
    """The length of a whole frame, its head included, from its head."""
    return HEAD_BYTES + sum(_HEAD.unpack_from(head))


def decode(frame: bytes | bytearray, kinds: Mapping[str, type] = KINDS) -> list[Any]:
    """The messages of a frame that `encode` has made.

    Args:
        kinds: the kinds that they may be of, by name.
    """
    length, _ = _HEAD.unpack_from(frame)
    place = HEAD_BYTES + length
    messages = []
    for name, fields, size in json.loads(frame[HEAD_BYTES:place]):
        kind = kinds[name]
        for field, annotation in kind.__annotations__.items():
            if annotation is bytes:
                fields[field] = bytes(memoryview(frame)[place : place + size])
            elif is_dataclass(annotation):
                fields[field] = cast(type, annotation)(**fields[field])
            elif isinstance(fields.get(field), list):
                fields[field] = tuple(fields[field])
        place += size
        messages.append(kind(**fields))
    return messages


def receive(connection: socket.socket, kinds: Mapping[str, type] = KINDS) -> list[Any]:
    """Waits for the next frame; its messages, which are of these kinds.

    Raises:
        EOFError: the other side has gone.
    """
    head = receive_bytes(connection, HEAD_BYTES)
    return decode(head + receive_bytes(connection, frame_bytes(head) - HEAD_BYTES), kinds)
