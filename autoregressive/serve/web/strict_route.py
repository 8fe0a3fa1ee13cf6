"""Checks a request's query, the type of its body, and its JSON."""

import json
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NoReturn, cast

import anyio.to_thread
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from autoregressive.errors import did_you_mean
from autoregressive.serve.web.api_errors import ApiError

_SHOWN_CHARACTERS = 100  # of a name that a client made up
# Monitors add parameters of their own to /health and the like, which take none.
_CHECKED_QUERIES = "/v1/"
# A body of a mebibyte takes up to a fifth of a second to read. Meanwhile the event loop would
# answer no client, so bodies above this size are read in a thread, one at a time.
_READ_AT_ONCE_BYTES = 16 * 2**10


class StrictRoute(APIRoute):
    """A route that tells what is wrong with a request where FastAPI ignores it or does not tell."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind the checks."""
        handle = super().get_route_handler()
        known = [parameter.alias for parameter in self.dependant.query_params]
        schema: type[BaseModel] | None = None
        if self.body_field is not None:
            schema = cast(type[BaseModel], self.body_field.field_info.annotation)
        reading = anyio.CapacityLimiter(1)

        async def check_and_handle(request: Request) -> Response:
            if self.path.startswith(_CHECKED_QUERIES):
                check_query([name for name, _ in request.query_params.multi_items()], known)
            if schema is not None:
                body = await request.body()
                check_type(
                    request.headers.get("content-type"),
                    request.headers.get("content-encoding"),
                    body,
                )
                if len(body) <= _READ_AT_ONCE_BYTES:
                    content = read_fields(body, schema)
                else:
                    content = await anyio.to_thread.run_sync(
                        read_fields, body, schema, limiter=reading
                    )
                request._json = content  # where starlette keeps what it has read itself
            return await handle(request)

        return check_and_handle


def read_fields(body: bytes, schema: type[BaseModel]) -> object:
    """Reads a body, and drops the fields that have no effect.

    A value of JSON takes up to thirty times as much memory as its text, and would be held until the
    request is answered. Values of fields that have a type are small, or are refused.

    Raises:
        ApiError: it is not JSON, or a field is unknown.
    """
    content = read_json(body)
    if isinstance(content, dict):
        # The first one is enough, because a body may have a hundred thousand.
        unknown = next((name for name in content if name not in schema.model_fields), None)
        if unknown is not None:
            raise _unknown(unknown, schema.model_fields, "field", "unknown_field")
        for name, field in schema.model_fields.items():
            if field.annotation is Any:
                content.pop(name, None)
    return content


def check_query(given: Iterable[str], known: Sequence[str]) -> None:
    """Checks a query, in which a misspelt parameter must not be ignored.

    Raises:
        ApiError: a parameter is unknown, or is there twice.
    """
    for name, count in Counter(given).items():
        if name not in known:
            raise _unknown(name, known, "query parameter", "unknown_parameter")
        if count > 1:
            raise ApiError(400, f"the query has {name} twice", "invalid_value", name)


def _unknown(name: str, known: Iterable[str], kind: str, code: str) -> ApiError:
    shown = _shown(name)
    hint = did_you_mean(shown, [*known])
    return ApiError(400, f"{shown} is not a known {kind}{hint}", code, shown)


def _shown(name: str) -> str:
    """A name that a client gave, shortened. JSON allows half a character, which UTF-8 does not."""
    cut = name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..."
    return cut.encode(errors="backslashreplace").decode()


def check_type(content_type: str | None, content_encoding: str | None, body: bytes) -> None:
    """Checks that a body is declared as JSON, which pages of other sites cannot have a browser send
    here, unlike text or a form.

    Raises:
        ApiError: the body is not declared as JSON, or is compressed, or there is none.
    """
    if not body:
        raise ApiError(
            400,
            "the body is empty: it must be a JSON object, sent as application/json",
            "invalid_body",
        )
    if content_encoding is not None and content_encoding.strip().lower() not in ("", "identity"):
        raise ApiError(
            415,
            "the body is compressed: send it as it is, without Content-Encoding",
            "unsupported_encoding",
        )
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise ApiError(
            415,
            "the body must be JSON, and declared so: Content-Type: application/json",
            "unsupported_media_type",
        )


def read_json(body: bytes) -> object:
    """Reads JSON, in which 1.0 is 1: JSON knows one kind of number.

    Raises:
        ApiError: it is not JSON in UTF-8, or has two values for one name. A byte order mark in
            front is ignored.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8 (at byte {error.start})", "invalid_json"
        ) from error
    try:
        return json.loads(
            text, parse_float=_number, parse_constant=_refuse_constant, object_pairs_hook=_fields
        )
    except json.JSONDecodeError as error:
        raise ApiError(
            400, f"the body is not JSON (at character {error.pos})", "invalid_json"
        ) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", "invalid_json") from error
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise ApiError(400, "the body has a number of too many digits", "invalid_json") from error


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"the body is not JSON: JSON has no {name}", "invalid_json")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = _shown(next(name for name, count in counts.items() if count > 1))
        raise ApiError(400, f"the body has {twice} twice", "invalid_json", twice)
    return fields
