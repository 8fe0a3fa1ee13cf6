"""Who runs: admission from the head of a queue by an exact forecast of pages, and the lengths of
spans.

The pages that a request holds at each of its steps are known before it starts (one token a row a
step; the unconditional row leaves after the guidance interval; all end after the last token). The
head of the queue is admitted when the sum over all running requests stays within the pool at every
future step. So a page is always there when it is needed: nothing is ever preempted, and as every
running request ends, the queue always moves on. Pure host code: no tensor, no device.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoregressive.errors import Change, SettingName, UserError
from autoregressive.serve.engine.page_pool import PagePool
from autoregressive.serve.engine.request import (
    ImageState,
    Request,
    RequestState,
    RowState,
    SamplingParams,
)
from autoregressive.serve.engine.request_queue import FCFSRequestQueue, RequestQueue


@dataclass(frozen=True)
class Limits:
    """The sizes that scheduling depends on."""

    tokens: int  # per image
    page_size: int  # tokens of a page
    max_rows: int
    num_pages: int
    # images that are running or whose codes are on their way to the host; at least max_rows
    num_slots: int
    num_classes: int  # the label of unconditional rows
    # what to do where a request needs more pages
    to_get_more_pages: tuple[str | Change, ...] = (Change("raise", "num_pages"),)


@dataclass(eq=False)
class RunningRequest:
    """A request with its images on the device. `position` is that of all its rows."""

    request: Request
    images: list[ImageState]
    guided_steps: int  # steps that run the unconditional rows
    position: int = 0

    @property
    def rows(self) -> list[RowState]:
        """All rows that are still in the batch."""
        return [row for image in self.images for row in image.rows]

    @property
    def slots(self) -> list[int]:
        """The slots of its images, in their order."""
        return [image.slot for image in self.images]


def page_profile(params: SamplingParams, tokens: int, page_size: int) -> NDArray[np.int64]:
    """Pages that a request holds at each of its steps: int64 [tokens]."""
    step = np.arange(tokens)
    rows = params.n * np.where(step < params.guided_steps(tokens), 2, 1)
    return rows * (step // page_size + 1)


class Scheduler:
    """The queue, the running requests, their pages and slots, and the forecast. Used by the
    engine's thread alone.

    Args:
        waiting: an empty queue, which says what starts next; by default first come, first served.
    """

    def __init__(self, limits: Limits, waiting: RequestQueue | None = None) -> None:
        assert limits.num_slots >= limits.max_rows
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.waiting: RequestQueue = FCFSRequestQueue() if waiting is None else waiting
        self.running: list[RunningRequest] = []  # in order of admission
        # [k]: pages held at the k-th step from now
        self._forecast: NDArray[np.int64] = np.zeros(limits.tokens, dtype=np.int64)
        self._free_slots = list(range(limits.num_slots - 1, -1, -1))
        self._changed = False

    @property
    def forecast(self) -> NDArray[np.int64]:
        """Pages that the running requests will hold at the next step and each one after: int64
        [tokens], a copy.
        """
        return self._forecast.copy()

    @property
    def free_slots(self) -> int:
        """How many slots no image holds."""
        return len(self._free_slots)

    @property
    def images(self) -> list[ImageState]:
        """The images of the batch, in order of admission."""
        return [image for running in self.running for image in running.images]

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return sum(len(image.rows) for running in self.running for image in running.images)

    def take_changed(self) -> bool:
        """Whether rows, images or pages have changed since the last call."""
        changed, self._changed = self._changed, False
        return changed

    def check_fits(self, params: SamplingParams) -> None:
        """Any thread may call it.

        Raises:
            UserError: such a request could never run, not even alone.
        """
        limits = self.limits
        fewer = [Change("lower", "n")] if params.n > 1 else []
        if params.rows > limits.max_rows:
            pairs = " (a guided image has two)" if params.guided else ""
            raise UserError(
                f"the request needs {params.rows} rows{pairs} and ",
                SettingName("max_num_seqs"),
                f" is {limits.max_rows}",
                remedies=[*fewer, Change("raise", "max_num_seqs")],
            )
        # the peak is either the last guided step or the last step of all
        guided = params.guided_steps(limits.tokens)
        peak = params.n * max(
            2 * -(-guided // limits.page_size), -(-limits.tokens // limits.page_size)
        )
        if peak > limits.num_pages:
            raise UserError(
                f"the request needs {peak} pages of {limits.page_size} tokens and the pool has "
                f"{limits.num_pages}",
                remedies=[*fewer, *limits.to_get_more_pages],
            )

    def add(self, request: Request) -> None:
        """Puts a request in the queue. It must have passed `check_fits`."""
        self.waiting.add_request(request)

    def admit(self) -> list[Request]:
        """Starts requests from the head of the queue while they fit; behind one that does not, all
        wait. Returns those started.
        """
        admitted = []
        while self.waiting:
            request = self.waiting.peek_request()
            profile = page_profile(request.params, self.limits.tokens, self.limits.page_size)
            if not self._fits_now(request.params, profile):
                break
            self._start(request)
            self._forecast += profile
            self.waiting.pop_request()
            admitted.append(request)
        return admitted

    def plan_span(self, limit: int) -> int:
        """Steps until the next event (an image or an unconditional row ends), at most `limit`; 0 if
        nothing runs.
        """
        steps = limit if self.running else 0
        for running in self.running:
            ends_guidance = running.position < running.guided_steps
            steps = min(
                steps,
                (running.guided_steps if ends_guidance else self.limits.tokens) - running.position,
            )
        return steps

    def allocate(self, steps: int) -> None:
        """Takes the pages that every row needs for the next `steps` steps.

        Between two events use only grows, so what a planned span holds is what the forecast says of
        its last step.
        """
        for running in self.running:
            pages_per_row = -(-(running.position + steps) // self.limits.page_size)
            for row in running.rows:
                missing = pages_per_row - len(row.pages)
                if missing > 0:
                    row.pages += self.pool.allocate(missing)
                    self._changed = True
        assert self.pool.used_pages == self._forecast[steps - 1], "the forecast is not what is used"

    def advance(self, steps: int) -> list[RunningRequest]:
        """Notes that the span has been given to the device, and frees the pages of what ended with
        it.

        The device may not have run it yet. Its pages may be dealt out again all the same: whoever
        gets them writes them in a later span, and spans run in order on one stream.

        Returns:
            The requests whose images are complete; their slots stay taken until `release_slots`.
        """
        self._forecast[:-steps] = self._forecast[steps:]
        self._forecast[-steps:] = 0
        ended = []
        for running in self.running:
            running.position += steps
            running.request.steps = running.position
            for row in running.rows:
                row.position = running.position
            if running.position == self.limits.tokens:
                ended.append(running)
            elif running.position == running.guided_steps:
                self._drop_unconditional_rows(running)
        for running in ended:
            self._remove(running)
        return ended

    def cancel(self, request: Request) -> bool:
        """Takes a request out of the queue or the batch and frees all it holds.

        Returns:
            False if it is in neither: it has ended, or all its steps have been given to the device.
        """
        if self.waiting.remove_request(request):
            return True
        for running in self.running:
            if running.request is request:
                # As in `advance`: a span in flight may still write these slots and pages, but
                # before whatever gets them next.
                self._remove(running)
                self.release_slots(running.slots)
                left = self.limits.tokens - running.position
                self._forecast[:left] -= page_profile(
                    request.params, self.limits.tokens, self.limits.page_size
                )[running.position :]
                return True
        return False

    def abandon(self) -> list[Request]:
        """Takes every running request out, in whatever state a span that could not be enqueued has
        left it; returns them.
        """
        abandoned = [running.request for running in self.running]
        if (
            abandoned
        ):  # the last one may have been interrupted between its start and its leaving the queue
            self.waiting.remove_request(abandoned[-1])
        for running in [*self.running]:
            self._remove(running)
            self.release_slots(running.slots)
        self._forecast[:] = 0
        return abandoned

    def release_slots(self, slots: list[int]) -> None:
        """Gives the slots of an ended request back."""
        assert not set(slots) & set(self._free_slots), "a slot is given back twice"
        self._free_slots += slots

    def audit(self) -> None:
        """Asserts that pages, rows, slots and the forecast agree with each other."""
        limits = self.limits
        self.pool.audit()
        rows = [row for running in self.running for row in running.rows]
        held = [page for row in rows for page in row.pages]
        assert len(set(held)) == len(held) == self.pool.used_pages, (
            "the rows' pages are not the used ones"
        )
        assert all(len(row.pages) == -(-row.position // limits.page_size) for row in rows), (
            "a row has pages too many or too few"
        )
        assert len(rows) <= limits.max_rows, "more rows than max_rows"
        slots = [slot for running in self.running for slot in running.slots]
        assert len(set(slots)) == len(slots), "two images share a slot"
        assert not set(slots) & set(self._free_slots), "a running image's slot is free"
        expected = np.zeros(limits.tokens, dtype=np.int64)
        for running in self.running:
            assert all(row.position == running.position for row in running.rows)
            assert (running.position < running.guided_steps) == (
                running.images[0].unconditional is not None
            )
            profile = page_profile(running.request.params, limits.tokens, limits.page_size)
            expected[: limits.tokens - running.position] += profile[running.position :]
        assert np.array_equal(expected, self._forecast), (
            "the forecast does not follow from what runs"
        )
        assert expected.max() <= limits.num_pages, "more is promised than there is"

    def _fits_now(self, params: SamplingParams, profile: NDArray[np.int64]) -> bool:
        rows_fit = self.num_rows + params.rows <= self.limits.max_rows
        slots_fit = params.n <= len(self._free_slots)
        return (
            rows_fit
            and slots_fit
            and bool((self._forecast + profile).max() <= self.limits.num_pages)
        )

    def _start(self, request: Request) -> None:
        params, images = request.params, []
        for index in range(request.first_image, request.first_image + params.n):
            slot = self._free_slots.pop()
            unconditional = RowState(self.limits.num_classes, slot) if params.guided else None
            images.append(
                ImageState(params, index, slot, RowState(request.class_label, slot), unconditional)
            )
        self.running.append(
            RunningRequest(request, images, params.guided_steps(self.limits.tokens))
        )
        request.state = RequestState.RUNNING
        self._changed = True

    def _drop_unconditional_rows(self, running: RunningRequest) -> None:
        for image in running.images:
            assert image.unconditional is not None
            self.pool.free(image.unconditional.pages)
            image.unconditional = None
        self._changed = True

    def _remove(self, running: RunningRequest) -> None:
        self.running.remove(running)
        for row in running.rows:
            self.pool.free(row.pages)
            row.pages = []
        self._changed = True
