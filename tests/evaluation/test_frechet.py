"""Statistics of features and their Fréchet distance, against numpy and closed forms."""

import math

import numpy as np
import pytest
import torch
from refusals import refused
from torch import Tensor

from autoregressive.evaluation.frechet import Gaussian, RunningGaussian, frechet_distance


def gathered(features: Tensor, batch: int) -> RunningGaussian:
    """The features, taken in batch by batch."""
    running = RunningGaussian(features.shape[1], torch.device("cpu"))
    for part in features.split(batch):
        running.update(part)
    return running


def gaussian(mean: list[float], covariance: Tensor) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), covariance.double())


def random_covariance(size: int, rank: int, seed: int) -> Tensor:
    factor = torch.randn(
        size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return factor @ factor.T


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_statistics_are_numpys(batch: int, offset: float) -> None:
    """Fails if the covariance is divided by the count, a short last batch weighs as much as a whole
    one, or digits are lost where the mean is large.
    """
    features = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)) + offset
    found = gathered(features, batch).result()
    expected = features.double().numpy()
    assert found.mean.numpy() == pytest.approx(expected.mean(axis=0), rel=1e-12)
    assert found.covariance.numpy() == pytest.approx(np.cov(expected, rowvar=False), rel=1e-9)


def test_one_image_has_no_covariance() -> None:
    """Fails if a division by zero gives figures that are not numbers."""
    with refused("give two images or more"):
        gathered(torch.ones(1, 3), 1).result()


def test_distance_of_independent_features() -> None:
    """Fails if the distance is not |m1 - m2|² + sum of (s1 - s2)² for diagonal covariances."""
    first = gaussian([1.0, 2.0, 3.0], torch.tensor([4.0, 9.0, 0.0]).diag())
    second = gaussian([1.0, 0.0, 6.0], torch.tensor([1.0, 16.0, 25.0]).diag())
    expected = (0 + 4 + 9) + (1 + 1 + 25)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_distance_of_covariances_that_do_not_commute() -> None:
    """Fails if the root of the product is taken to be the product of the roots: for two features
    the trace of the root is (trace + 2 determinant^½)^½.
    """
    first, second = random_covariance(2, 2, 1), random_covariance(2, 2, 2)
    product = first @ second
    assert not torch.allclose(product, product.T)
    trace_of_root = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    expected = first.trace() + second.trace() - 2 * trace_of_root
    found = frechet_distance(gaussian([0, 0], first), gaussian([0, 0], second))
    assert found == pytest.approx(expected.item(), rel=1e-10)


def test_distance_does_not_depend_on_the_axes() -> None:
    """Fails if only diagonals are looked at: both distributions turned alike are as far apart."""
    rotation, _ = torch.linalg.qr(random_covariance(5, 5, 3))
    scales = torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0]).double(), torch.ones(5).double()
    first, second = (gaussian([0.0] * 5, rotation @ each.diag() @ rotation.T) for each in scales)
    assert frechet_distance(first, second) == pytest.approx(0 + 1 + 4 + 9 + 16, rel=1e-10)


@pytest.mark.parametrize("rank", [3, 40])
def test_distance_from_itself_is_zero(rank: int) -> None:
    """Fails if covariances of fewer images than features give something infinite or imaginary, or
    lose half of the digits.
    """
    same = gaussian([1.0] * 40, random_covariance(40, rank, 4))
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-8)


def test_distance_from_a_point_is_the_trace() -> None:
    """Fails if a covariance without any variance is not taken as it is."""
    spread, point = random_covariance(6, 6, 5), torch.zeros(6, 6)
    found = frechet_distance(gaussian([0.0] * 6, spread), gaussian([2.0] + [0.0] * 5, point))
    assert found == pytest.approx(4 + spread.trace().item(), rel=1e-10)


def test_a_sample_of_the_distribution_is_one_standard_error_away() -> None:
    """Fails if the unit depends on the number of images or features, or other features pass for
    these.
    """
    covariance = random_covariance(200, 200, 6)
    root = torch.linalg.cholesky(covariance)
    stored = Gaussian(torch.zeros(200).double(), covariance)
    for count in (50, 2000):
        draws = torch.randn(
            count, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(count)
        )
        drawn = gathered(draws @ root.T, 100)
        assert 0.7 < stored.standard_errors(drawn.mean, count) < 1.4
        shifted = drawn.mean + covariance.diagonal().sqrt()  # by a standard deviation each
        assert stored.standard_errors(shifted, count) > 0.9 * math.sqrt(count)
