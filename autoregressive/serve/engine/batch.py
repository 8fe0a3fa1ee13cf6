"""The device-side state of the running rows: what the model runner's kernels read and write.

Tensors have fixed sizes and addresses, as captured graphs need. The host fills them when rows join,
leave or get pages. Only the device knows the positions exactly: it alone changes `positions`,
`codes` and `slot_state`, except where an image starts. Everything is enqueued on the current
stream, and nothing waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoregressive.serve.engine.device_future import DeviceFuture, copy_to_host
from autoregressive.serve.engine.request import ImageState, RowState

_ALIGNMENT = 64  # bytes; what kernels may assume of a pointer, with room to spare
_WORD = 8  # bytes
# of what no row or image uses; zero elsewhere
_PADDING = {
    "conditional_rows": -1,
    "unconditional_rows": -1,
    "guidance_scales": 1,
    "temperatures": 1,
    "top_ps": 1,
}


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a batch's tensors."""

    max_rows: int
    tokens: int  # of an image
    page_size: int  # tokens of a page
    pages_per_row: int
    num_slots: int  # images that are running or whose codes are on their way to the host

    @classmethod
    def of(cls, max_rows: int, tokens: int, page_size: int) -> "BatchShape":
        """The shape for at most `max_rows` rows. Each of them may be an image, and the codes of as
        many images again may be on their way to the host.
        """
        return cls(max_rows, tokens, page_size, -(-tokens // page_size), 2 * max_rows)


@dataclass(frozen=True)
class BatchUpdate:
    """A change of a batch by the host, for the batches of other ranks."""

    start: int  # byte, in the buffer that the host fills
    # slots of images that begin; None: the rows are as before
    starting: tuple[int, ...] | None
    content: bytes


class Batch:
    """Rows and images in use come first, the rest is padding.

    A pass with a window of W feeds each row the W positions from its own position on, as far as
    they are below its limit; a row at its limit or above is inactive. The input at position q > 0
    is codes[row_slots[row], q - 1], and at position 0 the label. The codes of an image at its
    position and above are guesses. A draw writes codes and slot_state of the image, and moves the
    positions of its rows.

    A padding row has position -1 and a slot of no image: kernels read and write no page for it. A
    padding image has conditional row -1.
    """

    # per row, [max_rows]
    labels: Tensor  # int32: class, or num_classes for an unconditional row
    row_slots: Tensor  # int32: slot of the row's image; num_slots: of none
    positions: Tensor  # int32: the first that the next pass feeds
    limits: Tensor  # int32: the row has no pages for positions from here on
    page_table: Tensor  # int32 [max_rows, pages_per_row]
    # per image, [max_rows]: each row may be one
    conditional_rows: Tensor  # int32
    unconditional_rows: Tensor  # int32, -1: none
    image_slots: Tensor  # int32
    guidance_scales: Tensor  # float32
    temperatures: Tensor  # float32, 0: greedy
    top_ks: Tensor  # int32, 0: all
    top_ps: Tensor  # float32
    seeds: Tensor  # int64
    image_indices: Tensor  # int32
    guided_steps: (
        Tensor  # int32: from this position on, the conditional logits alone are drawn from
    )
    # per slot; the last is of no image
    codes: Tensor  # int32 [num_slots + 1, tokens]
    slot_state: Tensor  # int32 [4, num_slots + 1], of which these are views:
    lengths: Tensor  # tokens kept so far; of no image: -1
    failed: Tensor  # 1: the logits of a kept token were NaN or infinite
    drafted: Tensor  # guesses that were tried
    accepted: Tensor  # guesses that held

    def __init__(self, shape: BatchShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        # called with what other ranks' batches must `follow`
        self.on_update: Callable[[BatchUpdate], None] | None = None
        rows = images = (shape.max_rows,)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "labels": (rows, torch.int32),
            "row_slots": (rows, torch.int32),
            "limits": (rows, torch.int32),
            "conditional_rows": (images, torch.int32),
            "unconditional_rows": (images, torch.int32),
            "image_slots": (images, torch.int32),
            "guidance_scales": (images, torch.float32),
            "temperatures": (images, torch.float32),
            "top_ks": (images, torch.int32),
            "top_ps": (images, torch.float32),
            "seeds": (images, torch.int64),
            "image_indices": (images, torch.int32),
            "guided_steps": (images, torch.int32),
            # last: only the rows in use are uploaded
            "page_table": (
                (shape.max_rows, shape.pages_per_row),
                torch.int32,
            ),
        }
        # One buffer holds them all, as does its mirror on the host, so that a load is one copy. Of
        # 8-byte words, not of bytes: torch wakes all its CPU threads to copy more than 32,768
        # elements on the host. 512 rows have 63 to 104 KB.
        sizes = {name: prod(dims) * dtype.itemsize for name, (dims, dtype) in layout.items()}
        padded = {name: -(-size // _ALIGNMENT) * _ALIGNMENT for name, size in sizes.items()}
        self._buffer = torch.zeros(sum(padded.values()) // _WORD, dtype=torch.int64, device=device)
        self._mirror = torch.zeros(sum(padded.values()) // _WORD, dtype=torch.int64)
        device_bytes, host_bytes = self._buffer.view(torch.uint8), self._mirror.view(torch.uint8)
        self._host: dict[str, NDArray] = {}
        self._padding = {**_PADDING, "row_slots": shape.num_slots}
        starts, start = {}, 0
        for name, (dims, dtype) in layout.items():
            place = slice(start, start + sizes[name])
            setattr(self, name, device_bytes[place].view(dtype).view(dims))
            self._host[name] = host_bytes[place].view(dtype).view(dims).numpy()
            starts[name] = start
            start += padded[name]
        self._page_table_start = starts["page_table"]
        self._limits_start = starts["limits"]
        ints = partial(torch.zeros, dtype=torch.int32, device=device)
        self.positions = ints(rows)
        slots = shape.num_slots + 1
        self.codes = ints(slots, shape.tokens)
        # Each line begins at an address that kernels may take for aligned.
        self.slot_state = ints(4, -(-slots // _ALIGNMENT) * _ALIGNMENT)[:, :slots]
        self.lengths, self.failed, self.drafted, self.accepted = self.slot_state.unbind(0)
        self.lengths[-1] = -1
        self.load([], [])

    def load(self, rows: Sequence[RowState], images: Sequence[ImageState]) -> None:
        """Uploads the state of rows and images, in this order, and pads the rest. The slots of
        images that start begin with nothing. The device itself takes the positions from `lengths`.

        Args:
            rows: every row of every image in `images`, and no other.
            images: in any order.
        """
        host = self._host
        assert len(rows) <= self.shape.max_rows
        assert len(images) <= self.shape.max_rows
        for name, values in _columns(rows, images, self.shape.tokens).items():
            host[name][: len(values)] = values
            host[name][len(values) :] = self._padding.get(name, 0)
        for table, row in zip(host["page_table"], rows, strict=False):
            # what lies behind is of an earlier row, and not read
            table[: len(row.pages)] = row.pages
        starting = tuple(image.slot for image in images if image.position == 0)
        end = self._page_table_start + host["page_table"][: len(rows)].nbytes
        self._carry_out(0, end, starting)

    def upload_limits(self, rows: Sequence[RowState], images: Sequence[ImageState]) -> None:
        """Uploads the limits of rows that are loaded, when nothing else has changed.

        Args:
            rows, images: as at the load.
        """
        limits = self._host["limits"]
        limits[: len(rows)] = _limits(rows, images)
        self._carry_out(self._limits_start, self._limits_start + limits.nbytes, None)

    def follow(self, update: "BatchUpdate") -> None:
        """Does what another rank's batch of this shape has done."""
        start, end = update.start, update.start + len(update.content)
        mirror = self._mirror.view(torch.uint8).numpy()
        mirror[start:end] = np.frombuffer(update.content, dtype=np.uint8)
        self._carry_out(start, end, update.starting)

    def _carry_out(self, start: int, end: int, starting: tuple[int, ...] | None) -> None:
        """Uploads bytes of the mirror, begins images, and tells the other ranks.

        Args:
            starting: slots of images that begin; None: the rows are as before.
        """
        self._upload(start, end)
        if starting:
            index = self._slot_index(starting)
            self.codes.index_fill_(0, index, 0)
            self.slot_state.index_fill_(1, index, 0)
        if starting is not None:
            torch.index_select(self.lengths, 0, self.row_slots, out=self.positions)
        if self.on_update is not None:
            content = self._mirror.view(torch.uint8)[start:end].numpy().tobytes()
            self.on_update(BatchUpdate(start, starting, content))

    def fetch(self, slots: Sequence[int]) -> DeviceFuture[tuple[Tensor, ...]]:
        """Begins to copy codes and slot state of images to the host, behind the spans enqueued so
        far: int32 [images, tokens] and [4, images].
        """
        index = self._slot_index(slots)
        return copy_to_host(self.codes[index], self.slot_state[:, index])

    def fetch_lengths(self) -> DeviceFuture[Tensor]:
        """Begins to copy the lengths of all slots to the host, behind the spans enqueued so far:
        int32 [num_slots + 1].
        """
        return copy_to_host(self.lengths).then(itemgetter(0))

    def _upload(self, start: int, end: int) -> None:
        """Uploads bytes of the mirror. The first must be that of a tensor."""
        words = slice(start // _WORD, -(-end // _WORD))
        self._buffer[words].copy_(_pinned(self._mirror[words], self.device), non_blocking=True)

    def _slot_index(self, slots: Sequence[int]) -> Tensor:
        return uploaded(torch.tensor(slots, dtype=torch.int64), self.device)


class Runner(Protocol):
    """What runs the model's steps over a batch."""

    num_pages: int  # that it has; of several ranks, the one with the fewest counts

    @property
    def alive(self) -> bool:
        """Whether all other processes that it needs respond."""

    def prepare(self, batch: Batch, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles and captures all that `run` needs, with the batch still empty. Calls `progress`
        with how much is done and how much there is.
        """

    def run(self, batch: Batch, rows: int, images: int, passes: int, window: int) -> None:
        """Enqueues passes for the first `rows` rows and `images` images; does not wait for the
        device.

        Args:
            window: positions of an image that a pass computes.
        """


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. The host does not wait for the copy."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Pins a tensor's memory, so that an upload does not wait. torch reuses pinned memory only when
    its upload has ended.
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _limits(rows: Sequence[RowState], images: Sequence[ImageState]) -> list[int]:
    """The limits of rows. An unconditional row needs no pages beyond its end."""
    of_slot = {image.slot: image.limit for image in images}
    return [min(of_slot[row.slot], row.end) for row in rows]


def _columns(
    rows: Sequence[RowState], images: Sequence[ImageState], tokens: int
) -> dict[str, Sequence[float]]:
    """The values of rows and images by the names of the batch's tensors."""
    row_index = {id(row): index for index, row in enumerate(rows)}
    pairs = [[row_index[id(row)] for row in image.rows] for image in images]
    return {
        "labels": [row.label for row in rows],
        "row_slots": [row.slot for row in rows],
        "limits": _limits(rows, images),
        "conditional_rows": [pair[0] for pair in pairs],
        "unconditional_rows": [pair[1] if len(pair) == 2 else -1 for pair in pairs],
        "image_slots": [image.slot for image in images],
        "image_indices": [image.image_index for image in images],
        "guidance_scales": [image.params.cfg_scale for image in images],
        "temperatures": [image.params.temperature for image in images],
        "top_ks": [image.params.top_k for image in images],
        "top_ps": [image.params.top_p for image in images],
        "seeds": [image.params.seed for image in images],
        "guided_steps": [image.params.guided_steps(tokens) for image in images],
    }
