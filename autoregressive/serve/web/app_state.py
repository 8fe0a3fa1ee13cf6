"""The objects that the routes work with: the model, the broker of requests, the threads that make
files, and the store.
"""

import asyncio
import base64
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio.to_thread

from autoregressive.serve.web.api_errors import ApiError, ended_early
from autoregressive.serve.web.dispatcher import RequestBroker
from autoregressive.serve.web.pictures import encode_picture, encode_preview
from autoregressive.serve.web.schema import OutputFormat, StreamRequest
from autoregressive.serve.web.served_model import ServedModel
from autoregressive.serve.web.store import Store, StoredPicture, StoreFailed
from autoregressive.serve.worker.messages import Ended, EngineRequest, Image, Preview

_STORE_THREADS = 8  # a slow disk holds up these, and neither the encoders nor the page
_NOT_STORED = ApiError(
    503,
    "images cannot be stored now: ask for b64_json, or try again later",
    "store_failed",
    "response_format",
    10,
)
_NOT_READ = ApiError(503, "the image cannot be read now: try again later", "store_failed", None, 10)
_Result = TypeVar("_Result")


class FairQueue:
    """Lets one task through at each turn of the event loop, in the order of asking; two where a
    queue ends. Used in one event loop.

    Work that takes long waits for a turn of its own, so that a short request is served between
    two of them.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False  # whether a task has this turn

    async def take(self) -> None:
        """Waits for a turn; returns at once if this one is free."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._next)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its task has been cancelled
                turn.set_result(None)
                turn.get_loop().call_soon(self._next)
                return
        self._taken = False


@dataclass(frozen=True)
class AppState:
    """Shared by all routes of one process."""

    model: ServedModel
    broker: RequestBroker
    encoders: Executor
    store: Store | None
    turns: FairQueue = field(default_factory=FairQueue)  # to read a request, or to write an image
    store_threads: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_STORE_THREADS)
    )

    async def picture(self, request: EngineRequest, image: Image, body: StreamRequest) -> bytes:
        """Makes a finished image's file in a thread."""
        return await self._encoded(lambda: self._picture(request, image, body))

    async def picture_text(
        self, request: EngineRequest, image: Image, body: StreamRequest
    ) -> bytes:
        """Makes a finished image's file in base64, and waits for the turn to write it."""
        text = await self._encoded(lambda: base64.b64encode(self._picture(request, image, body)))
        await self.turns.take()
        return text

    async def preview_text(self, preview: Preview, output_format: OutputFormat) -> bytes:
        """Makes a preview's file in base64, and waits for the turn to write it."""
        pixels, size = preview.pixels, self.model.image_size
        text = await self._encoded(
            lambda: base64.b64encode(encode_preview(pixels, size, output_format))
        )
        await self.turns.take()
        return text

    async def check_store(self, images: int) -> None:
        """Finds out, before so many images are drawn, whether they can be stored.

        Raises:
            ApiError: they cannot.
        """
        assert self.store is not None
        if images > (most := self.store.most_of_a_request):
            raise ApiError(
                400,
                f"n must be at most {most} with response_format url: no more are kept",
                "invalid_value",
                "n",
            )
        await self._on_disk(_NOT_STORED, self.store.check, images)

    async def save(self, pictures: list[bytes], output_format: OutputFormat) -> list[str]:
        """Stores the pictures of an answer; returns their URLs.

        Raises:
            ApiError: the disk does not take them.
        """
        assert self.store is not None
        return await self._on_disk(_NOT_STORED, self.store.save, pictures, output_format)

    async def stored(self, name: str) -> StoredPicture | None:
        """The stored picture of that name.

        Raises:
            ApiError: the disk does not give it.
        """
        assert self.store is not None
        return await self._on_disk(_NOT_READ, self.store.read, name)

    def failure(self, ended: Ended) -> ApiError:
        """The error of a request that has no result."""
        return ended_early(ended.outcome, ended.message, self.broker.retry_after())

    def _picture(self, request: EngineRequest, image: Image, body: StreamRequest) -> bytes:
        record = self.model.record_of(request, image.index)
        size, quality = self.model.image_size, body.output_compression
        return encode_picture(image.data, size, body.picture_format, quality, record)

    async def _on_disk(
        self, problem: ApiError, function: Callable[..., _Result], *arguments: Any
    ) -> _Result:
        try:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=self.store_threads)
        except StoreFailed as error:
            raise replace(problem) from error

    async def _encoded(self, encode: Callable[[], bytes]) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self.encoders, encode)
