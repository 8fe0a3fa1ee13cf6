"""What the service and the process that owns an engine tell each other: commands one way, events
the other; and `ServedRequest`, the service's record of a request, which takes its events.

A message is a frozen dataclass. Moments are of `time.monotonic`, which all processes of a host
share. `transport` says how messages go over a connection.

A kind of message may have `SUPERSEDES`: names of fields. A newer message of the kind with the same
values in these fields then supersedes an older one that still waits to be sent (see `Backlog`).
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from autoregressive.errors import Change, SettingName, UserError
from autoregressive.models.sampling_params import SamplingParams


@dataclass(frozen=True)
class _OfRequest:
    request_id: int


@dataclass(frozen=True)
class EngineRequest(_OfRequest):
    """A command: draw `n` images of a class.

    The route fills in what to draw; the dispatcher fills in the id and the deadlines.
    """

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
class Cancel(_OfRequest):
    """A command: end a request early."""


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
    """The start failed for a reason that the user can mend: what the `UserError` says."""

    parts: tuple[Any, ...]
    remedies: tuple[Any, ...]

    @property
    def error(self) -> UserError:
        """The error, to be raised again; data classes have come as their fields."""
        parts = (part if isinstance(part, str) else SettingName(**part) for part in self.parts)
        ways = [way if isinstance(way, str) else Change(**way) for way in self.remedies]
        return UserError(*parts, remedies=ways)


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
class Started(_OfRequest):
    """A request's first image has been admitted."""

    at: float


@dataclass(frozen=True)
class Progress(_OfRequest):
    """How many tokens the images of a request have at least, all together, once the device has done
    what it was given.
    """

    tokens: int
    at: float
    SUPERSEDES: ClassVar[tuple[str, ...]] = ("request_id",)


@dataclass(frozen=True)
class Preview(_OfRequest):
    """A picture of which the top rows are drawn; pixels uint8 [size, size, 3]."""

    index: int  # of the image in its request
    rows: int
    pixels: bytes
    SUPERSEDES: ClassVar[tuple[str, ...]] = ("request_id", "index")


@dataclass(frozen=True)
class Image(_OfRequest):
    """A finished image: pixels uint8 [size, size, 3], or codes int32 [tokens]."""

    index: int  # of the image in its request
    drawn_at: float  # its tokens were complete
    at: float
    decode_seconds: float
    data: bytes


@dataclass(frozen=True)
class Ended(_OfRequest):
    """A request has ended, and the engine holds nothing for it any more.

    The outcome is `finished`, or what `ended_early` knows: `cancelled`, or the reason of the
    failure.
    """

    outcome: str
    at: float
    message: str = ""
    tokens: int | None = None  # as of `Progress`
    drafted: int = 0  # guesses that were tried for it, over all its images; see `Request`
    accepted: int = 0  # those that held
    used_pages: int | None = None  # of the engine, now that this request's are free


Command = EngineRequest | Cancel | Stop
RequestEvent = Started | Progress | Preview | Image | Ended  # of one request
Event = Preparing | Ready | StartFailed | Heartbeat | LoopStats | RequestEvent
KINDS: dict[str, type] = {kind.__name__: kind for kind in (*Command.__args__, *Event.__args__)}


class RequestPhase(NamedTuple):
    """A part of what became of a request, between two moments."""

    name: str
    begun: float
    ended: float
    image: int | None = None  # its index in the request; None: all images


@dataclass(eq=False)
class ServedRequest:
    """Made where it is accepted; lives until its engine says that it holds nothing for it any more.

    A slow reader receives only the newest `Progress` and the newest preview of each image, so the
    images that were asked for bound what is kept for it.
    """

    request: EngineRequest
    accepted_at: float
    started_at: float | None = None
    first_token_at: float | None = None
    ended: Ended | None = None
    tokens: int = 0
    decode_seconds: float = 0.0
    reserved: bool = False  # rows were free for it when it came: it waits for no other
    abandoned: bool = False  # its events are not read any more
    answer_bytes: int = 0  # of its images' files that wait to be sent
    image_bytes: int = 0  # that one of its images takes at most, here and in its answer
    images_here: int = 0  # that have come from the engine
    # of its images so far: `pixels`, which tokens became, and `encoding`, as they became files
    phases: list[RequestPhase] = field(default_factory=list)
    # takes the events, if they are read in another process
    forward: Callable[[RequestEvent], None] | None = None
    _read_bytes: int = 0  # of the image that its reader makes a file of
    # in the order of their coming
    _events: dict[tuple[str, int], RequestEvent] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request_id(self) -> int:
        """The number by which this process and its engine know it."""
        return self.request.request_id

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes at most."""
        return self.request.n * self.request.params.rows

    def take(self, event: RequestEvent) -> None:
        """Takes an event from the engine; called in the event loop."""
        match event:
            case Started(at=at):
                self.started_at = at
            case Progress(tokens=tokens, at=at):
                self.tokens = tokens
                self.first_token_at = self.first_token_at or at
            case Image():
                self.decode_seconds += event.decode_seconds
                self.images_here += 1
                self.phases.append(RequestPhase("pixels", event.drawn_at, event.at, event.index))
                self._events.pop(("Preview", event.index), None)
            case Ended():
                self.ended = event
                self.tokens = self.tokens if event.tokens is None else event.tokens
        if self.forward is not None:
            if not self.abandoned or isinstance(event, Ended):
                self.forward(event)
            return
        # readers that do not watch need not be woken for `Started` and `Progress`
        told = self.request.watched or not isinstance(event, (Started, Progress))
        if told and not self.abandoned:
            key = (type(event).__name__, getattr(event, "index", 0))
            self._events.pop(key, None)
            self._events[key] = event
            self._news.set()

    def abandon(self) -> None:
        """Drops its events and all later ones, because their reader has gone."""
        self.abandoned = True
        self._events.clear()

    @property
    def held_bytes(self) -> int:
        """Bytes of the pixels, codes and files that wait for its reader in this process."""
        events = self._events.values()
        images = sum(len(event.data) for event in events if isinstance(event, Image))
        previews = sum(len(event.pixels) for event in events if isinstance(event, Preview))
        return self.answer_bytes + self._read_bytes + images + previews

    @property
    def promised_bytes(self) -> int:
        """Bytes that its images will take that are still to come from the engine."""
        if self.ended is not None or self.abandoned:
            return 0
        return (self.request.n - self.images_here) * self.image_bytes

    @property
    def has_news(self) -> bool:
        """Whether `next_event` would return at once."""
        return bool(self._events)

    async def next_event(self, timeout: float | None = None) -> RequestEvent | None:
        """Waits for the next event, the last of which is `Ended`; not to be called after that one.

        Returns:
            None if no event comes within `timeout` seconds.
        """
        self._read_bytes = 0
        try:
            async with asyncio.timeout(timeout):
                while not self._events:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return None
        event = self._events.pop(next(iter(self._events)))
        self._read_bytes = len(event.data) if isinstance(event, Image) else 0
        return event

    def give_back(self, image: Image) -> None:
        """Takes back an image that `next_event` returned, because its reader left before it came
        there.
        """
        self._read_bytes = 0
        if not self.abandoned:
            self._events = {("Image", image.index): image} | self._events

    def seconds_left(self, tokens_of_image: int) -> float | None:
        """A guess from its own speed so far, to hundredths; None while no token is drawn."""
        if self.started_at is None or self.tokens == 0:
            return None
        token_seconds = (time.monotonic() - self.started_at) / self.tokens
        return round(token_seconds * (self.request.n * tokens_of_image - self.tokens), 2)
