"""Where the routes hand in what is to be drawn."""

from typing import Protocol

from autoregressive.serve.web.jobs import Job
from autoregressive.serve.worker.messages import Submit


class Desk(Protocol):
    """The dispatcher, or what stands for it in another process."""

    @property
    def unhealthy(self) -> str | None:
        """Why the service is not alive, as far as is known: one of its processes is lost, or does
        not respond; for clients.
        """

    def require_ready(self) -> None:
        """Raises the `ApiError` that says why nothing is accepted now."""

    async def accept(self, order: Submit) -> Job:
        """Lets a job in; its number and deadlines are filled in.

        Raises:
            ApiError: the service is not ready, the queue is full, or the client has its share of
                it.
        """

    def abandon(self, job: Job) -> None:
        """Nobody waits for it any more: its engine is told, unless it has ended."""

    def ahead_of(self, job: Job) -> int:
        """How many waiting jobs start before a waiting one: an estimate where clients take turns,
        half a second old at most.
        """

    def retry_after(self) -> int:
        """Seconds after which to try again: what a request takes these days."""

    def count(self, outcome: str) -> None:
        """A request for images or codes has been answered."""

    async def metrics_text(self) -> bytes:
        """For Prometheus.

        Raises:
            ApiError: the dispatcher's process does not respond.
        """
