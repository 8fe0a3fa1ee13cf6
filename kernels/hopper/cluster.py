"""Clusters of programs on Hopper: programs of one cluster add up what each has, through each
other's shared memory.

Triton starts clusters, but offers no sum across one; a few instructions do. Each of a cluster's
programs owns a part of a tile's rows: all send it their partial sums of these, and it adds them in
the order of the programs, so that the sum's order depends on shapes only.
"""

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

_UNASKED_SHARED_MEMORY = 48 * 1024  # bytes that every program may have
# numbers after each row, so that threads of a warp meet different banks of shared memory
_PADDING = gl.constexpr(4)


@gluon.jit
def open_exchange(OUTPUT_TILE: gl.constexpr, ROW_TILE: gl.constexpr):
    """Returns the address, in shared memory, of room for partial sums, and announces to the cluster
    that this program has it.
    """
    return gl.inline_asm_elementwise(
        _open_text(OUTPUT_TILE, ROW_TILE), "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@triton.constexpr_function
def _open_text(outputs: int, rows: int) -> str:
    """The instructions of `open_exchange`. Behind the room lies a barrier, which opens when all
    partial sums have come. The copies themselves count towards it.
    """
    barrier = f"[exchange+{_barrier_offset(outputs, rows)}]"
    return f"""
        {{
            .shared .align 1024 .b8 exchange[{_exchange_bytes(outputs, rows)}];
            .reg .pred first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first mbarrier.init.shared::cta.b64 {barrier}, 1;
            @first mbarrier.arrive.expect_tx.shared::cta.b64 _, {barrier}, {4 * outputs * rows};
            @first fence.mbarrier_init.release.cluster;
            barrier.cluster.arrive.relaxed.aligned;
            mov.u32 $0, exchange;
        }}
        """


@triton.constexpr_function
def _barrier_offset(outputs: int, rows: int) -> int:
    return -(-4 * rows * (outputs + _PADDING.value) // 8) * 8


@triton.constexpr_function
def _exchange_bytes(outputs: int, rows: int) -> int:
    # Whole KiB: what Triton lays out behind it must keep to its alignment.
    return -(-(4 * rows * (outputs + _PADDING.value) + 16) // 1024) * 1024


@gluon.jit
def meet():
    """Waits until every program of the cluster has opened its exchange."""
    gl.inline_asm_elementwise(
        "barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def cluster_sum(exchange, rank, partial, layout: gl.constexpr, RANKS: gl.constexpr):
    """The cluster's sum of [outputs, rows]. Returns the rows that the program owns: [outputs, rows
    / RANKS]. It may be called once, after `meet`.

    No two threads may hold the same element: each sends what it holds, and the receiver's barrier
    counts the bytes.
    """
    OUTPUT_TILE: gl.constexpr = partial.shape[0]
    ROW_TILE: gl.constexpr = partial.shape[1]
    OWNED_ROWS: gl.constexpr = ROW_TILE // RANKS
    STRIDE: gl.constexpr = OUTPUT_TILE + _PADDING
    source: gl.constexpr = partial.type.layout
    output = gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, source))[:, None]
    row = gl.arange(0, ROW_TILE, layout=gl.SliceLayout(0, source))[None, :]
    barrier = exchange + _barrier_offset(OUTPUT_TILE, ROW_TILE)
    _send(
        exchange + 4 * ((rank * OWNED_ROWS + row % OWNED_ROWS) * STRIDE + output),
        barrier,
        row // OWNED_ROWS,
        partial,
    )
    _wait(barrier)
    output = gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))[:, None]
    row = gl.arange(0, OWNED_ROWS, layout=gl.SliceLayout(0, layout))[None, :]
    at = exchange + 4 * (row * STRIDE + output)
    total = _received(at)
    for sender in gl.static_range(1, RANKS):
        total += _received(at + 4 * sender * OWNED_ROWS * STRIDE)
    return total


@gluon.jit
def _wait(barrier):
    """Waits until the barrier opens. Its scope is the default one, as in CUTLASS; the cluster's
    scope would cost one more instruction.
    """
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred open;
            again:
            mbarrier.try_wait.parity.shared::cta.b64 open, [$1], 0;
            @!open bra again;
            mov.u32 $0, 0;
        }
        """,
        "=r,r",
        [barrier],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _send(address, barrier, rank, value):
    """Writes to the same address of another program's shared memory, and tells its barrier."""
    gl.inline_asm_elementwise(
        """
        {
            .reg .b32 there, its_barrier;
            mapa.shared::cluster.u32 there, $1, $3;
            mapa.shared::cluster.u32 its_barrier, $2, $3;
            st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32
                [there], $4, [its_barrier];
            mov.u32 $0, 0;
        }
        """,
        "=r,r,r,r,f",
        [address, barrier, rank, value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _received(address):
    return gl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=gl.float32, is_pure=False, pack=1
    )


def exchange_bytes(outputs: int, rows: int, cluster: int) -> int:
    """Shared memory that `open_exchange` takes."""
    return 0 if cluster == 1 else _exchange_bytes(outputs, rows)


def launch_clustered(
    kernel: JITFunction, clusters: tuple[int, int], cluster: int, *arguments: Any, **named: Any
) -> None:
    """Launches `clusters` clusters of `cluster` programs. Along the first axis, a program's number
    counts all programs.

    Triton takes the size from `num_ctas`, with which it would also spread every tensor over the
    cluster. Here a program's tensors are its own, so the kernel is compiled without, and the launch
    told.
    """
    if cluster > 1:
        compiled = kernel.warmup(*arguments, grid=clusters, **named)
        warps, _, shared_memory = compiled.packed_metadata
        compiled.packed_metadata = (warps, cluster, shared_memory)
        # Triton asks for more than 48 KiB only if its own part, without the exchange, is more.
        if compiled.module is None:
            compiled.metadata = compiled.metadata._replace(
                shared=max(shared_memory, _UNASKED_SHARED_MEMORY + 1)
            )
    kernel[clusters](*arguments, **named)
