"""Clusters of programs on Hopper: programs of one cluster add up what each has, through each
other's shared memory.

Triton starts clusters, but offers no sum across one; a few instructions do. Each of a cluster's
programs owns a part of a tile. All send it their partial sums of that part, and it adds them in an
order that depends on shapes alone.
"""

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

# numbers after each row, so that threads of a warp meet different banks of shared memory
_PADDING = gl.constexpr(4)


@gluon.jit
def open_exchange(ROOM: gl.constexpr, EXPECTED: gl.constexpr):
    """Returns the address, in shared memory, of room for partial sums, and announces to the cluster
    that this program has it.

    Args:
        ROOM: bytes, a multiple of 16.
        EXPECTED: bytes of the sums that will come.
    """
    return gl.inline_asm_elementwise(
        _open_text(ROOM, EXPECTED), "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@triton.constexpr_function
def _open_text(room: int, expected: int) -> str:
    """The instructions of `open_exchange`. The room is the last of the program's shared memory, of
    which `launch_clustered` asks for as much more. Behind the partial sums lies a barrier, which
    opens when all of them have come. The copies themselves count towards it.
    """
    return f"""
        {{
            .reg .pred first;
            .reg .b32 number;
            mov.u32 number, %dynamic_smem_size;
            mov.u32 $0, global_smem;
            add.u32 $0, $0, number;
            sub.u32 $0, $0, {exchange_bytes(room)};
            mov.u32 number, %tid.x;
            setp.eq.u32 first, number, 0;
            @first mbarrier.init.shared::cta.b64 [$0+{room}], 1;
            @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0+{room}], {expected};
            @first fence.mbarrier_init.release.cluster;
            barrier.cluster.arrive.relaxed.aligned;
        }}
        """


@triton.constexpr_function
def exchange_bytes(room: int) -> int:
    """Shared memory that an exchange takes, its barrier included."""
    return room + 16


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


@triton.constexpr_function
def cluster_sum_room(outputs: int, rows: int) -> int:
    """Bytes of the room that `cluster_sum` takes."""
    return 4 * rows * (outputs + _PADDING.value)


@gluon.jit
def cluster_sum(room, rank, partial, layout: gl.constexpr, RANKS: gl.constexpr):
    """The cluster's sum of [outputs, rows] over 2 or 4 programs: that of the first two plus that of
    the others. Returns the rows that the program owns: [outputs, rows / RANKS]. It may be called
    once, after `meet`.

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
    barrier = room + cluster_sum_room(OUTPUT_TILE, ROW_TILE)
    _send(
        room + 4 * ((rank * OWNED_ROWS + row % OWNED_ROWS) * STRIDE + output),
        barrier,
        row // OWNED_ROWS,
        partial,
    )
    _wait(barrier)
    output = gl.arange(0, OUTPUT_TILE, layout=gl.SliceLayout(1, layout))[:, None]
    row = gl.arange(0, OWNED_ROWS, layout=gl.SliceLayout(0, layout))[None, :]
    at = room + 4 * (row * STRIDE + output)
    SENT: gl.constexpr = 4 * OWNED_ROWS * STRIDE
    total = _received(at) + _received(at + SENT)
    if RANKS == 4:
        total += _received(at + 2 * SENT) + _received(at + 3 * SENT)
    return total


@gluon.jit
def exchange(room, rank, sent):
    """Sends a tile [rows, columns] to the other program of a cluster of two, and returns the one
    that comes from there. It may be called once, after `meet`.

    The tile has the layout of a warp group's product. Each thread sends to the thread of its own
    number, four numbers at once: two neighbouring columns of two rows.
    """
    ROWS: gl.constexpr = sent.shape[0]
    COLUMNS: gl.constexpr = sent.shape[1]
    layout: gl.constexpr = sent.type.layout
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))[None, :]
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    address, _ = gl.broadcast(room + (column // 8 * (ROWS * 2) + thread) * 16, sent)
    barrier = room + 4 * ROWS * COLUMNS
    _send_four(address, barrier, 1 - rank, sent)
    _wait(barrier)
    return gl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
        "=f,=f,=f,=f,r,r,r,r",
        [address],
        dtype=gl.float32,
        is_pure=False,
        pack=4,
    )


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
def _send_four(address, barrier, rank, value):
    """As `_send`, for four numbers that lie beside each other at the first one's address."""
    gl.inline_asm_elementwise(
        """
        {
            .reg .b32 there, its_barrier;
            mapa.shared::cluster.u32 there, $4, $12;
            mapa.shared::cluster.u32 its_barrier, $8, $12;
            st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32
                [there], {$16, $17, $18, $19}, [its_barrier];
            mov.u32 $0, 0;
            mov.u32 $1, 0;
            mov.u32 $2, 0;
            mov.u32 $3, 0;
        }
        """,
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
        [address, barrier, rank, value],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _received(address):
    return gl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=gl.float32, is_pure=False, pack=1
    )


def launch_clustered(
    kernel: JITFunction,
    clusters: tuple[int, int],
    cluster: int,
    exchanged: int,
    *arguments: Any,
    **named: Any,
) -> None:
    """Launches `clusters` clusters of `cluster` programs. Along the first axis, a program's number
    counts all programs.

    Triton takes the size from `num_ctas`, with which it would also spread every tensor over the
    cluster. Here a program's tensors are its own, so the kernel is compiled without, and the launch
    told. It is also told of the exchange, which lies behind the memory that Triton lays out.

    Args:
        exchanged: bytes of the exchange, by `exchange_bytes`.
    """
    if cluster > 1:
        compiled = kernel.warmup(*arguments, grid=clusters, **named)
        if compiled.module is None:  # not yet told
            warps, _, shared_memory = compiled.packed_metadata
            shared_memory = -(-shared_memory // 16) * 16 + exchanged
            compiled.packed_metadata = (warps, cluster, shared_memory)
            compiled.metadata = compiled.metadata._replace(shared=shared_memory)
    kernel[clusters](*arguments, **named)
