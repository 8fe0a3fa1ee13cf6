"""Precision and recall, as ADM's evaluator defines them (openai/guided-diffusion,
evaluations/evaluator.py; the measure is of Kynkäänniemi et al., arXiv 1904.06991).

Each set of features is taken for a union of balls: one around each feature, which reaches to its
third nearest neighbour in the set.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from autoregressive.devices import ieee_float32
from autoregressive.errors import UserError

NEIGHBOURS = 3
_ROWS, _COLUMNS = 2048, 8192  # of a block of distances: 64 MiB in float32


def precision_and_recall(reference: Tensor, samples: Tensor) -> tuple[float, float]:
    """The share of samples within the reference's balls, and the share of the reference within the
    samples' balls.

    Args:
        reference: float32 [images, features].
        samples: float32 [other images, features], on the same device.

    Raises:
        UserError: one of the two has too few images for a third neighbour.
    """
    with ieee_float32():
        reference_radii, sample_radii = neighbour_distances(reference), neighbour_distances(samples)
        reference_inside = torch.zeros_like(reference_radii, dtype=torch.bool)
        sample_inside = torch.zeros_like(sample_radii, dtype=torch.bool)
        for rows, columns in _blocks(len(reference), len(samples)):
            distances = squared_distances(reference[rows], samples[columns])
            reference_inside[rows] |= (distances <= sample_radii[columns]).any(dim=1)
            sample_inside[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
    return sample_inside.double().mean().item(), reference_inside.double().mean().item()


def neighbour_distances(features: Tensor) -> Tensor:
    """The squared distance of each feature to its third nearest neighbour: [images]. The nearest of
    all is the feature itself, which does not count.
    """
    wanted = NEIGHBOURS + 1
    if len(features) < wanted:
        raise UserError(
            f"precision and recall look at {NEIGHBOURS} neighbours of each image, and there are "
            f"{len(features)} images in all; give {wanted} or more"
        )
    nearest = features.new_full((len(features), wanted), torch.inf)
    for rows, columns in _blocks(len(features), len(features)):
        distances = squared_distances(features[rows], features[columns])
        candidates = torch.cat([nearest[rows], distances], dim=1)
        nearest[rows] = candidates.topk(wanted, largest=False).values
    return nearest[:, -1]


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, rows, _ROWS):
        for column in range(0, columns, _COLUMNS):
            yield slice(row, row + _ROWS), slice(column, column + _COLUMNS)


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """float32 [n, features] and [m, features] -> float32 [n, m], rounded to half precision after
    each operation as ADM's are; in float32 where a distance is too large for half precision.

    The rounding is part of the definition: a ball includes its border, and on a grid so coarse many
    distances are the border's. Products are summed in float32, as a GPU does.
    """
    distances = _distances(first.half().float(), second.half().float(), torch.half)
    if not distances.isfinite().all():
        distances = _distances(first, second, torch.float32)
    return distances.float()


def _distances(first: Tensor, second: Tensor, precision: torch.dtype) -> Tensor:
    first_norms, second_norms = (
        features.square().to(precision).float().sum(dim=1).to(precision)
        for features in (first, second)
    )
    products = (first @ second.T).to(precision)
    return (first_norms[:, None] - 2 * products + second_norms).clamp(min=0)
