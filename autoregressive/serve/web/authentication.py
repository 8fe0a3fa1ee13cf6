"""Lets clients with a key in, and slows down clients that guess."""

import asyncio
import hashlib
import hmac
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import context_of
from autoregressive.serve.web.clients import client_network
from autoregressive.serve.web.guards import App, Receive, Scope, Send, answer

FREE_FAILURES = 10  # wrong keys that a network may send in a row
FAILURE_SECONDS = 6.0  # between two wrong keys after those
MOST_NETWORKS = 16_384  # in each table; beyond that, the oldest entry is dropped


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

    def seconds_to_wait(self, network: str) -> float:
        """Seconds until the network may try a key; 0: it may now."""
        wait = (
            self._recovered_at.get(network, 0.0)
            - self._clock()
            - (FREE_FAILURES - 1) * FAILURE_SECONDS
        )
        return max(0.0, wait)

    def count_failure(self, network: str) -> None:
        """Counts a wrong key."""
        now = self._clock()
        recovered_at = max(now, self._recovered_at.get(network, now)) + FAILURE_SECONDS
        _put(self._recovered_at, network, recovered_at)

    def is_proven(self, network: str, key: int) -> bool:
        """Whether the key was right from that network before."""
        return (network, key) in self._proven

    def prove(self, network: str, key: int) -> None:
        """Notes that the key was right from that network."""
        _put(self._proven, (network, key), None)


def _put(table: OrderedDict[Any, Any], name: object, value: object) -> None:
    table[name] = value
    table.move_to_end(name)
    if len(table) > MOST_NETWORKS:
        table.popitem(last=False)


class _CountedWarning:
    """One warning a second that says how often something has happened. Used in one event loop.

    Args:
        field: the name of the count.
    """

    def __init__(self, log: logging.Logger, message: str, field: str, seconds: float = 1.0) -> None:
        self._log, self._message, self._field, self._seconds = log, message, field, seconds
        self._count = 0

    def count(self) -> None:
        self._count += 1
        if self._count == 1:
            asyncio.get_running_loop().call_later(self._seconds, self._write)

    def _write(self) -> None:
        count, self._count = self._count, 0
        self._log.warning(self._message, extra={"fields": {self._field: count}})


class Authentication:
    """Lets in clients that have one of the keys.

    Args:
        keys: clients send one of them.
        is_open: whether a path needs no key.
    """

    def __init__(
        self,
        app: App,
        keys: Sequence[str],
        is_open: Callable[[str], bool],
        throttle: FailureThrottle | None = None,
    ) -> None:
        self._app, self._is_open = app, is_open
        self._digests = [_digest(key.encode()) for key in keys]
        self._throttle = throttle or FailureThrottle()
        log = logging.getLogger("llamagen.authentication")
        self._throttled = _CountedWarning(log, "keys were not tried: too many are wrong", "guesses")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        refusal = None if self._is_open(scope["path"]) else self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await answer(send, refusal)

    def _refusal(self, scope: Scope) -> ApiError | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:  # the page's first request, for example: not a guess, and so not a failure
            return ApiError(
                401, "this service wants a key: Authorization: Bearer KEY", "invalid_api_key"
            )
        network = client_network(scope["client"][0] if scope.get("client") else "")
        context = context_of(scope)
        context.key = number = self._find(given)
        if number is not None and self._throttle.is_proven(network, number):
            return None
        wait = self._throttle.seconds_to_wait(network)
        if wait > 0:
            # An attacker may send thousands a second.
            self._throttled.count()
            context.counted = True
            message = "too many wrong keys came from this address: no key is tried for some seconds"
            return ApiError(429, message, "too_many_wrong_keys", None, math.ceil(wait))
        if number is None:
            self._throttle.count_failure(network)
            return ApiError(
                401,
                "the key is not this service's; send Authorization: Bearer KEY",
                "invalid_api_key",
            )
        self._throttle.prove(network, number)
        return None

    def _find(self, given: list[bytes]) -> int | None:
        """The number of the key that was sent.

        Digests have one length, and each is compared, so the time says nothing about the length,
        the content or the place of a key.
        """
        scheme, _, credentials = given[0].partition(b" ")
        digest = _digest(credentials.lstrip(b" "))
        matches = [hmac.compare_digest(digest, expected) for expected in self._digests]
        if len(given) > 1 or scheme.lower() != b"bearer" or not any(matches):
            return None
        return matches.index(True)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
