"""Drawings that go on for a while when their reader has left, so that a page that is loaded again
finds them.
"""

import asyncio
import secrets
from dataclasses import dataclass

from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import RequestBroker
from autoregressive.serve.web.schema import StreamRequest
from autoregressive.serve.worker.messages import ServedRequest

# Of all drawings of a process that nobody reads. Those beyond it end when their reader leaves.
_MOST_BYTES = 64 * 2**20
_LEAVING_SECONDS = 2.0  # a page that is loaded again may be quicker than the end of its connection


@dataclass(eq=False)
class KeptDrawing:
    """A drawing that can be followed again by its id."""

    drawing_id: str
    served: ServedRequest
    body: StreamRequest
    read: bool = True  # somebody reads its events
    told: bool = False  # its reader was told its id, without which nobody can follow or end it
    expiry: asyncio.TimerHandle | None = None

    @property
    def bytes(self) -> int:
        """Bytes that it holds, and that its images will take."""
        return self.served.held_bytes + self.served.promised_bytes


class KeptDrawings:
    """The drawings of one process that can be followed again. Used in one event loop."""

    def __init__(self, broker: RequestBroker) -> None:
        self._broker = broker
        self._drawings: dict[str, KeptDrawing] = {}

    def keep(self, served: ServedRequest, body: StreamRequest) -> KeptDrawing:
        """Notes a drawing, whose reader has just come."""
        kept = KeptDrawing(secrets.token_urlsafe(16), served, body)
        self._drawings[kept.drawing_id] = kept
        return kept

    async def follow(self, drawing_id: str, client: str) -> KeptDrawing:
        """The drawing, for another reader; waits for the last one to leave.

        Raises:
            ApiError: there is no such drawing of this client, or its reader stays.
        """
        kept = self._of(drawing_id, client)
        until = asyncio.get_running_loop().time() + _LEAVING_SECONDS
        while kept.read and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        if kept.read or drawing_id not in self._drawings:
            raise _not_found()
        kept.read = True
        if kept.expiry is not None:
            kept.expiry.cancel()
        return kept

    def leave(self, kept: KeptDrawing) -> None:
        """Its reader has left: it goes on for the seconds that were asked for, if there is room."""
        kept.read, served = False, kept.served
        nothing_left = served.ended is not None and not served.has_news
        held = sum(one.bytes for one in self._drawings.values() if not one.read)
        seconds = kept.body.keep_seconds or 0
        wanted = seconds > 0 and kept.told
        if nothing_left or served.abandoned or held > _MOST_BYTES or not wanted:
            self._end(kept)
        else:
            kept.expiry = asyncio.get_running_loop().call_later(seconds, self._end, kept)

    def cancel(self, drawing_id: str, client: str) -> None:
        """Ends a drawing.

        Raises:
            ApiError: there is no such drawing of this client.
        """
        self._end(self._of(drawing_id, client))

    def _end(self, kept: KeptDrawing) -> None:
        if kept.expiry is not None:
            kept.expiry.cancel()
        self._drawings.pop(kept.drawing_id, None)
        self._broker.abandon(kept.served)

    def _of(self, drawing_id: str, client: str) -> KeptDrawing:
        kept = self._drawings.get(drawing_id)
        if kept is None or kept.served.request.client != client:
            raise _not_found()
        return kept


def _not_found() -> ApiError:
    return ApiError(404, "there is no such drawing, or not any more", "not_found")
