"""A request of the service as the engine's owner sees it: one request of the engine for each
image.
"""

from dataclasses import dataclass, field

from autoregressive.serve.engine.request import Request, RequestState
from autoregressive.serve.worker.messages import EngineRequest


@dataclass(eq=False)
class ParentRequest:
    """A request that has not ended, and what has been told of it.

    Its images are requests of their own, so that each begins as soon as there is room for it.
    """

    request: EngineRequest
    images: list[Request] = field(default_factory=list)
    begun: bool = False
    first_token: bool = False
    deadline: float | None = None  # moment at which it has run for too long
    told_at: float = 0.0  # moment of the last `Progress`
    previewed: dict[Request, int] = field(default_factory=dict)  # rows of each last preview
    left: int = 0  # images whose result has not been sent
    failure: tuple[str, str] | None = None  # outcome and message, once something went wrong

    @property
    def tokens(self) -> int:
        """Tokens given to the device so far."""
        return sum(image.steps for image in self.images)

    @property
    def running(self) -> bool:
        """Whether an image of it has been admitted."""
        return any(image.state is not RequestState.WAITING for image in self.images)

    @property
    def held(self) -> bool:
        """Whether the engine still holds something for it."""
        return any(not image.ended for image in self.images)

    def rows_to_preview(self, image: Request, grid: int) -> int | None:
        """The most rows that are drawn and wanted, if they have not been sent."""
        drawn, sent = image.steps // grid, self.previewed.get(image, 0)
        wanted = [rows for rows in self.request.preview_rows if sent < rows <= drawn]
        return max(wanted) if wanted and drawn < grid else None
