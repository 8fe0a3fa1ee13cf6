"""What the ranks that share a model (tensor parallelism) send to each other from within kernels.

Each rank has inboxes, which the other ranks write. An inbox holds float32 numbers [ranks, size]:
from each rank as many as the exchange is of. A number is its own signal: an empty place holds bits
that no arithmetic of a GPU yields, and who reads a place waits for other bits and empties it. So
nothing is flushed, and a number is under way once.

Inboxes must be empty before the first exchange. Between two exchanges by the same inbox there must
be one by another inbox: a rank writes the second time when it has what the others sent in between,
and they send that after they have emptied the first.

Programs wait for those of the same number on the other ranks, so all ranks must launch the same
kernels in the same order. A GPU starts the programs of a kernel in the order of their numbers, and
each sends before it waits. So those of the lowest numbers always go on.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EMPTY = -1  # the bits of an empty place, as int32: a NaN
_EMPTY = gl.constexpr(EMPTY)
_NAN = gl.constexpr(0x7FFFFFFF)  # the bits of the NaN that a GPU's arithmetic yields
_BLOCK = 1024  # numbers of a program of `gather_parts`


@dataclass(frozen=True)
class Inboxes:
    """The inboxes of one kind of exchange, as one rank sees them."""

    addresses: tuple[int, ...]  # of each rank's inbox; multiples of 16
    own: int  # number of this rank

    @property
    def ranks(self) -> int:
        """Ranks that share the model."""
        return len(self.addresses)


@gluon.jit
def _inbox(inboxes, RANK: gl.constexpr):
    """The beginning of a rank's inbox."""
    return gl.multiple_of(inboxes[RANK].to(gl.pointer_type(gl.int32)), 16)


@gluon.jit
def send(numbers, inboxes, at, mask, size, OWN: gl.constexpr, RANKS: gl.constexpr):
    """Sends numbers to all other ranks.

    Args:
        inboxes: the addresses of RANKS inboxes.
        at: their places, of `size`.
    """
    bits = numbers.to(gl.int32, bitcast=True)
    bits = gl.where(bits == _EMPTY, _NAN, bits)
    for step in gl.static_range(1, RANKS):
        inbox = _inbox(inboxes, (OWN + step) % RANKS)
        gl.store(inbox + (OWN * size + at), bits, mask=mask)


@gluon.jit
def _any_empty(bits):
    empty = (bits == _EMPTY).to(gl.int32)
    return gl.sum(empty.reshape([empty.shape[0] * empty.shape[1]]), 0) > 0


@gluon.jit
def receive(inboxes, at, mask, size, OWN: gl.constexpr, RANK: gl.constexpr):
    """Waits for what another rank has sent, and empties the places.

    Where more threads than one hold a number, Triton counts and stores that of the first of them
    alone. The others may have looked too early.
    """
    place = _inbox(inboxes, OWN) + (RANK * size + at)
    bits = gl.load(place, mask=mask, other=0, volatile=True)
    while _any_empty(bits):
        bits = gl.load(place, mask=mask, other=0, volatile=True)
    gl.store(place, gl.full_like(bits, _EMPTY), mask=mask)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def sum_over_ranks(term, inboxes, at, mask, size, OWN: gl.constexpr, RANKS: gl.constexpr):
    """The sum of all ranks' terms [outputs, rows], in the order of ranks, on each of them."""
    send(term, inboxes, at, mask, size, OWN, RANKS)
    total = term if OWN == 0 else receive(inboxes, at, mask, size, OWN, 0)
    for rank in gl.static_range(1, RANKS):
        if rank == OWN:
            total += term
        else:
            total += receive(inboxes, at, mask, size, OWN, rank)
    return total


@gluon.jit(do_not_specialize=["rows"])
def _gather_parts_kernel(
    part,  # [rows, COLUMNS] float32
    inboxes,  # addresses
    out,  # [rows, RANKS, COLUMNS] float32
    rows,
    COLUMNS: gl.constexpr,
    BLOCK: gl.constexpr,
    OWN: gl.constexpr,
    RANKS: gl.constexpr,
):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, gl.num_warps()], [1, 0])
    row = gl.program_id(1)
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))[None, :]
    column = gl.program_id(0) * BLOCK + column
    mask = column < COLUMNS
    gdc_launch_dependents()
    gdc_wait()
    at = row.to(gl.int64) * COLUMNS + column
    numbers = gl.load(part + at, mask=mask)
    size = rows.to(gl.int64) * COLUMNS
    send(numbers, inboxes, at, mask, size, OWN, RANKS)
    target = out + row.to(gl.int64) * (RANKS * COLUMNS) + column
    for rank in gl.static_range(RANKS):
        if rank != OWN:
            numbers_of_rank = receive(inboxes, at, mask, size, OWN, rank)
            gl.store(target + rank * COLUMNS, numbers_of_rank, mask=mask)
        else:
            gl.store(target + rank * COLUMNS, numbers, mask=mask)


def gather_parts(part: Tensor, inboxes: Inboxes, out: Tensor) -> None:
    """Gathers all ranks' parts of rows, on each rank.

    Args:
        part: float32 [rows, columns], of this rank.
        out: float32 [rows, ranks * columns], written.
    """
    rows, columns = part.shape
    assert out.shape == (rows, inboxes.ranks * columns), out.shape
    assert part.dtype == out.dtype == torch.float32
    _gather_parts_kernel[(triton.cdiv(columns, _BLOCK), rows)](
        part,
        inboxes.addresses,
        out,
        rows,
        COLUMNS=columns,
        BLOCK=_BLOCK,
        OWN=inboxes.own,
        RANKS=inboxes.ranks,
        num_warps=4,
        launch_pdl=True,
    )
