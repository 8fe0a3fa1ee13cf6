"""uvicorn around the service, ending as promised: accepted work first; told twice, at once; with status 1 if an engine is lost."""

import time
from types import FrameType

import uvicorn

from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.guards import MOST_HEADER_BYTES, App
from autoregressive.serve.web.http_protocol import PatientProtocol

_LAST_ANSWERS_SECONDS = 3.0  # after an engine is lost: for waiting clients to get their errors, and probes a 503
_WRITING_SECONDS = 10.0  # at least, for answers that are complete to be read, before the end
_KEEP_ALIVE_SECONDS = 75  # longer than proxies keep theirs, so that none sends a request into a connection that is being closed


class Server(uvicorn.Server):
    """Runs until a signal, or the loss of an engine. `status` is then the process's."""

    def __init__(self, app: App, dispatcher: Dispatcher) -> None:
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            timeout_graceful_shutdown=round(max(_WRITING_SECONDS, dispatcher.patience.shutdown)),
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        super().__init__(config)
        self.status = 0
        self._dispatcher = dispatcher
        self._lost_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends."""
        if not self._dispatcher.draining:
            self._dispatcher.drain()
            return
        self.status = 0 if self._dispatcher.idle else 1
        self.force_exit = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, asked ten times a second."""
        dispatcher, now = self._dispatcher, time.monotonic()
        if dispatcher.unable is not None:
            self.status = 2
            return True
        if dispatcher.failure is not None:
            self.status = 1
            self._lost_at = self._lost_at or now
            if now - self._lost_at > _LAST_ANSWERS_SECONDS:
                return True
        if dispatcher.draining and dispatcher.overdue(now):
            self.status = 1
            return True
        if dispatcher.draining and dispatcher.idle:
            return True
        return await super().on_tick(counter)


