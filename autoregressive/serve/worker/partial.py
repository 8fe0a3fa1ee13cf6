"""A preview of an image that is not drawn to its end: its codes so far, and a filling for
the rest.
"""

import torch
from torch import Tensor


def fill_undrawn(codes: Tensor, rows: int, grid: int) -> Tensor:
    """Codes of a whole image, of which the first `rows` rows are drawn, with the others filled from
    these.

    The decoder's attention and norms look at the whole picture, so what is filled in shows in what
    is drawn: codes of the same picture disturb it least. The rows are mirrored at the last one, as
    often as it takes.

    Args:
        codes: int32 [images, grid * grid]
        rows: 1 to grid

    Returns:
        int32 [images, grid * grid]
    """
    period = max(1, 2 * rows)
    row = torch.arange(grid) % period
    row = torch.where(row < rows, row, period - 1 - row)
    return codes.view(-1, grid, grid)[:, row].reshape(codes.shape)
