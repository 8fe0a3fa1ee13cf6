"""What the routes and the guards before them share: the objects that they work with, and the record
of each HTTP request, which goes with the request's scope.
"""

import asyncio
import base64
import secrets
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import anyio.to_thread

from autoregressive.serve.web.api_errors import ApiError, ended_early
from autoregressive.serve.web.clients import client_id
from autoregressive.serve.web.connections import Connection, Connections
from autoregressive.serve.web.schema import ServedModel
from autoregressive.serve.web.signed_urls import DEFAULT_LIFETIME, UrlSigner
from autoregressive.serve.web.store import Store, StoreFailed
from autoregressive.serve.web.tolerance import STRICT, Tolerance
from autoregressive.serve.worker.messages import Ended, EngineRequest, ServedRequest

REQUESTS = "llamagen.requests"  # the logger that writes a line for each request
IMAGES_PATH, STREAM_PATH, CODES_PATH = "/v1/images/generations", "/v1/images/stream", "/v1/codes"
DRAWING_PATHS = (IMAGES_PATH, STREAM_PATH, CODES_PATH)
_NAME = "context"  # of the record in a scope's state
_Result = TypeVar("_Result")


class RequestBroker(Protocol):
    """Takes the routes' requests: the dispatcher, or its stand-in in another process."""

    @property
    def unhealthy(self) -> str | None:
        """For clients: which process of the service is lost or does not respond, as far as is
        known.
        """

    def require_ready(self) -> None:
        """Raises the `ApiError` that says why no request is accepted now."""

    async def accept(self, request: EngineRequest) -> ServedRequest:
        """Accepts a request, and fills in its id and deadlines.

        Raises:
            ApiError: the service is not ready, the queue is full, or the client has its share of
                it.
        """

    def abandon(self, served: ServedRequest) -> None:
        """Drops a request that is not waited for any more. Its engine is told unless it has
        ended.
        """

    def ahead_of(self, served: ServedRequest) -> int:
        """How many waiting requests start before a waiting one, if no more come.

        It is counted every half a second. Where clients take turns it is an estimate, because only
        the engines know whose turn it is.
        """

    def retry_after(self) -> int:
        """Seconds after which to try again: as long as recent requests took."""

    def count(self, outcome: str) -> None:
        """Counts an answered request for images or codes."""

    async def metrics_text(self) -> bytes:
        """All metrics in Prometheus' format.

        Raises:
            ApiError: the dispatcher's process does not respond.
        """


class Turns:
    """Lets one task through at a turn of the event loop, in the order of asking.

    Work that takes long waits for a turn of its own, so that a short request is served between
    two of them. Used in one event loop.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def take(self) -> None:
        """Waits for a turn; returns at once if this one is free."""
        await self._turn.acquire()
        asyncio.get_running_loop().call_soon(self._turn.release)


@dataclass(frozen=True)
class AppState:
    """Shared by all routes of one process."""

    model: ServedModel
    broker: RequestBroker
    encoders: Executor
    store: Store | None
    turns: Turns = field(default_factory=Turns)  # to read a request, or to write an image
    # a slow disk holds up these, and neither the encoders nor the page
    store_threads: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(8))
    signer: UrlSigner = field(
        default_factory=lambda: UrlSigner(secrets.token_hex(32), DEFAULT_LIFETIME)
    )
    tolerance: Tolerance = STRICT

    async def make(self, make_file: Callable[[], bytes]) -> bytes:
        """Makes a picture's file in an encoder thread."""
        return await asyncio.get_running_loop().run_in_executor(self.encoders, make_file)

    async def make_base64(self, make_file: Callable[[], bytes]) -> bytes:
        """Makes a picture's file in base64, in an encoder thread, and waits for the turn to write
        it.
        """
        file = await self.make(lambda: base64.b64encode(make_file()))
        await self.turns.take()
        return file

    async def on_disk(
        self, problem: ApiError, function: Callable[..., _Result], *arguments: Any
    ) -> _Result:
        """Calls a function of the store in a thread.

        Raises:
            ApiError: the problem, if the disk does not do it.
        """
        try:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=self.store_threads)
        except StoreFailed as error:
            raise replace(problem) from error

    def failure(self, ended: Ended) -> ApiError:
        """The error of a request that has no result."""
        return ended_early(ended.outcome, ended.message, self.broker.retry_after())


def new_request_id() -> str:
    """The id of an HTTP request, for its answer and its line in the log."""
    return f"req_{secrets.token_hex(12)}"


@dataclass(eq=False)
class RequestContext:
    """One HTTP request, as far as its scope does not say."""

    request_id: str = field(default_factory=new_request_id)
    # this process's connections, and the one that it came through; None behind another server
    connections: Connections | None = None
    connection: Connection | None = None
    key: int | None = None  # the number of the key that let it in, where the service has keys
    admitted: bool = False  # it was let in, whatever became of it
    served: ServedRequest | None = None  # what is drawn for it
    body_bytes: int = 0  # held of its body
    unsent_bytes: int = 0  # of its answer, which the connection does not hold yet
    failed: bool = False  # its stream broke off because of a bug
    cut: bool = False  # its connection was closed before the answer was complete
    counted: bool = False  # a warning a second counts it; its own line is for DEBUG
    # Status and bytes of the answer, if it was given before the application answered: the body
    # turned out not to be HTTP.
    refused: tuple[int, int] | None = None


def context_of(scope: Any) -> RequestContext:
    """The record of an ASGI request, which is made at the first call.

    Args:
        scope: of the request.
    """
    state = scope.setdefault("state", {})
    context: RequestContext = state.get(_NAME) or RequestContext()
    state[_NAME] = context
    return context


def client_of(scope: Any) -> str:
    """Names the client of an ASGI request that has been let in, as `client_id` does.

    Args:
        scope: of the request.
    """
    return client_id(scope["client"][0] if scope.get("client") else "", context_of(scope).key)
