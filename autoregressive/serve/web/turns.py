"""Turns of the event loop: what takes long waits for one of its own, so that whoever asks for
little is not behind all of it.
"""

import asyncio
from collections import deque


class Turns:
    """Lets one through at each turn of the event loop (two where a queue ends), in the order of
    asking. Used in one event loop.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False  # whether this turn is somebody's

    async def take(self) -> None:
        """Waits for a turn; at once, if nobody has this one."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._next)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else whoever waited has been cancelled
                turn.set_result(None)
                turn.get_loop().call_soon(self._next)
                return
        self._taken = False
