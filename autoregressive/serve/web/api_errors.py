"""Errors as all answers have them: OpenAI's `{"error": {message, type, param, code}}`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

# of some errors, by their codes
_HEADERS = {
    # OpenAI's clients would draw the same twice more
    "run_timeout": {"X-Should-Retry": "false"},
    "non_finite": {"X-Should-Retry": "false"},
    "unsupported_encoding": {"Accept-Encoding": "identity"},  # RFC 9110, section 15.5.16
}


class ErrorDetail(BaseModel):
    """An error, and the field that it is about."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """OpenAI's error."""

    error: ErrorDetail


@dataclass
class ApiError(Exception):
    """An answer that says what went wrong.

    Attributes:
        message: for people: it has no path, no address and no traceback.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None  # seconds

    @property
    def body(self) -> dict[str, Any]:
        """The error as the JSON object of an answer."""
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, other),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        again = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        key = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return again | key | _HEADERS.get(self.code, {})

    def encode(self, *, last: bool = False) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Headers and body of the whole answer.

        Args:
            last: the connection is closed after it.
        """
        body = json.dumps(self.body).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **self.headers,
        }
        if last:
            headers["Connection"] = "close"
        return [(name.lower().encode(), value.encode()) for name, value in headers.items()], body


def invalid(message: str, param: str) -> ApiError:
    """A field, or a parameter, has a value that cannot be used."""
    return ApiError(400, message, "invalid_value", param)


def internal_error() -> ApiError:
    """A bug of ours."""
    return ApiError(500, "something went wrong here; the log has it", "internal_error")


def not_ready(why: str, retry_after: int) -> ApiError:
    """The service does not accept requests yet, or not any more."""
    return ApiError(503, why, "not_ready", None, retry_after)


def described(errors: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """Errors as FastAPI's routes have them, from a description of each status."""
    return {status: {"model": ErrorAnswer, "description": text} for status, text in errors.items()}


# outcome -> status, message, code, and whether to try again later
_ENDS = {
    "queue_timeout": (
        503,
        "the request waited too long for its turn: try again later",
        "queue_timeout",
        True,
    ),
    "run_timeout": (
        504,
        "the images took too long to draw: ask for fewer, or try again later",
        "run_timeout",
        False,
    ),
    "out_of_memory": (
        503,
        "memory ran out while the images were drawn: try again later",
        "out_of_memory",
        True,
    ),
    "non_finite": (500, "no image could be drawn: {}", "non_finite", False),
    "refused": (400, "{}", "invalid_value", False),
    "cancelled": (503, "the service is stopping: try again later", "stopping", True),
    "engine_lost": (503, "the engine has stopped: try again later", "engine_lost", True),
}


def ended_early(outcome: str, message: str, retry_after: int) -> ApiError:
    """Why a request has ended without its images.

    Args:
        outcome: of an `Ended`, but not `finished`.
    """
    status, text, code, again = _ENDS[outcome]
    return ApiError(status, text.format(message), code, None, retry_after if again else None)
