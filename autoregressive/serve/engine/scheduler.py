"""Who runs: admission from the head of a queue by an exact forecast of pages, and the lengths of
spans.

The pages that a request holds at each of its steps are known before it starts (one token a row a
step; the unconditional row leaves after the guidance interval; all end after the last token). The
head of the queue is admitted when the sum over all running requests stays within the pool at every
future step. So a page is always there when it is needed: nothing is ever preempted, and as every
running request ends, the queue always moves on. Pure host code: no tensor, no device.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoregressive.errors import Change, SettingName, UserError
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine_config import SchedulingPolicy
from autoregressive.serve.engine.request import (
    ImageState,
    Request,
    RequestQueue,
    RequestState,
    RowState,
)


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


def page_profile(params: SamplingParams, tokens: int, page_size: int) -> NDArray[np.int64]:
    """Pages that a request holds at each of its steps: int64 [tokens]."""
    step = np.arange(tokens)
    rows = params.n * np.where(step < params.guided_steps(tokens), 2, 1)
    return rows * (step // page_size + 1)


class Scheduler:
    """Holds the queue, the running requests, their pages and slots, and the forecast. Only the
    engine's thread uses it.

    Args:
        policy: the order in which requests start; by default first come, first served.
    """

    def __init__(self, limits: Limits, policy: SchedulingPolicy = "fcfs") -> None:
        assert limits.num_slots >= limits.max_rows
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.waiting = RequestQueue(policy, limits.tokens)
        self.running: list[Request] = []  # in order of admission
        # [k]: pages that the running requests hold at the k-th step from now
        self.forecast: NDArray[np.int64] = np.zeros(limits.tokens, dtype=np.int64)
        self.free_slots = list(range(limits.num_slots - 1, -1, -1))
        self._changed = False

    @property
    def images(self) -> list[ImageState]:
        """The images of the batch, in order of admission."""
        return [image for request in self.running for image in request.images]

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return sum(len(request.rows) for request in self.running)

    def take_changed(self) -> bool:
        """Whether rows, images or pages have changed since the last call."""
        changed, self._changed = self._changed, False
        return changed

    def check_fits(self, params: SamplingParams) -> None:
        """Refuses a request that could never run. Any thread may call it.

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
        peak = int(page_profile(params, limits.tokens, limits.page_size).max())
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
        """Starts requests from the head of the queue while they fit. Behind one that does not, all
        wait. Returns those that have started.
        """
        admitted = []
        while self.waiting:
            request = self.waiting.peek_request()
            profile = page_profile(request.params, self.limits.tokens, self.limits.page_size)
            if not self._fits_now(request.params, profile):
                break
            self._start(request)
            self.forecast += profile
            self.waiting.pop_request()
            admitted.append(request)
        return admitted

    def plan_span(self, limit: int) -> int:
        """Steps until the next event (an image or an unconditional row ends), at most `limit`.
        Returns 0 if nothing runs.
        """
        steps = limit if self.running else 0
        for request in self.running:
            guided_steps = request.params.guided_steps(self.limits.tokens)
            event = guided_steps if request.steps < guided_steps else self.limits.tokens
            steps = min(steps, event - request.steps)
        return steps

    def allocate(self, steps: int) -> None:
        """Takes the pages that every row needs for the next `steps` steps.

        The pages in use only grow between two events (a row ends, or guidance does). So a span
        holds at most the pages that the forecast has for its last step.
        """
        for request in self.running:
            pages_per_row = -(-(request.steps + steps) // self.limits.page_size)
            for row in request.rows:
                missing = pages_per_row - len(row.pages)
                if missing > 0:
                    row.pages += self.pool.allocate(missing)
                    self._changed = True
        assert self.pool.used_pages == self.forecast[steps - 1], "the forecast is not what is used"

    def advance(self, steps: int) -> list[Request]:
        """Notes that the span has been given to the device, and frees the pages of what ended with
        it.

        The device may not have run it yet. Its pages may be dealt out again all the same, because
        spans run in order on one stream, and the next owner writes them in a later span.

        Returns:
            The requests whose images are complete; their slots stay taken until `release_slots`.
        """
        self.forecast[:-steps] = self.forecast[steps:]
        self.forecast[-steps:] = 0
        ended = []
        for request in self.running:
            request.steps += steps
            for row in request.rows:
                row.position = request.steps
            if request.steps == self.limits.tokens:
                ended.append(request)
            elif request.steps == request.params.guided_steps(self.limits.tokens):
                self._drop_unconditional_rows(request)
        for request in ended:
            self._remove(request)
        return ended

    def cancel(self, request: Request) -> bool:
        """Takes a request out of the queue or the batch and frees all it holds.

        Returns:
            False if it is in neither: it has ended, or all its steps have been given to the device.
        """
        if self.waiting.remove_request(request):
            return True
        if request not in self.running:
            return False
        # As in `advance`: a span in flight may still write these slots and pages, but before
        # whatever gets them next.
        self._remove(request)
        self.release_slots(request.slots)
        profile = page_profile(request.params, self.limits.tokens, self.limits.page_size)
        self.forecast[: self.limits.tokens - request.steps] -= profile[request.steps :]
        return True

    def abandon(self) -> list[Request]:
        """Takes every running request out and returns them. A span that could not be enqueued may
        have left them in any state.
        """
        abandoned = [*self.running]
        if abandoned:
            # the last one may have been interrupted between its start and its leaving the queue
            self.waiting.remove_request(abandoned[-1])
        for request in abandoned:
            self._remove(request)
            self.release_slots(request.slots)
        self.forecast[:] = 0
        return abandoned

    def release_slots(self, slots: list[int]) -> None:
        """Gives the slots of an ended request back."""
        assert not set(slots) & set(self.free_slots), "a slot is given back twice"
        self.free_slots += slots

    def audit(self) -> None:
        """Asserts that pages, rows, slots and the forecast agree with each other."""
        limits = self.limits
        self.pool.audit()
        rows = [row for request in self.running for row in request.rows]
        held = [page for row in rows for page in row.pages]
        assert len(set(held)) == len(held) == self.pool.used_pages, (
            "the rows' pages are not the used ones"
        )
        assert all(len(row.pages) == -(-row.position // limits.page_size) for row in rows), (
            "a row has pages too many or too few"
        )
        assert len(rows) <= limits.max_rows, "more rows than max_rows"
        slots = [slot for request in self.running for slot in request.slots]
        assert len(set(slots)) == len(slots), "two images share a slot"
        assert not set(slots) & set(self.free_slots), "a running image's slot is free"
        expected = np.zeros(limits.tokens, dtype=np.int64)
        for request in self.running:
            assert all(row.position == request.steps for row in request.rows)
            assert (request.steps < request.params.guided_steps(limits.tokens)) == (
                request.images[0].unconditional is not None
            )
            profile = page_profile(request.params, limits.tokens, limits.page_size)
            expected[: limits.tokens - request.steps] += profile[request.steps :]
        assert np.array_equal(expected, self.forecast), (
            "the forecast does not follow from what runs"
        )
        assert expected.max() <= limits.num_pages, "more is promised than there is"

    def _fits_now(self, params: SamplingParams, profile: NDArray[np.int64]) -> bool:
        rows_fit = self.num_rows + params.rows <= self.limits.max_rows
        slots_fit = params.n <= len(self.free_slots)
        return (
            rows_fit
            and slots_fit
            and bool((self.forecast + profile).max() <= self.limits.num_pages)
        )

    def _start(self, request: Request) -> None:
        params, images = request.params, []
        for index in range(request.first_image, request.first_image + params.n):
            slot = self.free_slots.pop()
            unconditional = RowState(self.limits.num_classes, slot) if params.guided else None
            conditional = RowState(request.class_label, slot)
            images.append(ImageState(params, index, slot, conditional, unconditional))
        request.images = images
        self.running.append(request)
        request.state = RequestState.RUNNING
        self._changed = True

    def _drop_unconditional_rows(self, request: Request) -> None:
        for image in request.images:
            assert image.unconditional is not None
            self.pool.free(image.unconditional.pages)
            image.unconditional = None
        self._changed = True

    def _remove(self, request: Request) -> None:
        self.running.remove(request)
        for row in request.rows:
            self.pool.free(row.pages)
            row.pages = []
        self._changed = True


class PagePool:
    """Which pages of the KV cache are taken. The pool deals in page numbers; the memory belongs to
    the model runner.

    Every page is either free or used, never both: `free_pages + used_pages == num_pages` always.
    The pool is a stack of free page numbers, 0 to num_pages - 1. Those that were never taken are
    only counted.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._never_taken = 0  # this page and all above it
        self._returned: list[int] = []
        self._used: set[int] = set()

    @property
    def free_pages(self) -> int:
        """How many pages nobody holds."""
        return self.num_pages - len(self._used)

    @property
    def used_pages(self) -> int:
        """How many pages are held."""
        return len(self._used)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages. There must be as many; the forecast at admission ensures it."""
        assert 0 <= count <= self.free_pages, (
            f"{count} pages wanted, {self.free_pages} of {self.num_pages} free"
        )
        start = max(0, len(self._returned) - count)
        pages = self._returned[start:]
        del self._returned[start:]
        new = count - len(pages)
        pages += range(self._never_taken, self._never_taken + new)
        self._never_taken += new
        self._used.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Gives pages back to the pool, so that other rows can take them."""
        for page in pages:
            assert page in self._used, f"page {page} is given back, but nobody holds it"
            self._used.remove(page)
            self._returned.append(page)

    def audit(self) -> None:
        """Asserts that every page is free or used, and none twice."""
        returned = set(self._returned)
        assert len(returned) == len(self._returned), "a page is free twice"
        assert not returned & self._used, "a page is both free and used"
        assert len(returned) + len(self._used) == self._never_taken <= self.num_pages, (
            "a page is neither free nor used"
        )
