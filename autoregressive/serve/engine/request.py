"""What is asked of the engine and what becomes of it: sampling parameters, the request, and its
images and rows.

A request owns its rows: each of its `n` images has a conditional row and, under guidance, an
unconditional one. All of them start at the same step and are at the same position ever after.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral, Real

from torch import Tensor

from autoregressive.models.defaults import LARGEST_SCALE, LARGEST_TEMPERATURE


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are drawn. Names and meanings are those of the naive loop; ranges
    those of the commands.

    Raises:
        ValueError: a value out of range; the message names the parameter and what it allows.
    """

    cfg_scale: float = 4.0  # guidance; at 1 and below there is none, and no unconditional row
    cfg_interval: int = -1  # k >= 0 guides the first k + 2 tokens only; -1 guides all
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 2000  # 0, and any number from the size of the codebook on, keep all
    top_p: float = 1.0  # 1 keeps all
    seed: int = 0
    n: int = 1  # images of this request; image k draws with (seed, k)

    def __post_init__(self) -> None:
        for name in ("cfg_interval", "top_k", "seed", "n"):
            _require(
                isinstance(getattr(self, name), Integral),
                name,
                getattr(self, name),
                "a whole number",
            )
        for name in ("cfg_scale", "temperature", "top_p"):
            _require(isinstance(getattr(self, name), Real), name, getattr(self, name), "a number")
        _require(
            0 <= self.cfg_scale <= LARGEST_SCALE,
            "cfg_scale",
            self.cfg_scale,
            f"0 to {LARGEST_SCALE:g}",
        )
        _require(self.cfg_interval >= -1, "cfg_interval", self.cfg_interval, "-1 or more")
        finite = 0 <= self.temperature <= LARGEST_TEMPERATURE
        _require(finite, "temperature", self.temperature, f"0 (greedy) to {LARGEST_TEMPERATURE:g}")
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (all) to 2**31 - 1")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        _require(1 <= self.n < 2**31, "n", self.n, "1 or more")

    @property
    def guided(self) -> bool:
        """Whether an image starts with an unconditional row."""
        return self.cfg_scale > 1.0

    @property
    def rows(self) -> int:
        """Rows that the request starts with."""
        return self.n * (2 if self.guided else 1)

    def guided_steps(self, tokens: int) -> int:
        """How many of an image's `tokens` steps run the unconditional row."""
        if not self.guided:
            return 0
        return tokens if self.cfg_interval < 0 else min(tokens, self.cfg_interval + 2)


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


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} {value}: must be {allowed}")
