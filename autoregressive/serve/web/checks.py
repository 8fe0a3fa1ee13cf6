"""Who is let in, and what a request must be: a client has a key, or without keys uses one of this
machine's names; its query, the type of its body, and its JSON are checked. Clients that guess keys
are slowed down.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import anyio.to_thread
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from autoregressive.errors import did_you_mean
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import context_of
from autoregressive.serve.web.clients import client_network, is_loopback
from autoregressive.serve.web.tolerance import warning_header

FREE_FAILURES = 10  # wrong keys that a network may send in a row
FAILURE_SECONDS = 6.0  # between two wrong keys after those
MOST_NETWORKS = 16_384  # in each table; beyond that, the oldest entry is dropped
_WARNING_SECONDS = 1.0  # between two warnings about keys that were not tried
# An IPv6 address in brackets, or a name or an IPv4 address; with or without a port.
_HOST = re.compile(rb"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+?)\.?)(?::[0-9]*)?", re.IGNORECASE)
_SHOWN_CHARACTERS = 100  # of a name that a client made up
# A body of a mebibyte takes up to a fifth of a second to read. Meanwhile the event loop would
# answer no client, so bodies above this size are read in a thread, one at a time.
_READ_AT_ONCE_BYTES = 16 * 2**10
_log = logging.getLogger("llamagen.authentication")
Adapt = Callable[[dict[str, Any], type[BaseModel]], list[str]]


class FailureThrottle:
    """Counts wrong keys by the client's network, and limits how many each network may send.

    A network may send a few wrong keys in a row, and after those one every few seconds. While it
    has to wait, no new key is tried for it, not even the right one: otherwise an attacker would see
    from the answer which guess was right. A key that was right from that network before still
    passes: several clients may share an address (NAT, a proxy), and the wrong keys of one must not
    lock out the others.

    Both tables have an upper size, so that an attacker with many addresses cannot fill the memory.
    Only clients with a key get into the second table.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # network -> when all its tries are free again
        self._recovered_at: OrderedDict[str, float] = OrderedDict()
        # network and number of a key that was right there
        self._proven: OrderedDict[tuple[str, int], None] = OrderedDict()

    def seconds_to_wait(self, network: str, key: int | None) -> float:
        """Notes that a network has sent a key.

        Args:
            key: the number of a right one; None: it is wrong.

        Returns:
            Seconds until the network may try a key; 0: this one counts.
        """
        if (network, key) in self._proven:
            return 0.0
        now = self._clock()
        recovered_at = max(now, self._recovered_at.get(network, now))
        wait = recovered_at - now - (FREE_FAILURES - 1) * FAILURE_SECONDS
        if wait > 0:
            return wait
        if key is None:
            _put(self._recovered_at, network, recovered_at + FAILURE_SECONDS)
        else:
            _put(self._proven, (network, key), None)
        return 0.0


def _put(table: OrderedDict[Any, Any], name: object, value: object) -> None:
    table[name] = value
    table.move_to_end(name)
    if len(table) > MOST_NETWORKS:
        table.popitem(last=False)


class Authentication:
    """Lets in clients that have one of the keys. Used in one event loop.

    Args:
        keys: clients send one of them.
        is_open: whether a path needs no key.
    """

    def __init__(
        self,
        keys: Sequence[str],
        is_open: Callable[[str], bool],
        throttle: FailureThrottle | None = None,
    ) -> None:
        self._is_open = is_open
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._throttle = throttle or FailureThrottle()
        self._untried = 0  # keys since the last warning

    def check(self, scope: Any) -> None:
        """Lets in a request with a right key, or for an open path.

        Args:
            scope: of the ASGI request.

        Raises:
            ApiError: it has no key or a wrong one, or too many wrong keys came before it.
        """
        if self._is_open(scope["path"]):
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:  # the page's first request, for example: not a guess, and so not a failure
            raise ApiError(
                401, "this service wants a key: Authorization: Bearer KEY", "invalid_api_key"
            )
        network = client_network(scope["client"][0] if scope.get("client") else "")
        context = context_of(scope)
        context.key = self._find(given)
        wait = self._throttle.seconds_to_wait(network, context.key)
        if wait > 0:
            self._untried += 1
            if self._untried == 1:  # a warning a second, because an attacker may send thousands
                asyncio.get_running_loop().call_later(_WARNING_SECONDS, self._warn)
            context.counted = True
            raise ApiError(
                429,
                "too many wrong keys came from this address: no key is tried for some seconds",
                "too_many_wrong_keys",
                None,
                math.ceil(wait),
            )
        if context.key is None:
            raise ApiError(
                401,
                "the key is not this service's; send Authorization: Bearer KEY",
                "invalid_api_key",
            )

    def _warn(self) -> None:
        _log.warning(
            "keys were not tried: too many are wrong",
            extra={"fields": {"guesses": self._untried}},
        )
        self._untried = 0

    def _find(self, given: list[bytes]) -> int | None:
        """The number of the key that was sent.

        Digests have one length, and each is compared, so the time says nothing about the length,
        the content or the place of a key.
        """
        scheme, _, credentials = given[0].partition(b" ")
        digest = hashlib.sha256(credentials.lstrip(b" ")).digest()
        matches = [hmac.compare_digest(digest, expected) for expected in self._digests]
        is_bearer = len(given) == 1 and scheme.lower() == b"bearer"
        return matches.index(True) if is_bearer and any(matches) else None


