"""What goes wrong, in the one shape that all answers have: OpenAI's `{"error": {message, type,
param, code}}`.
"""

import json
from dataclasses import dataclass
from typing import Any


@dataclass
class ApiError(Exception):
    """An answer that is not what was asked for. `message` is for people: no path, no address, no
    traceback.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None  # seconds

    @property
    def type(self) -> str:
        """OpenAI's word for the kind."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def body(self) -> dict[str, Any]:
        """The error as the JSON object of an answer."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        if self.code in ("run_timeout", "non_finite"):
            headers["X-Should-Retry"] = "false"  # OpenAI's clients would draw the same twice more
        if self.code == "unsupported_encoding":
            headers["Accept-Encoding"] = "identity"  # RFC 9110, section 15.5.16
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def encode(self, *, last: bool = False) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Headers and body of the whole answer; `last`: of the connection's last one."""
        body = json.dumps(self.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        headers |= self.headers
        if last:
            headers["Connection"] = "close"
        return [(name.lower().encode(), value.encode()) for name, value in headers.items()], body


def internal_error() -> ApiError:
    """A bug of ours."""
    return ApiError(500, "something went wrong here; the log has it", "internal_error")


def queue_full(waiting: int, retry_after: int) -> ApiError:
    """The queue has no place left."""
    return ApiError(
        429,
        f"{waiting} requests are waiting, and no more are taken: try again later",
        "queue_full",
        None,
        retry_after,
    )


def share_full(waiting: int, places: int, retry_after: int) -> ApiError:
    """The client has its share of the queue; the places that are free are for others."""
    message = (
        f"you have {waiting} of the {places} places for waiting requests, which is your "
        "share now: try again later"
    )
    return ApiError(429, message, "queue_full", None, retry_after)


def not_ready(why: str, retry_after: int) -> ApiError:
    """The service is not there yet, or not any more."""
    return ApiError(503, why, "not_ready", None, retry_after)


def ended_early(outcome: str, message: str, retry_after: int) -> ApiError:
    """Why a job has ended without its images; `outcome` is one of `worker.messages.OUTCOMES`, or
    `engine_lost`.
    """
    match outcome:
        case "queue_timeout":
            return ApiError(
                503,
                "the request waited too long for its turn: try again later",
                outcome,
                None,
                retry_after,
            )
        case "run_timeout":
            return ApiError(
                504, "the images took too long to draw: ask for fewer, or try again later", outcome
            )
        case "out_of_memory":
            return ApiError(
                503,
                "memory ran out while the images were drawn: try again later",
                outcome,
                None,
                retry_after,
            )
        case "non_finite":
            return ApiError(500, f"no image could be drawn: {message}", outcome)
        case "refused":
            return ApiError(400, message, "invalid_value")
        case "cancelled":
            return ApiError(
                503, "the service is stopping: try again later", "stopping", None, retry_after
            )
        case _:
            return ApiError(
                503, "the engine has stopped: try again later", "engine_lost", None, retry_after
            )
