"""How the ranks of one model (tensor parallelism) exchange what each has computed: the terms of the
sums that enter the residual stream, and the parts of the logits.

Nothing is added up on the way in an order of its own: terms are added in the order of ranks, on
every rank. So all ranks hold the same bits, draw the same tokens, and need not tell each other
which. Every rank makes the same calls in the same order.
"""

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import combinations
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    _register_process_group,
    _resolve_process_group,
    _SymmetricMemory,
)
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.distributed_c10d import GroupName
from typing_extensions import override

from autoregressive.models.ranks import Rank
from kernels.hopper.peers import EMPTY, Inboxes

ExchangeKind = Literal["host", "nccl", "peer"]
# A rank that does not come for so long hangs, and all others fail.
_PATIENCE = timedelta(seconds=300)
TERMS = "terms"  # the part of shared memory for `collect` and `gather`
_PEERS = GroupName("llamagen ranks")  # by which torch's operations find the group
_LOOPBACK = "127.0.0.1"  # ranks are processes of one host


class Exchange(ABC):
    """The calls of one rank. Tensors are contiguous and of the same shapes on all ranks. A CUDA
    graph can hold the calls of all kinds but "host".

    Attributes:
        reaches_memory: whether kernels reach the other ranks' memory.
        inboxes: by which kernels exchange numbers then, by the names that `open` was given.
    """

    reaches_memory = False
    inboxes: Mapping[str, Inboxes] = MappingProxyType({})

    @abstractmethod
    def gather(self, own: Tensor, parts: Tensor) -> None:
        """Writes what each rank has, in the order of ranks.

        Args:
            own: of this rank.
            parts: [ranks, *own.shape]
        """

    def open(self, shared: Mapping[str, int]) -> None:  # noqa: B027 (as below)
        """Takes the memory that ranks reach, on all of them together. It comes before all else.

        Args:
            shared: float32 numbers of each part, by name.
        """

    def close(self) -> None:  # noqa: B027 (most need not do anything)
        """Ends the exchange, whatever the other ranks do."""

    def collect(self, own: Tensor, terms: Tensor) -> Tensor:
        """Collects the terms of a sum over all ranks.

        Args:
            own: float32, this rank's term.
            terms: [ranks, *own.shape], memory for the result.

        Returns:
            The first lines of `terms`. Added up in their order, they are the sum in the order of
            ranks.
        """
        self.gather(own, terms)
        return terms


class HostExchange(Exchange):
    """Goes through the host's memory, by gloo: for CPUs, and for ranks that share a GPU."""

    def __init__(self, store: dist.Store, rank: Rank) -> None:
        gloo: Any = dist.ProcessGroupGloo  # torch's stub does not know its options
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=_LOOPBACK)]
        options._timeout = _PATIENCE
        backend = gloo(store, rank.number, rank.count, options)
        self._group = _group(store, rank, "GLOO", torch.device("cpu"), backend)

    @override
    def gather(self, own: Tensor, parts: Tensor) -> None:
        if own.device.type == "cpu":
            self._group._allgather_base(parts.view(-1), own.view(-1)).wait()
            return
        here = own.cpu()
        gathered = here.new_empty(parts.shape)
        self._group._allgather_base(gathered.view(-1), here.view(-1)).wait()
        parts.copy_(gathered)


class NcclExchange(Exchange):
    """Goes by NCCL: for GPUs that cannot reach each other's memory."""

    def __init__(self, store: dist.Store, rank: Rank, device: torch.device) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _PATIENCE
        backend = dist.ProcessGroupNCCL(store, rank.number, rank.count, options)
        backend.eager_connect_single_device(device)
        self._backend = backend
        self._group = _group(store, rank, "NCCL", device, backend)

    @override
    def gather(self, own: Tensor, parts: Tensor) -> None:
        self._group._allgather_base(parts.view(-1), own.view(-1)).wait()

    @override
    def close(self) -> None:
        self._backend.abort()  # NCCL's own end waits for the other ranks, which may have died


