"""The service's record of one HTTP request, which goes with the request's scope."""

import secrets
from dataclasses import dataclass, field
from typing import Any

from autoregressive.serve.web.clients import client_id
from autoregressive.serve.web.connections import Connection, Connections
from autoregressive.serve.web.served_request import ServedRequest

REQUESTS = "llamagen.requests"  # the logger that writes a line for each request
_NAME = "context"  # of the record in a scope's state


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
    if _NAME not in state:
        state[_NAME] = RequestContext()
    context: RequestContext = state[_NAME]
    return context


def client_of(scope: Any) -> str:
    """Names the client of an ASGI request that has been let in, as `client_id` does.

    Args:
        scope: of the request.
    """
    address = scope["client"][0] if scope.get("client") else ""
    return client_id(address, context_of(scope).key)
