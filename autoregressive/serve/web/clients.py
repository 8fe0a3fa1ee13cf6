"""Who a client is: whose share of the queue and of the engines a request takes, and which address a proxy's request is from."""

from collections.abc import MutableMapping
from hashlib import blake2b
from ipaddress import ip_network
from typing import Any

from autoregressive.common.errors import UserError
from autoregressive.serve.web.addresses import client_network


def client_of(scope: MutableMapping[str, Any], *, keyed: bool) -> str:
    """Names the client of an ASGI request, by its address, and by its key if it has one. The name does not tell the key.

    IPv6 addresses of one /64 are one client, because whoever has one of them has them all.

    Args:
        scope: of a request that `Authentication` has let in; behind a trusted proxy with the address that it forwards.
        keyed: whether the service wants a key. Otherwise anybody could send any, and be many clients.
    """
    address = scope["client"][0] if scope.get("client") else ""
    key = _key(scope) if keyed else b""
    return blake2b(f"{client_network(address)}\n".encode() + key, digest_size=8).hexdigest()


def check_forwarded_allow_ips(text: str) -> None:
    """Checks the value of --forwarded-allow-ips. uvicorn itself would take a misspelt address for a name, and trust nobody.

    Raises:
        UserError: it is neither * nor addresses and networks.
    """
    for item in [] if text == "*" else text.split(","):
        try:
            ip_network(item.strip())
        except ValueError as error:
            what = "must be addresses or networks, separated by commas, such as 10.0.0.7,10.1.0.0/16, or * alone"
            raise UserError(f"--forwarded-allow-ips {text}: {what}") from error


def _key(scope: MutableMapping[str, Any]) -> bytes:
    """What is sent as the key, without the scheme and spaces around it, which can be written in several ways."""
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    words = given.split(None, 1)
    return bytes(words[1].strip()) if len(words) == 2 else b""