def check_host(scope: Any, public: str | None) -> None:
    """Lets in a request for this machine or for `public`. It is for a service without keys.

    The owner of a web page can make its name resolve to 127.0.0.1. The browser then takes the
    service for a part of that page's site, and lets the page read answers (DNS rebinding). But it
    sends the page's name as Host. A client that sends no Host, such as a load balancer's probe in
    HTTP/1.0, is no browser, and is answered.

    starlette's `TrustedHostMiddleware` knows neither networks (127.0.0.0/8) nor this service's
    errors.

    Args:
        scope: of the ASGI request.
        public: the name that clients use, where it is not this machine's own.

    Raises:
        ApiError: it is for another host.
    """
    given = [value for name, value in scope["headers"] if name == b"host"]
    if not given:
        return
    if len(given) == 1 and (host := _HOST.fullmatch(given[0])) is not None:
        name = (host[1] or host[2]).decode("ascii").lower()
        if name == public or is_loopback(name):
            return
    raise ApiError(
        421,
        "without a key this service answers to localhost only: start it with --api-key, or with "
        "--public-url and the URL that clients use",
        "unknown_host",
    )


class StrictRoute(APIRoute):
    """A route that tells what is wrong with a request where FastAPI ignores it or does not tell."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind the checks."""
        handle = super().get_route_handler()
        known = [parameter.alias for parameter in self.dependant.query_params]
        field = self.body_field
        schema = None if field is None else cast(type[BaseModel], field.field_info.annotation)
        reading = anyio.CapacityLimiter(1)

        async def check_and_handle(request: Request) -> Response:
            changes: list[str] = []
            # Monitors add parameters of their own to /health and the like, which take none.
            if self.path.startswith("/v1/"):
                check_query([name for name, _ in request.query_params.multi_items()], known)
            if schema is not None:
                body = await request.body()
                check_type(
                    request.headers.get("content-type"),
                    request.headers.get("content-encoding"),
                    body,
                )
                read = partial(read_fields, body, schema, request.app.state.adapt)
                # into the place where starlette keeps what it has read itself
                if len(body) <= _READ_AT_ONCE_BYTES:
                    request._json, changes = read()
                else:
                    request._json, changes = await anyio.to_thread.run_sync(read, limiter=reading)
            response = await handle(request)
            for change in changes:
                response.headers.append("Warning", warning_header(change))
            return response

        return check_and_handle


def read_fields(
    body: bytes, schema: type[BaseModel], adapt: Adapt = lambda fields, schema: []
) -> tuple[object, list[str]]:
    """Reads a body, and drops the fields that have no effect; also returns what was changed.

    A value of JSON takes up to thirty times as much memory as its text, and would be held until the
    request is answered. Values of fields that have a type are small, or are refused.

    Args:
        adapt: changes fields, and tells what it has changed.

    Raises:
        ApiError: it is not JSON, or a field is unknown.
    """
    content, changes = read_json(body), list[str]()
    if isinstance(content, dict):
        changes = adapt(content, schema)
        # The first one is enough, because a body may have a hundred thousand.
        unknown = next((name for name in content if name not in schema.model_fields), None)
        if unknown is not None:
            raise _unknown(unknown, schema.model_fields, "field", "unknown_field")
        for name, field in schema.model_fields.items():
            if field.annotation is Any:
                content.pop(name, None)
    return content, changes


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
        return json.loads(
            body.decode("utf-8-sig"),
            parse_float=_number,
            parse_constant=_refuse_constant,
            object_pairs_hook=_fields,
        )
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8 (at byte {error.start})", "invalid_json"
        ) from error
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
