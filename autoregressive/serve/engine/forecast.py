"""How many pages will be held at each pass to come, if every image keeps one token a pass.

An image needs no less than that, so a forecast that stays within the pool is a promise that the
pages are there when they are needed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.request import ImageState


def page_profile(params: SamplingParams, tokens: int, page_size: int) -> NDArray[np.int64]:
    """Pages that a request will hold at each of its passes: int64 [tokens]."""
    position = np.arange(tokens)
    rows = params.n * np.where(position < params.guided_steps(tokens), 2, 1)
    return rows * (position // page_size + 1)


def page_forecast(
    images: Sequence[ImageState],
    tokens: int,
    page_size: int,
    *,
    positions: Sequence[int],
    limits: Sequence[int],
) -> NDArray[np.int64]:
    """Pages that images will hold at each pass from now on: int64 [tokens].

    An image at position `l` with limit `u` will be at `l + k` at the pass `k` from now. A row of it
    then has the pages of all positions below `max(u, l + k + 1)`, unless it has left.

    Args:
        tokens: of an image.
        positions: of the images.
        limits: of the images.
    """
    known = zip(images, positions, limits, strict=True)
    rows = [
        (at, limit, row.end) for image, at, limit in known for row in image.rows if at < row.end
    ]
    if not rows:
        return np.zeros(tokens, dtype=np.int64)
    position, limit, end = (column[:, None] for column in np.array(rows, dtype=np.int64).T)
    # A page is taken when its first position is, and given back when its row leaves.
    first = np.arange(0, tokens, page_size)[None]  # [1, pages]
    taken_at = np.where(first < limit, 0, first - position)  # [rows, pages]
    given_back_at = np.broadcast_to(end - position, taken_at.shape)
    needed = first < end
    taken = np.bincount(taken_at[needed], minlength=tokens + 1)
    given_back = np.bincount(given_back_at[needed], minlength=tokens + 1)
    return (taken - given_back).cumsum()[:tokens]
