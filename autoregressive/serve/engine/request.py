"""What is asked of the engine and what becomes of it: sampling parameters, the request, and its
images and rows.

A request owns its rows: each of its `n` images has a conditional row and, under guidance, an
unconditional one. All of them start at the same step and are at the same position ever after.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from autoregressive.models.sampling import SamplingParams


class RequestState(StrEnum):
    """Where a request is on its way; the last three are ends."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False)
class Request:
    """One class label and how often to draw it. Made by `Engine.submit`; only the engine's thread
    changes it.

    `codes` is set when the state is finished, `error` (one line) and `cause` when it is failed; the
    state is set last, so that a thread that sees the end sees the result.
    """

    id: int
    class_label: int
    params: SamplingParams
    first_image: int = 0  # image k of the request draws with (seed, first_image + k)
    client: str = ""  # whose it is; for `FairRequestQueue`
    state: RequestState = RequestState.WAITING
    steps: int = 0  # given to the device so far, out of the tokens of an image
    codes: Tensor | None = None  # int32 [n, tokens] on the CPU
    error: str | None = None
    cause: BaseException | None = None  # of a failure: what was raised, or a `NonFiniteLogitsError`

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in (RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED)


@dataclass(eq=False)
class RowState:
    """What the host knows of one sequence of the batch."""

    label: int  # class, or num_classes for an unconditional row
    slot: int  # of the image that it draws
    position: int = 0  # of the token that the next step feeds
    # page k holds positions k * page_size and the next page_size - 1
    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class ImageState:
    """What the host knows of one image of the batch."""

    params: SamplingParams
    image_index: int  # the draws' key beside the seed
    slot: int  # row of the codes buffer
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
