"""Who runs: admission from the head of a queue by an exact forecast of pages, the lengths of spans,
and how far the device may run ahead of what the host knows.

The pages that a request needs at each of its passes are known before it starts, if its images keep
one token a pass, which is the least (the unconditional row leaves after the guidance interval; all
end after the last token). The head of the queue is admitted when the sum over all running requests
stays within the pool at every future pass. So a page is always there when it is needed: nothing is
ever preempted, and as every running request ends, the queue always moves on.

With lookahead a pass may keep more tokens, and how many is known on the device only. The device
never passes the limit that an image was granted, and a limit is granted beyond one token a pass
only where the forecast stays within the pool. Pure host code: no tensor, no device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from autoregressive.errors import Change, SettingName, UserError
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine_config import SchedulingPolicy
from autoregressive.serve.engine.forecast import page_forecast, page_profile
from autoregressive.serve.engine.page_pool import PagePool
from autoregressive.serve.engine.request import (
    ImageState,
    Request,
    RequestQueue,
    RequestState,
    RowState,
)

# Quarters of what a span could keep at most, which it is granted if the pool allows.
_QUARTERS = (4, 2, 1)
# Of the passes that an image is expected to need still, what is planned at once. With less, spans
# become short near the end of an image, and the host is slower than a GPU.
_PLANNED_SHARE = 2 / 3


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
        # [k]: pages that the running requests hold at the k-th pass from now, if each keeps one
        # token a pass
        self.forecast: NDArray[np.int64] = np.zeros(limits.tokens, dtype=np.int64)
        self.free_slots = list(range(limits.num_slots - 1, -1, -1))
        self._changed = False

    @property
    def images(self) -> list[ImageState]:
        """The images of the batch, in order of admission."""
        return [image for request in self.running for image in request.images if image.rows]

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

    def plan_span(self, limit: int, window: int = 1, pace: float | None = None) -> int:
        """Passes until the next event (an image or an unconditional row ends), at most `limit`.
        Returns 0 if nothing runs.

        Images that run ahead end sooner than the host knows, and passes behind an end are wasted.
        So at most a share of the passes is planned that an image is expected to need still.

        Args:
            window: positions of an image that a pass computes.
            pace: tokens that a pass is expected to keep; None: all of them.
        """
        images = self.images
        if not images:
            return 0
        first_event = min(row.end - image.position for image in images for row in image.rows)
        most_ahead = max(image.limit for image in images)
        if window == 1:
            return min(limit, first_event, max(1, self.limits.tokens - most_ahead))
        pace = window if pace is None else pace
        # where an image is expected between the least and the most that its position may be
        share = (pace - 1) / (window - 1)
        expected = [(1 - share) * image.position + share * image.limit for image in images]
        passes_left = (self.limits.tokens - max(expected)) / pace
        return min(limit, first_event, max(1, ceil(_PLANNED_SHARE * passes_left)))

    def allocate(self, passes: int, window: int = 1) -> None:
        """Grants every image its limit for the next `passes` passes, and takes the pages that its
        rows need up to there.

        A window's worth of positions a pass is granted beyond the limit so far, if the forecast
        then stays within the pool, or else half or a quarter of them. One token a pass is granted
        always, because its pages are in the forecast: where no row leaves before the last pass of
        the span, no row holds more pages at a pass of the span than at the last one. There an image
        at position `l` holds pages up to `max(limit, l + passes)`, which is its new limit.
        """
        images = self.images
        positions = [image.position for image in images]
        least = [max(image.limit, image.position + passes) for image in images]
        limits = least
        for quarters in _QUARTERS if window > 1 else ():
            ahead = [image.limit + window * passes * quarters // 4 for image in images]
            wished = [min(self.limits.tokens, max(pair)) for pair in zip(ahead, least, strict=True)]
            if wished == least:
                break
            forecast = self._forecast(images, positions, wished)
            if self._is_as_good(forecast, self.forecast):
                limits, self.forecast = wished, forecast
                break
        for image, limit in zip(images, limits, strict=True):
            self._set_limit(image, limit)
        used = self.pool.used_pages
        assert used == self.forecast[passes - 1], "the forecast is not what is used"

    def advance(self, passes: int) -> list[Request]:
        """Notes that the span has been given to the device, and frees the pages of what ended with
        it.

        The device may not have run it yet. Its pages may be dealt out again all the same, because
        spans run in order on one stream, and the next owner writes them in a later span.

        Returns:
            The requests whose images are complete; their slots stay taken until `release_slots`.
        """
        self.forecast[:-passes] = self.forecast[passes:]
        self.forecast[-passes:] = 0
        for image in self.images:
            image.position += passes
            assert image.position <= image.limit
        return self._drop_ended_rows()

    def learn(self, bounds: Mapping[ImageState, tuple[int, int]]) -> list[Request]:
        """Takes over what the device has told of positions.

        Limits come down, and images that are complete leave. Other images are noted to be further
        on only if the forecast from there fits the pool: an image that is ahead of others may need
        its pages before others have left theirs. Where it does not fit, the old positions stay.
        They are still true, and limits keep the device from pages that it has not.

        Args:
            bounds: of running images: the least and the most that the position may be, after all
                spans that the device was given.

        Returns:
            As `advance`.
        """
        images, tokens = self.images, self.limits.tokens
        now = [bounds.get(image, (image.position, image.limit)) for image in images]
        limits = [most for _, most in now]
        positions = [least for least, _ in now]
        held_back = [
            least if least == tokens else image.position
            for image, (least, _) in zip(images, now, strict=True)
        ]
        forecast = self._forecast(images, positions, limits)
        held_back_forecast = self._forecast(images, held_back, limits)
        if not self._is_as_good(forecast, held_back_forecast):
            positions, forecast = held_back, held_back_forecast
        for image, position, limit in zip(images, positions, limits, strict=True):
            assert image.position <= position <= limit <= image.limit, "the device goes astray"
            image.position = position
            self._set_limit(image, limit)
        self.forecast = forecast
        return self._drop_ended_rows()

    def cancel(self, request: Request) -> bool:
        """Takes a request out of the queue or the batch and frees all it holds.

        Returns:
            False if it is in neither: it has ended, or all its passes have been given to the
            device.
        """
        if self.waiting.remove_request(request):
            return True
        if request not in self.running:
            return False
        # As in `advance`: a span in flight may still write these slots and pages, but before
        # whatever gets them next.
        self._remove(request)
        self.release_slots(request.slots)
        images = self.images
        self.forecast = self._forecast(
            images, [image.position for image in images], [image.limit for image in images]
        )
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
        assert len(rows) <= limits.max_rows, "more rows than max_rows"
        slots = [slot for request in self.running for slot in request.slots]
        assert len(set(slots)) == len(slots), "two images share a slot"
        assert not set(slots) & set(self.free_slots), "a running image's slot is free"
        expected = np.zeros(limits.tokens, dtype=np.int64)
        for image in self.images:
            ends = {limits.tokens, image.params.guided_steps(limits.tokens)}
            both = sorted((end for end in ends if end > image.position), reverse=True)
            if image.params.guided_steps(limits.tokens) == limits.tokens:
                both *= 2
            assert [row.end for row in image.rows] == both, "a row has left too early or too late"
            assert image.position <= image.limit <= limits.tokens
            at = image.position + np.arange(limits.tokens)
            for row in image.rows:
                assert len(row.pages) == self._pages(image.limit, row), (
                    "a row has pages too many or too few"
                )
                needed = np.minimum(np.maximum(image.limit, at + 1), row.end)
                expected += np.where(at < row.end, -(-needed // limits.page_size), 0)
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
        params, tokens, images = request.params, self.limits.tokens, []
        for index in range(request.first_image, request.first_image + params.n):
            slot = self.free_slots.pop()
            rows = [RowState(request.class_label, slot, tokens)]
            if params.guided:
                rows.append(RowState(self.limits.num_classes, slot, params.guided_steps(tokens)))
            images.append(ImageState(params, index, slot, rows))
        request.images = images
        self.running.append(request)
        request.state = RequestState.RUNNING
        self._changed = True

    def _forecast(
        self, images: Sequence[ImageState], positions: Sequence[int], limits: Sequence[int]
    ) -> NDArray[np.int64]:
        return page_forecast(
            images, self.limits.tokens, self.limits.page_size, positions=positions, limits=limits
        )

    def _is_as_good(self, forecast: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
        """Whether a forecast stays within the pool, and lets the head of the queue start as early
        as another one that does.
        """
        if forecast.max() > self.limits.num_pages:
            return False
        if not self.waiting:
            return True
        params = self.waiting.peek_request().params
        profile = page_profile(params, self.limits.tokens, self.limits.page_size)
        return self._earliest_start(forecast, profile) <= self._earliest_start(other, profile)

    def _earliest_start(self, forecast: NDArray[np.int64], profile: NDArray[np.int64]) -> int:
        """Passes after which a request's pages fit beside a forecast."""
        tokens, most = self.limits.tokens, self.limits.num_pages
        if forecast.max() + profile.max() <= most:
            return 0
        shifted = sliding_window_view(np.append(forecast, np.zeros_like(forecast)), tokens)
        return int(((shifted + profile).max(axis=1) <= most).argmax())

    def _pages(self, limit: int, row: RowState) -> int:
        """How many pages a row has with its image's limit."""
        return -(-min(limit, row.end) // self.limits.page_size)

    def _set_limit(self, image: ImageState, limit: int) -> None:
        """Takes the pages that are missing below a limit, and frees those beyond."""
        image.limit = limit
        for row in image.rows:
            pages = self._pages(limit, row)
            if pages > len(row.pages):
                row.pages += self.pool.allocate(pages - len(row.pages))
                self._changed = True
            self.pool.free(row.pages[pages:])
            del row.pages[pages:]

    def _drop_ended_rows(self) -> list[Request]:
        """Frees the pages of rows whose end has come. Returns the requests that have no row any
        more, and takes them out.
        """
        for image in self.images:
            staying = [row for row in image.rows if image.position < row.end]
            if len(staying) < len(image.rows):
                for row in image.rows[len(staying) :]:
                    self.pool.free(row.pages)
                image.rows = staying
                self._changed = True
        complete = [request for request in self.running if not request.rows]
        for request in complete:
            self.running.remove(request)
        return complete

    def _remove(self, request: Request) -> None:
        self.running.remove(request)
        for image in request.images:
            for row in image.rows:
                self.pool.free(row.pages)
            image.rows = []
        self._changed = True
