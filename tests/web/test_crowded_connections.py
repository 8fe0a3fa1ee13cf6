"""When nearly all connections are busy: whose place a new one gets, and how long one
keeps its own.
"""

from collections.abc import Callable

import pytest
from test_service_connections import FakeConnection, clock, in_a_loop

from autoregressive.serve.web.connections import Connections, Phase

__all__ = ["clock"]  # a fixture


def test_one_whose_request_may_be_here_is_not_closed(clock: Callable[[float], None]) -> None:
    """Fails if a new connection is closed before the event loop has looked for its request, however
    long a busy loop takes to do so; or if one that has sent nothing stays beyond that."""

    def check() -> None:
        connections = Connections(2, 1000)
        new = FakeConnection()
        connections.move(FakeConnection(), Phase.ANSWER)
        connections.move(new, Phase.NEW)
        clock(5)
        assert not connections.has_room
        assert not connections.make_room()
        connections.move(new, Phase.IDLE)
        assert not connections.has_room  # its time as an idle one begins now
        clock(0.06)
        assert connections.make_room()
        assert new.closed

    in_a_loop(check)


@pytest.mark.parametrize(("busy", "crowded"), [(17, False), (18, True), (20, True)])
def test_answers_are_the_last_for_a_while_after_nearly_all_were_busy(
    clock: Callable[[float], None], busy: int, crowded: bool
) -> None:
    """Fails if clients that pipeline requests keep their places, because one of them that has gone
    makes room for a moment; if drawings are refused for as long; or if it lasts for ever."""

    def check() -> None:
        connections = Connections(20, 1000)
        clients = [FakeConnection() for _ in range(busy)]
        for client in clients:
            connections.move(client, Phase.ANSWER)
        assert connections.crowded == crowded
        for client in clients:
            connections.remove(client)
        assert connections.overload is None
        clock(9)
        assert connections.crowded == crowded
        clock(2)
        assert not connections.crowded

    in_a_loop(check)
