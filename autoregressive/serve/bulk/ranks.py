"""The processes of a job: those that torchrun has started, or that this module has torch's elastic
launcher start, one for each GPU.
"""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from autoregressive.errors import SettingError, UserError

T = TypeVar("T")

# Ranks wait for each other at the beginning and at the end, and some may be much slower.
_PATIENCE = timedelta(days=7)


class OtherRankFailedError(Exception):
    """Rank 0 has failed before the work, and has said why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job.

    Attributes:
        rank: 0 to count - 1; rank 0 alone talks, and writes what belongs to all.
        local: the number on this machine, which is that of the GPU.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """What rank 0 gives, on all ranks.

        Raises:
            UserError: another rank has gone. Where a launcher sees that, it ends this one, too.
        """
        if self.count == 1:
            return value
        held = [value]
        with _others_there():
            dist.broadcast_object_list(held, src=0)
        return held[0]

    def only_first(self, work: Callable[[], T]) -> T | None:
        """Does some work on rank 0. Returns what it gives there, and None on the others.

        Raises:
            OtherRankFailedError: on the others, if it has failed on rank 0, which says why.
        """
        result, done = None, False
        try:
            if self.first:
                result, done = work(), True
        finally:
            done = self.broadcast(done)
        if not done:
            raise OtherRankFailedError
        return result

    def first_then_others(self, work: Callable[[], T]) -> T:
        """Does some work on rank 0, and then on the others too.

        Raises:
            OtherRankFailedError: as `only_first`.
        """
        result = self.only_first(work)
        return work() if result is None else result

    def device(self, named: str | None, gpus: int = 1) -> str | None:
        """The device of this rank, or the first of them.

        Args:
            named: by the user.
            gpus: that the model of each rank is shared out to.

        Raises:
            UserError: all ranks would use one GPU, or there are too few.
        """
        if self.count == 1:
            return named
        if named is None and torch.cuda.is_available():
            there = torch.cuda.device_count()
            if (self.local + 1) * gpus > there:
                each = f", and each process takes {gpus}" if gpus > 1 else ""
                told = f"this machine has {there} GPUs{each}: start no more processes on it"
                raise UserError(told)
            return f"cuda:{self.local * gpus}"
        if named is not None and named.startswith("cuda"):
            raise SettingError("device", named, "each process takes a GPU of its own: leave it out")
        return named

    def wait_for_end(self) -> None:
        """Waits until another rank has gone."""
        with contextlib.suppress(UserError):
            self.wait()

    def wait(self) -> None:
        """Waits for all ranks. Raises `UserError` as `broadcast`."""
        if self.count > 1:
            with _others_there():
                dist.barrier()


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "another process of the job has gone: run the command again, and it goes on"
        ) from error


def under_torchrun() -> bool:
    """Whether a launcher has started this process as one of a job's."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks of the job that this process was started for; one alone without a launcher."""
    if not under_torchrun():
        yield Ranks()
        return
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot join the other processes of the job: {reason}") from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    finally:
        dist.destroy_process_group()


def run_ranks(count: int, command: Sequence[str]) -> int:
    """Runs a command once for each rank on this machine. When one fails, the others are ended.

    Returns:
        The exit status: that of the rank that failed first, else 0.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the ranks say themselves what is amiss, in one line
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, entrypoint=sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            ended = signal.Signals(-failure.exitcode).name
            raise UserError(
                f"rank {rank} was ended by {ended}: run the command again, and it goes on"
            ) from None
        return int(failure.exitcode)
    except SignalException as error:  # the ranks have had the signal, too
        return 128 + error.sigval
    return 0
