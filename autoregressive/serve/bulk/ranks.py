"""The processes of a job: those that torchrun has started, or that this module has torch's elastic
launcher start, one for each GPU.
"""

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

    def first_alone(self, work: Callable[[], T]) -> T:
        """Does some work on rank 0, and then on the others too.

        Raises:
            OtherRankFailedError: on the others, if it has failed on rank 0, which says why.
        """
        if self.first:
            done = False
            try:
                result = work()
                done = True
            finally:
                self.broadcast(done)
            return result
        if not self.broadcast(False):
            raise OtherRankFailedError
        return work()

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
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()


def device_of_rank(device: str | None) -> str | None:
    """The device of this process.

    Args:
        device: that the user named.

    Raises:
        SettingError: all ranks would use one GPU, or there are too few.
    """
    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if device is None and torch.cuda.is_available():
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise UserError(f"this machine has {there} GPUs: start no more processes on it")
        return f"cuda:{local}"
    if device is not None and device.startswith("cuda"):
        raise SettingError("device", device, "each process takes a GPU of its own: leave it out")
    return device


def run_ranks(count: int, command: Sequence[str]) -> int:
    """Runs a command once for each rank on this machine. When one fails, the others are ended.

    Returns:
        The exit status: that of the rank that failed first, else 0.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks say themselves what is amiss, in one line.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
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
    return 0
