"""Means and covariances of features, and the Fréchet distance of two of them (FID, sFID).

The definition is ADM's (openai/guided-diffusion, evaluations/evaluator.py), which took it from
Heusel et al., arXiv 1706.08500.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from autoregressive.errors import UserError


@dataclass(frozen=True)
class Gaussian:
    """Statistics of features, float64 on the CPU."""

    mean: Tensor  # [features]
    covariance: Tensor  # [features, features]

    def standard_errors(self, mean: Tensor, count: int) -> float:
        """How far the mean of `count` other features is from this one.

        The unit is the distance that is expected if the others were drawn from this distribution:
        their mean is then about 1 away, whatever their number.
        """
        distance = (mean - self.mean).square().sum()
        expected = self.covariance.diagonal().sum() / count
        return (distance / expected).sqrt().item()


class RunningGaussian:
    """Mean and covariance of features that come in batches, as `numpy.cov` defines the latter
    (divided by count - 1), summed in float64.

    Each batch is centred before it is squared (Chan, Golub and LeVeque, 1979), so that no digits
    are lost where the mean is large.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._squares = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, batch: Tensor) -> None:
        """Takes in features [n, features] of any precision."""
        batch = batch.to(self.mean)
        count, mean = self.count + len(batch), batch.mean(dim=0)
        centred, step = batch - mean, mean - self.mean
        self._squares.addmm_(centred.T, centred)
        self._squares.addr_(step, step, alpha=self.count * len(batch) / count)
        self.mean += step * (len(batch) / count)
        self.count = count

    def result(self) -> Gaussian:
        """The statistics of all that was taken in.

        Raises:
            UserError: of fewer than two there is no covariance.
        """
        if self.count < 2:
            raise UserError(f"{self.count} image has no covariance; give two images or more")
        return Gaussian(self.mean.cpu(), (self._squares / (self.count - 1)).cpu())


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|² + trace(C1 + C2 - 2 (C1 C2)^½).

    The trace of the root is computed as the sum of the singular values of C2^½ C1^½, which is the
    same number. Unlike the root of C1 C2 itself, of which ADM takes the trace, it is real and
    finite for any covariances, those of fewer images than features too.
    """
    cross = torch.linalg.svdvals(_root(first.covariance).T @ _root(second.covariance)).sum()
    traces = first.covariance.diagonal().sum() + second.covariance.diagonal().sum()
    return ((first.mean - second.mean).square().sum() + traces - 2 * cross).item()


def _root(covariance: Tensor) -> Tensor:
    """A matrix whose product with its transpose is the covariance."""
    variances, directions = torch.linalg.eigh(covariance)
    return directions * variances.clamp(min=0).sqrt()
