"""The dispatcher's end of the fronts: several processes that answer HTTP, one that says who is let in."""

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from typing import assert_never

from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.ending import Ending
from autoregressive.serve.web.errors import ApiError
from autoregressive.serve.web.front import FrontRecipe
from autoregressive.serve.web.front_messages import KINDS, Accepted, AskMetrics, Count, Finish, MetricsText, Refused, State, Up
from autoregressive.serve.web.jobs import Job, JobEvent
from autoregressive.serve.web.server import writing_seconds
from autoregressive.serve.worker.inbox import Inbox
from autoregressive.serve.worker.messages import Cancel, Ended, Submit
from autoregressive.serve.worker.outbox import Outbox

_TICK_SECONDS = 0.1
_LEAVE_SECONDS = 3.0  # for a front to end once its answers are read, or have had their time


class FrontLink:
    """One front's process, and the jobs that its clients have.

    Args:
        gone: called in the event loop when it has ended, whatever for.
    """

    def __init__(self, recipe: FrontRecipe, dispatcher: Dispatcher, gone: Callable[[], None]) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=recipe, args=(theirs,), name=f"front-{recipe.share.index}", daemon=True)
        self.process.start()
        theirs.close()
        self._dispatcher = dispatcher
        self._jobs: dict[int, Job] = {}  # by the front's numbers
        self.up = False  # whether it answers
        self._told: State | None = None
        self._outbox = Outbox(ours, "to a front")
        self._inbox = Inbox(ours, KINDS, self._take, gone)

    def tell(self, state: State) -> None:
        """Of what is the same for all fronts; its own jobs' places are added here."""
        waiting = {number: job for number, job in self._jobs.items() if job.order.watched and job.started_at is None}
        state = replace(state, waiting=tuple(waiting), ahead=tuple(self._dispatcher.ahead_of(job) for job in waiting.values()))
        if state != self._told:
            self._told = state
            self._outbox.put(state)

    def finish(self) -> None:
        """Tells it to end."""
        self._outbox.put(Finish())

    def _take(self, message: Up | Submit | Cancel | Count | AskMetrics) -> None:
        match message:
            case Up():
                self.up = True
            case Submit():
                self._submit(message)
            case Cancel(job=number):
                if (job := self._jobs.get(number)) is not None:
                    self._dispatcher.abandon(job)
            case Count(outcome=outcome):
                self._dispatcher.count(outcome)
            case AskMetrics(question=question):
                self._outbox.put(MetricsText(question, self._dispatcher.metrics.text()))
            case _:
                assert_never(message)

    def _submit(self, order: Submit) -> None:
        number = order.job
        try:
            job = self._dispatcher.admit(order, partial(self._forward, number))
        except ApiError as error:
            self._outbox.put(Refused(number, error.status, error.message, error.code, error.param, error.retry_after))
            return
        self._jobs[number] = job
        self._outbox.put(Accepted(number, self._dispatcher.ahead_of(job) if order.watched else 0))

    def _forward(self, number: int, event: JobEvent) -> None:
        self._outbox.put(replace(event, job=number))
        if isinstance(event, Ended):
            del self._jobs[number]


class Hub:
    """Runs the fronts until the service ends.

    Args:
        recipes: of the fronts.
    """

    def __init__(self, dispatcher: Dispatcher, ending: Ending, recipes: Sequence[FrontRecipe]) -> None:
        self._dispatcher, self._ending = dispatcher, ending
        self._front_lost = False
        self.failure: str | None = None  # how a front was lost before the end
        self._fronts = [FrontLink(recipe, dispatcher, self._lose_front) for recipe in recipes]

    @property
    def up(self) -> bool:
        """Whether all fronts answer."""
        return all(front.up for front in self._fronts)

    async def run(self) -> None:
        """Until the end is due, or a front is lost. All fronts have ended then."""
        while not self._ending.due(time.monotonic()) and not self._front_lost:
            self._tell_fronts()
            await asyncio.sleep(_TICK_SECONDS)
        self._tell_fronts()
        self.failure = "a process that answers HTTP has died" if self._front_lost else None
        await self._end_fronts()

    def _tell_fronts(self) -> None:
        dispatcher = self._dispatcher
        refusal: ApiError | None = None
        try:
            dispatcher.require_ready()
        except ApiError as error:
            refusal = error
        state = State(
            failure=dispatcher.failure,
            refusal=refusal.message if refusal is not None else None,
            refusal_retry_after=(refusal.retry_after or 0) if refusal is not None else 0,
            retry_after=dispatcher.retry_after(),
            waiting=(),
            ahead=(),
        )
        for front in self._fronts:
            front.tell(state)

    async def _end_fronts(self) -> None:
        """Lets those that answer write what is left to be read, unless told not to wait."""
        for front in self._fronts:
            if front.up:
                front.finish()
            else:
                front.process.kill()
        deadline = time.monotonic() + writing_seconds(self._dispatcher.patience.shutdown) + _LEAVE_SECONDS
        while any(front.process.is_alive() for front in self._fronts) and time.monotonic() < deadline and not self._ending.at_once:
            await asyncio.sleep(_TICK_SECONDS / 2)
        for front in self._fronts:
            front.process.kill()
            front.process.join()

    def _lose_front(self) -> None:
        self._front_lost = True
