"""The device-side state of the running rows: what the model runner's kernels read and write.

Tensors have fixed sizes and addresses, as captured graphs need. The host fills them when rows join,
leave or get pages. Within a span only the device changes `positions`, `codes` and `failed`.
Everything is enqueued on the current stream, and nothing waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from autoregressive.serve.engine.device_future import DeviceFuture, copy_to_host
from autoregressive.serve.engine.request import ImageState, RowState

_ALIGNMENT = 64  # bytes; what kernels may assume of a pointer, with room to spare
_WORD = 8  # bytes
# of what no row or image uses; zero elsewhere
_PADDING = {
    "positions": -1,
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


class Batch:
    """Rows and images in use come first, the rest is padding.

    A padding row has position -1: kernels read and write no page for it. A padding image has
    conditional row -1. The input token of a row at position p > 0 is codes[row_slots[row], p - 1];
    at position 0 it is the label.
    """

    # per row, [max_rows]
    labels: Tensor  # int32: class, or num_classes for an unconditional row
    row_slots: Tensor  # int32: slot of the row's image
    positions: Tensor  # int32: of the token that the step feeds; each step adds 1 at its end
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
    # per slot
    codes: Tensor  # int32 [num_slots, tokens]
    failed: Tensor  # int32 [num_slots], 1: a step's logits were NaN or infinite
    keep_failed: Tensor  # int32 [num_slots], 0: the slot's image is yet to take its first step

    def __init__(self, shape: BatchShape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        rows = images = (shape.max_rows,)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "labels": (rows, torch.int32),
            "row_slots": (rows, torch.int32),
            "positions": (rows, torch.int32),
            "conditional_rows": (images, torch.int32),
            "unconditional_rows": (images, torch.int32),
            "image_slots": (images, torch.int32),
            "guidance_scales": (images, torch.float32),
            "temperatures": (images, torch.float32),
            "top_ks": (images, torch.int32),
            "top_ps": (images, torch.float32),
            "seeds": (images, torch.int64),
            "image_indices": (images, torch.int32),
            "keep_failed": ((shape.num_slots,), torch.int32),
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
        start = 0
        for name, (dims, dtype) in layout.items():
            place = slice(start, start + sizes[name])
            setattr(self, name, device_bytes[place].view(dtype).view(dims))
            self._host[name] = host_bytes[place].view(dtype).view(dims).numpy()
            start += padded[name]
        self._page_table_start = start - padded["page_table"]
        self.codes = torch.zeros(shape.num_slots, shape.tokens, dtype=torch.int32, device=device)
        self.failed = torch.zeros(shape.num_slots, dtype=torch.int32, device=device)
        self.load([], [])

    def load(self, rows: Sequence[RowState], images: Sequence[ImageState]) -> None:
        """Uploads the state of rows and images, in this order, and pads the rest.

        Args:
            rows: every row of every image in `images`, and no other.
            images: in any order.
        """
        host = self._host
        assert len(rows) <= self.shape.max_rows
        assert len(images) <= self.shape.max_rows
        for name, values in _columns(rows, images).items():
            host[name][: len(values)] = values
            host[name][len(values) :] = _PADDING.get(name, 0)
        for table, row in zip(host["page_table"], rows, strict=False):
            # what lies behind is of an earlier row, and not read
            table[: len(row.pages)] = row.pages
        host["keep_failed"].fill(1)
        host["keep_failed"][[row.slot for row in rows if row.position == 0]] = 0
        end = -(-(self._page_table_start + host["page_table"][: len(rows)].nbytes) // _WORD)
        self._buffer[:end].copy_(_pinned(self._mirror[:end], self.device), non_blocking=True)
        self.failed.mul_(self.keep_failed)  # an image that starts does not inherit the slot's past

    def fetch(self, slots: Sequence[int]) -> DeviceFuture[tuple[Tensor, ...]]:
        """Begins to copy codes and failures of images to the host, behind the spans enqueued so
        far: int32 [images, tokens] and [images].
        """
        index = uploaded(torch.tensor(slots, dtype=torch.int64), self.device)
        return copy_to_host(self.codes[index], self.failed[index])


class Runner(Protocol):
    """What runs the model's steps over a batch."""

    def prepare(self, batch: Batch, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles and captures all that `run` needs, with the batch still empty. Calls `progress`
        with how much is done and how much there is.
        """

    def run(self, batch: Batch, rows: int, images: int, steps: int) -> None:
        """Enqueues `steps` steps for the first `rows` rows and `images` images; does not wait for
        the device.
        """


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. The host does not wait for the copy."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Pins a tensor's memory, so that an upload does not wait. torch reuses pinned memory only when
    its upload has ended.
    """
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _columns(rows: Sequence[RowState], images: Sequence[ImageState]) -> dict[str, Sequence[float]]:
    """The values of rows and images by the names of the batch's tensors."""
    row_index = {id(row): index for index, row in enumerate(rows)} | {id(None): -1}
    return {
        "labels": [row.label for row in rows],
        "row_slots": [row.slot for row in rows],
        "positions": [row.position for row in rows],
        "conditional_rows": [row_index[id(image.conditional)] for image in images],
        "unconditional_rows": [row_index[id(image.unconditional)] for image in images],
        "image_slots": [image.slot for image in images],
        "image_indices": [image.image_index for image in images],
        "guidance_scales": [image.params.cfg_scale for image in images],
        "temperatures": [image.params.temperature for image in images],
        "top_ks": [image.params.top_k for image in images],
        "top_ps": [image.params.top_p for image in images],
        "seeds": [image.params.seed for image in images],
    }
