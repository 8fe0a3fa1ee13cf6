"""Who a client is: whose share of the queue and of the engines a request takes, and which address a
proxy's request is from.
"""

from collections.abc import MutableMapping
from hashlib import blake2b
from ipaddress import ip_network
from typing import Any

from autoregressive.errors import UserError
from autoregressive.serve.web.addresses import client_network
from autoregressive.serve.web.http_protocol import KEY


def client_of(scope: MutableMapping[str, Any]) -> str:
    """Names the client of an ASGI request, by its address, and by the key that `Authentication` has
    found it to have.

    IPv6 addresses of one /64 are one client, because whoever has one of them has them all.

    Args:
        scope: of a request that has been let in; behind a trusted proxy with the address that it
            forwards.
    """
    address = scope["client"][0] if scope.get("client") else ""
    key = scope["state"].get(KEY)
    return blake2b(f"{client_network(address)}\n{key}".encode(), digest_size=8).hexdigest()


def check_forwarded_allow_ips(text: str) -> None:
    """Checks the value of --forwarded-allow-ips. uvicorn itself would take a misspelt address for a
    name, and trust nobody.

    Raises:
        UserError: it is neither * nor addresses and networks.
    """
    for item in [] if text == "*" else text.split(","):
        try:
            ip_network(item.strip())
        except ValueError as error:
            what = (
                "must be addresses or networks, separated by commas, such as "
                "10.0.0.7,10.1.0.0/16, or * alone"
            )
            raise UserError(f"--forwarded-allow-ips {text}: {what}") from error
