"""What an address is: this machine's own, or a client's."""

from ipaddress import IPv4Address, IPv6Address, ip_address

_HOST_BITS = 64  # of an IPv6 address: a subscriber may change the last 64 bits at will


def is_loopback(host: str) -> bool:
    """Whether a name or an address is reached from this machine only."""
    address = _parse(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def client_network(address: str) -> str:
    """The part of an address that its client cannot change: of an IPv6 address, the first half.

    Everything that is not an address counts as one client. A Unix socket's clients have no address.
    """
    parsed = _parse(address)
    if isinstance(parsed, IPv6Address):
        return f"{IPv6Address(int(parsed) >> _HOST_BITS << _HOST_BITS)}/{_HOST_BITS}"
    return "" if parsed is None else str(parsed)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    """An address; of an IPv4 address within an IPv6 one, the IPv4 address. None: it is none."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
