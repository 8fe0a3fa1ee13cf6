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
from autoregressive.progress import Bar, progress_bar

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
    sizes = ((reference, reference), (samples, samples), (reference, samples))
    total = sum(1 for rows, columns in sizes for _ in _blocks(rows, columns))
    with ieee_float32(), progress_bar("precision and recall", " blocks", total) as bar:
        reference_radii, sample_radii = (
            neighbour_distances(features, bar) for features in (reference, samples)
        )
        reference_inside = torch.zeros_like(reference_radii, dtype=torch.bool)
        sample_inside = torch.zeros_like(sample_radii, dtype=torch.bool)
        for rows, columns in _blocks(reference, samples):
            distances = squared_distances(reference[rows], samples[columns])
            reference_inside[rows] |= (distances <= sample_radii[columns]).any(dim=1)
            sample_inside[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
            bar.update()
    return sample_inside.double().mean().item(), reference_inside.double().mean().item()


def neighbour_distances(features: Tensor, bar: Bar) -> Tensor:
    """The squared distance of each feature to its third nearest neighbour: [images]. The nearest of
    all is the feature itself, which does not count.

    Args:
        bar: grows by 1 with each block.
    """
    wanted = NEIGHBOURS + 1
    if len(features) < wanted:
        raise UserError(
            f"precision and recall look at {NEIGHBOURS} neighbours of each image, and there are "
            f"{len(features)} images in all; give {wanted} or more"
        )
    nearest = features.new_full((len(features), wanted), torch.inf)
    for rows, columns in _blocks(features, features):
        distances = squared_distances(features[rows], features[columns])
        candidates = torch.cat([nearest[rows], distances], dim=1)
        nearest[rows] = candidates.topk(wanted, largest=False).values
        bar.update()
    return nearest[:, -1]


def _blocks(first: Tensor, second: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which rows of two sets of features are compared at a time."""
    for row in range(0, len(first), _ROWS):
        for column in range(0, len(second), _COLUMNS):
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
