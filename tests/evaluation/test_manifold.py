"""Precision and recall of points that can be counted by hand."""

import numpy as np
import pytest
import torch
from refusals import refused
from torch import Tensor

from autoregressive.evaluation import manifold
from autoregressive.evaluation.manifold import (
    neighbour_distances,
    precision_and_recall,
    squared_distances,
)
from autoregressive.progress import Bar


def line(*places: float) -> Tensor:
    """Points on a line."""
    return torch.tensor(places, dtype=torch.float32)[:, None]


def half_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """ADM's distances, one operation at a time in numpy's half precision; sums are float32's."""
    rounded = [each.astype(np.float16) for each in (first, second)]
    norms = [np.square(each).astype(np.float32).sum(axis=1).astype(np.float16) for each in rounded]
    products = rounded[0].astype(np.float32) @ rounded[1].astype(np.float32).T
    doubled = np.float16(2) * products.astype(np.float16)
    return np.maximum(norms[0][:, None] - doubled + norms[1][None, :], np.float16(0))


def test_a_ball_reaches_to_the_third_neighbour() -> None:
    """Fails if the point itself counts as its neighbour, or distances are not squared."""
    assert neighbour_distances(line(0, 1, 2, 3, 4), Bar()).tolist() == [9, 4, 4, 4, 9]


def test_points_counted_by_hand() -> None:
    """Fails if the two figures are swapped, or a ball does not include its border.

    The reference's ball around 4 reaches to 7, so 5, 6 and 7 are inside. The samples' ball around 5
    reaches to 2, so 2, 3 and 4 are.
    """
    precision, recall = precision_and_recall(line(0, 1, 2, 3, 4), line(5, 6, 7, 8))
    assert (precision, recall) == (3 / 4, 3 / 5)


def test_samples_of_one_place_are_precise_and_recall_nothing() -> None:
    """Fails if few kinds of good images pass for all kinds."""
    reference = line(*range(-20, 21, 2))
    samples = line(0, 0.125, 0.25, 0.375, 0.5)
    precision, recall = precision_and_recall(reference, samples)
    assert precision == 1
    assert recall == 1 / 21


def test_sets_far_apart_have_nothing_in_common() -> None:
    """Fails if anything counts by default."""
    assert precision_and_recall(line(0, 1, 2, 3), line(50, 51, 52, 53)) == (0, 0)


@pytest.mark.parametrize("block", [(2048, 8192), (7, 5), (64, 1)])
def test_blocks_do_not_change_the_figures(
    block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a block at the border is left out or shifted, or a neighbour in another block is
    not found.
    """
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(40, 6, generator=generator)
    samples = 1.2 * torch.randn(53, 6, generator=generator) + 0.2
    radii = [
        np.partition(half_distances(each.numpy(), each.numpy()), 3, axis=1)[:, 3]
        for each in (reference, samples)
    ]
    between = half_distances(reference.numpy(), samples.numpy())
    expected = (
        (between <= radii[0][:, None]).any(axis=0).mean(),
        (between <= radii[1][None, :]).any(axis=1).mean(),
    )
    assert 0.3 < min(expected) <= max(expected) < 1
    monkeypatch.setattr(manifold, "_ROWS", block[0])
    monkeypatch.setattr(manifold, "_COLUMNS", block[1])
    assert precision_and_recall(reference, samples) == pytest.approx(expected, rel=1e-12)


def test_distances_are_rounded_as_adms() -> None:
    """Fails if distances are finer than half precision, whose step is 0.25 between 256 and 512."""
    features = torch.rand(30, 300, generator=torch.Generator().manual_seed(0)) * 1.6
    found = squared_distances(features, features.flip(0))
    expected = half_distances(features.numpy(), features.flip(0).numpy())
    assert found.dtype == torch.float32
    assert (found.numpy() == expected).all()
    exact = torch.cdist(features.double(), features.flip(0).double()).square()
    assert (found - exact).abs().max() > 0.05


def test_distances_too_large_for_half_precision_are_float32s() -> None:
    """Fails if what overflows is infinite, so that every ball holds everything."""
    places = line(0, 1000, 2000, 4000)
    assert squared_distances(places, places)[0].tolist() == [0, 1e6, 4e6, 16e6]
    assert precision_and_recall(places, places + 100_000) == (0, 0)


def test_three_images_have_no_third_neighbour() -> None:
    """Fails if the farthest image, or the image itself, is taken for it."""
    with refused("give 4 or more"):
        precision_and_recall(line(0, 1, 2), line(0, 1, 2, 3))