class PeerExchange(Exchange):
    """Goes through memory that all GPUs reach: torch's symmetric memory, without NVLink's
    multicast.

    Hopper's products have inboxes there (kernels/hopper/peers.py). For other layers torch's
    one-shot kernel reads the terms of all ranks. It tells the other ranks that its term is there,
    waits for theirs, adds in the order of ranks, and tells them again when it has read, so that the
    memory can be written anew.
    """

    reaches_memory = True

    def __init__(self, store: dist.Store, rank: Rank, device: torch.device) -> None:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._device = device
        # torch asks the group for its ranks and its store alone.
        self._group = dist.ProcessGroup(store, rank.number, rank.count)
        _register_process_group(_PEERS, self._group)
        _SymmetricMemory.set_group_info(_PEERS, rank.number, rank.count, store)
        self._rank = rank
        self._shared: dict[str, tuple[Tensor, _SymmetricMemory]] = {}

    @override
    def open(self, shared: Mapping[str, int]) -> None:
        inboxes = {}
        for name, count in shared.items():
            numbers = symmetric_memory.empty(count, dtype=torch.float32, device=self._device)
            numbers.view(torch.int32).fill_(EMPTY)
            torch.cuda.synchronize(self._device)
            memory = symmetric_memory.rendezvous(numbers, _PEERS)
            assert memory.buffer_ptrs[self._rank.number] == numbers.data_ptr()
            self._shared[name] = numbers, memory
            inboxes[name] = Inboxes(tuple(memory.buffer_ptrs), self._rank.number)
        self.inboxes = inboxes

    @override
    def collect(self, own: Tensor, terms: Tensor) -> Tensor:
        shared, _ = self._shared_like(own)
        # torch's `one_shot_all_reduce_copy_out` would copy, too, but tells the other ranks that a
        # block's numbers are there before all warps of the block have written theirs.
        shared.copy_(own)
        total = terms[:1]
        torch.ops.symm_mem.one_shot_all_reduce_out(shared, "sum", _PEERS, total.view(own.shape))
        return total

    @override
    def gather(self, own: Tensor, parts: Tensor) -> None:
        shared, memory = self._shared_like(own)
        shared.copy_(own)
        memory.barrier(channel=0)  # all have written
        for rank, part in enumerate(parts):
            part.copy_(memory.get_buffer(rank, own.shape, own.dtype))
        memory.barrier(channel=1)  # all have read

    def _shared_like(self, own: Tensor) -> tuple[Tensor, _SymmetricMemory]:
        """Memory of the tensor's shape that the other ranks can read."""
        assert own.dtype == torch.float32
        buffer, memory = self._shared[TERMS]
        return buffer[: own.numel()].view(own.shape), memory


def choose_exchange(devices: Sequence[torch.device]) -> ExchangeKind:
    """How ranks on these devices exchange tensors."""
    if devices[0].type == "cpu" or len(set(devices)) < len(devices):
        return "host"
    pairs = combinations(devices, 2)
    reachable = all(
        torch.cuda.can_device_access_peer(*pair) and torch.cuda.can_device_access_peer(*pair[::-1])
        for pair in pairs
    )
    return "peer" if reachable and not _peers_have_met() else "nccl"


def _peers_have_met() -> bool:
    """Whether this process has shared memory with peers before. torch numbers the rendezvous of a
    process, and those of new ranks would have other numbers.
    """
    try:
        _resolve_process_group(_PEERS)
    except RuntimeError as error:
        return "destroyed" in str(error)
    return True


def open_store(count: int) -> dist.TCPStore:
    """Opens the store by which so many ranks find each other, for rank 0. Its port is this
    machine's alone.
    """
    listener = socket.create_server((_LOOPBACK, 0))
    return dist.TCPStore(
        _LOOPBACK,
        listener.getsockname()[1],
        count,
        is_master=True,
        timeout=_PATIENCE,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_store(port: int, count: int) -> dist.TCPStore:
    """The store of rank 0, for another rank."""
    return dist.TCPStore(_LOOPBACK, port, count, is_master=False, timeout=_PATIENCE)


def connect(kind: ExchangeKind, store: dist.Store, rank: Rank, device: torch.device) -> Exchange:
    """Joins the other ranks; waits for them.

    Args:
        store: by which they find each other.

    Raises:
        RuntimeError: another rank does not come.
    """
    if kind == "peer":
        return PeerExchange(store, rank, device)
    return NcclExchange(store, rank, device) if kind == "nccl" else HostExchange(store, rank)


def _group(
    store: dist.Store, rank: Rank, kind: str, device: torch.device, backend: Any
) -> dist.ProcessGroup:
    """A group of its own, beside the one that a program may have for itself."""
    backend._set_sequence_number_for_group()
    group: Any = dist.ProcessGroup(store, rank.number, rank.count)
    type_of_backend = getattr(dist.ProcessGroup.BackendType, kind)
    group._set_default_backend(type_of_backend)
    group._register_backend(device, type_of_backend, backend)
    return group
