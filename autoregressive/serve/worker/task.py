"""What the engine's owner knows of a job: its requests, one an image, and what has been
told of it.
"""

from dataclasses import dataclass, field

from autoregressive.serve.engine.request import Request, RequestState
from autoregressive.serve.worker.messages import Submit


@dataclass(eq=False)
class Task:
    """A job under way.

    Its images are requests of their own, so that each begins as soon as there is room for it.
    """

    order: Submit
    requests: list[Request] = field(default_factory=list)
    begun: bool = False
    first_token: bool = False
    deadline: float | None = None  # moment at which it has run for too long
    told_at: float = 0.0  # of the last `Drawn`
    previewed: dict[Request, int] = field(default_factory=dict)  # rows of the last preview
    left: int = 0  # images whose result has not been sent
    failure: tuple[str, str] | None = None  # outcome and message, once something went wrong

    @property
    def tokens(self) -> int:
        """Tokens given to the device so far."""
        return sum(request.steps for request in self.requests)

    @property
    def running(self) -> bool:
        """Whether an image of it has been admitted."""
        return any(request.state is not RequestState.WAITING for request in self.requests)

    @property
    def held(self) -> bool:
        """Whether the engine still holds something for it."""
        return any(not request.ended for request in self.requests)

    def rows_to_preview(self, request: Request, grid: int) -> int | None:
        """The most rows that are drawn and wanted, if they have not been sent."""
        drawn, sent = request.steps // grid, self.previewed.get(request, 0)
        wanted = [rows for rows in self.order.preview_rows if sent < rows <= drawn]
        return max(wanted) if wanted and drawn < grid else None
