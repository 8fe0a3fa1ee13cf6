"""Who a client is, and its share of the places in the queue."""

from collections import Counter
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address, ip_address

_HOST_BITS = 64  # of an IPv6 address: a subscriber may change the last 64 bits at will


def is_loopback(host: str) -> bool:
    """Whether a name or an address is reached from this machine only."""
    address = _parse(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def client_network(address: str) -> str:
    """The part of an address that its client cannot change: of an IPv6 address, the first half.

    All texts that are no address count as one client. A Unix socket's clients have no address.
    """
    parsed = _parse(address)
    if isinstance(parsed, IPv6Address):
        return f"{IPv6Address(int(parsed) >> _HOST_BITS << _HOST_BITS)}/{_HOST_BITS}"
    return "" if parsed is None else str(parsed)


def client_id(address: str, key: int | None) -> str:
    """Names a client by its address and by the key that it has.

    IPv6 addresses of one /64 are one client, because who has one of them has them all.

    Args:
        address: behind a trusted proxy the address that it forwards.
        key: the number of the key that `Authentication` has found.
    """
    return blake2b(f"{client_network(address)}\n{key}".encode(), digest_size=8).hexdigest()


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    """An address; of an IPv4 address within an IPv6 one, the IPv4 address. None: it is none."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def fits_share(own: int, count: int, free: int) -> bool:
    """Whether a client may have more of what clients share.

    A client that has something already gets more only if it then has at most four times as much as
    stays free; a client that has nothing gets whatever is free. These are the dynamic thresholds by
    which switches share memory among their queues (Choudhury and Hahne, 1998). One client alone
    can take four fifths, two can take four ninths each, N can take 4 / (4 N + 1) each.

    Args:
        own: what it has.
        count: what it asks for.
        free: what stays free if it gets that.
    """
    return free >= 0 and (own == 0 or own + count <= 4 * free)


class WaitingPlaces:
    """Counts the requests that wait for others, by client.

    As no waiting request is sent away, a client that came early may have more than its share for a
    while; until enough of its requests have started, it gets no further place.

    Args:
        size: how many may wait.
        shared: whether clients have shares; otherwise places go to the first who ask.
    """

    def __init__(self, size: int, *, shared: bool) -> None:
        self.size = size
        self._shared = shared
        self._taken: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """How many requests of all clients wait."""
        return self._taken.total()

    def taken_by(self, client: str) -> int:
        """Requests of a client that wait."""
        return self._taken[client]

    @property
    def full(self) -> bool:
        """Whether no place is free."""
        return self.taken >= self.size

    def admits(self, client: str) -> bool:
        """Whether one more request of a client may wait."""
        own = self._taken[client] if self._shared else 0
        return fits_share(own, 1, self.size - self.taken - 1)

    def take(self, client: str) -> None:
        """Counts a request that waits from now on."""
        self._taken[client] += 1

    def give_back(self, client: str) -> None:
        """Counts a request that does not wait any more."""
        self._taken -= Counter([client])  # a client with none is forgotten
