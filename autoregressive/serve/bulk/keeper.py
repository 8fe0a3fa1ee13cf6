"""Writes images into parts while others are being drawn."""

import queue
import threading
import time
from types import TracebackType
from typing import Self

import numpy as np

from autoregressive.serve.bulk.parts import Images, Parts

_IMAGES_OF_A_PART = 64
_SECONDS = 2.0  # after which images are written though they are fewer
_WAITING = 32  # batches; more hold up the drawing


class Keeper:
    """A thread that writes. Where the block ends, all has been written, or could not be.

    Raises:
        UserError: the disk did not take a part; at the next `add`, or at the end of the block.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._queue: queue.Queue[Images | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def add(self, images: Images) -> None:
        """Takes images, and waits where the disk is slower than the drawing."""
        if self._error is not None:
            raise self._error
        self._queue.put(images)

    def _run(self) -> None:
        held: list[Images] = []
        due, more = 0.0, True
        while more:
            try:
                taken = self._queue.get(timeout=max(0.0, due - time.monotonic()) if held else None)
            except queue.Empty:
                pass
            else:
                more = taken is not None
                if taken is not None and taken.indices:
                    due = due if held else time.monotonic() + _SECONDS
                    held.append(taken)
            count = sum(len(images.indices) for images in held)
            if count >= _IMAGES_OF_A_PART or (held and (not more or time.monotonic() >= due)):
                self._write(held)
                held = []

    def _write(self, held: list[Images]) -> None:
        if self._error is not None:  # the queue is emptied all the same, for who adds waits for it
            return
        try:
            self._parts.write(
                Images(
                    [index for images in held for index in images.indices],
                    np.concatenate([images.codes for images in held]),
                    np.concatenate([images.pictures for images in held]),
                )
            )
        except BaseException as error:
            self._error = error
