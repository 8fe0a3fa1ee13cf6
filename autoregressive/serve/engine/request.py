"""A request to the engine, with its images and their rows.

A request owns its rows: each of its `n` images has a conditional row and, under guidance, an
unconditional one. All of them start at the same step and are at the same position ever after.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from autoregressive.models.sampling import SamplingParams


class RequestState(StrEnum):
    """Where a request stands. The last three states are ends."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False)
class RowState:
    """What the host knows about one sequence of the batch."""

    label: int  # class, or num_classes for an unconditional row
    slot: int  # of the image that it draws
    position: int = 0  # of the token that the next step feeds
    # page k holds positions k * page_size and the next page_size - 1
    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class ImageState:
    """What the host knows about one image of the batch."""

    params: SamplingParams
    image_index: int  # the draws' key beside the seed
    slot: int  # line of the codes buffer
    conditional: RowState
    unconditional: RowState | None  # None without guidance, and after the guidance interval

    @property
    def rows(self) -> list[RowState]:
        """One row or two, the conditional one first."""
        return (
            [self.conditional]
            if self.unconditional is None
            else [self.conditional, self.unconditional]
        )


@dataclass(eq=False)
class Request:
    """One class label and how often to draw it. `Engine.submit` makes it, and only the engine's
    thread changes it.

    `codes` is set when the state is finished, `error` (one line) and `cause` when it is failed; the
    state is set last, so that a thread that sees the end sees the result.
    """

    id: int
    class_label: int
    params: SamplingParams
    first_image: int = 0  # image k of the request draws with (seed, first_image + k)
    client: str = ""  # whose it is; for `FairRequestQueue`
    state: RequestState = RequestState.WAITING
    # given to the device so far, out of the tokens of an image; the position of all its rows
    steps: int = 0
    # in the batch, or waiting for their codes to arrive; empty until the request starts
    images: list[ImageState] = field(default_factory=list, repr=False)
    codes: Tensor | None = None  # int32 [n, tokens] on the CPU
    error: str | None = None
    cause: BaseException | None = None  # of a failure: what was raised, or a `NonFiniteLogitsError`

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the request."""
        return self.state in (RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED)

    @property
    def rows(self) -> list[RowState]:
        """All rows that are still in the batch."""
        return [row for image in self.images for row in image.rows]

    @property
    def slots(self) -> list[int]:
        """The slots of its images, in their order."""
        return [image.slot for image in self.images]
