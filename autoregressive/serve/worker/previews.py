"""Previews of images that are not drawn to their end: the codes so far, and a filling for the
rest.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from autoregressive.serve.engine.device_future import DeviceFuture
from autoregressive.serve.engine.engine import Engine, PartialCodes
from autoregressive.serve.engine.request import Request, RequestState

_TIME_SHARE = 0.2  # of the loop's time at most, where decoding holds it up


@dataclass(frozen=True)
class _Lot:
    """Previews that are made together: first their codes, then their pixels are on their way."""

    # for each image, the numbers of rows at which a preview is wanted
    wanted: dict[Request, Sequence[int]]
    rows: dict[Request, int]  # of tokens, that each picture shows; known with the codes
    codes: DeviceFuture[list[PartialCodes]] | None
    pictures: DeviceFuture[tuple[Tensor, ...]] | None


class Previewer:
    """Makes one lot of previews at a time, each from the newest codes of its image.

    A slow decoder thus makes previews rarer, not later.

    Args:
        most: images of a lot.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine, self._most = engine, most
        self._grid = round(engine.shape.tokens**0.5)
        self._shown: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # rows, at the last time
        self._lot: _Lot | None = None
        self._next_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether a lot is on its way."""
        return self._lot is not None

    def advance(
        self, wanted: Iterable[tuple[Request, Sequence[int]]], *, may_begin: bool
    ) -> list[tuple[Request, int, Tensor]]:
        """Goes on with a lot as far as that takes no waiting, or begins one.

        Args:
            wanted: requests for one image each, with the numbers of drawn rows at which a preview
                is wanted.

        Returns:
            Requests of a lot that is complete, each with its number of drawn rows, which is one of
            those that were wanted, and its pixels, uint8 [size, size, 3].

        Raises:
            Exception: as the decoder's; the lot is dropped.
        """
        begun = time.monotonic()
        lot, self._lot = self._lot, None
        try:
            if lot is None and may_begin and begun >= self._next_at:
                lot = self._begin(wanted)
            if lot is not None and lot.codes is not None and lot.codes.ready():
                lot = self._decode(lot, lot.codes.result())
            if lot is not None and lot.pictures is not None and lot.pictures.ready():
                return list(zip(lot.rows, lot.rows.values(), lot.pictures.result()[0], strict=True))
            self._lot = lot
            return []
        finally:
            ended = time.monotonic()
            self._next_at = max(self._next_at, ended + (ended - begun) * (1 / _TIME_SHARE - 1))

    def _begin(self, wanted: Iterable[tuple[Request, Sequence[int]]]) -> _Lot | None:
        # rows shown, rows to show at least, and the image with the rows wanted of it
        candidates: list[tuple[int, int, Request, Sequence[int]]] = []
        for request, preview_rows in wanted:
            drawn, shown = request.steps // self._grid, self._shown.get(request, 0)
            rows = max((rows for rows in preview_rows if shown < rows <= drawn), default=0)
            if rows and drawn < self._grid and request.state is RequestState.RUNNING:
                candidates.append((shown, rows, request, preview_rows))
        least_seen = sorted(candidates, key=itemgetter(0))[: self._most]
        self._shown.update({request: rows for _, rows, request, _ in least_seen})
        chosen = {request: preview_rows for *_, request, preview_rows in least_seen}
        return _Lot(chosen, {}, self._engine.peek(list(chosen)), None) if chosen else None

    def _decode(self, lot: _Lot, parts: list[PartialCodes]) -> _Lot:
        """Decodes as many rows as were there when the codes were copied. With lookahead these may
        be more than the host knew of when it began.
        """
        assert self._engine.decoder is not None
        rows = {}
        for part in parts:
            drawn = part.steps // self._grid
            rows[part.request] = max(rows for rows in lot.wanted[part.request] if rows <= drawn)
        self._shown.update(rows)
        filled = [fill_undrawn(part.codes, rows[part.request], self._grid) for part in parts]
        return _Lot(lot.wanted, rows, None, self._engine.decoder.submit_to_host(torch.cat(filled)))


def fill_undrawn(codes: Tensor, rows: int, grid: int) -> Tensor:
    """Fills the undrawn rows of images with codes of their drawn rows.

    The decoder's attention and norms look at the whole picture, so the filling shows in the drawn
    part: codes of the same picture disturb it least. The drawn rows are mirrored at the last one,
    as often as it takes.

    Args:
        codes: int32 [images, grid * grid], of which the first `rows` rows are drawn.
        rows: 1 to grid

    Returns:
        int32 [images, grid * grid]
    """
    period = max(1, 2 * rows)
    row = torch.arange(grid) % period
    row = torch.where(row < rows, row, period - 1 - row)
    return codes.view(-1, grid, grid)[:, row].reshape(codes.shape)
