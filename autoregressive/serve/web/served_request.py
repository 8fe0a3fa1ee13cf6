"""An accepted request on its way through an engine, as the event loop sees it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from autoregressive.serve.worker.messages import (
    Ended,
    EngineRequest,
    Image,
    Preview,
    Progress,
    RequestEvent,
    Started,
)


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
    image_bytes: int = 0  # of the pixels or codes of one of its images
    images_here: int = 0  # that have come from the engine
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
                self._events.pop(("Preview", event.index), None)
            case Ended():
                self.ended = event
                self.tokens = self.tokens if event.tokens is None else event.tokens
        if self.forward is not None:
            if not self.abandoned or isinstance(event, Ended):
                self.forward(event)
            return
        # readers that do not watch need not be woken for these
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
        """Bytes of its images that are still to come from the engine."""
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

    def seconds_left(self, tokens_of_image: int) -> float | None:
        """A guess from its own speed so far; None while no token is drawn."""
        if self.started_at is None or self.tokens == 0:
            return None
        passed = time.monotonic() - self.started_at
        return passed / self.tokens * (self.request.n * tokens_of_image - self.tokens)
