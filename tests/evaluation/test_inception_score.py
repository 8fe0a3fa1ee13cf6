"""The Inception Score of distributions whose score is known."""

import math

import pytest
import torch
from torch import Tensor

from autoregressive.evaluation.inception_score import inception_score


def score(probabilities: Tensor, split_size: int = 5000) -> float:
    """The score where the network says these probabilities: its features are their logarithms, and
    its last layer adds nothing.
    """
    return inception_score(probabilities.log(), torch.eye(probabilities.shape[1]), split_size)


def test_sure_and_balanced_classes_score_their_number() -> None:
    """Fails if a probability of zero makes the score NaN, or certainty is not the best that images
    can have.
    """
    certain = torch.eye(10)[torch.arange(2000) % 10]
    assert inception_score(1000 * certain, torch.eye(10)) == pytest.approx(10, rel=1e-9)


def test_images_that_all_look_alike_score_one() -> None:
    """Fails if the score is not that of the images' distance from their own mean."""
    assert score(torch.tensor([[0.2, 0.3, 0.5]]).repeat(1200, 1)) == pytest.approx(1, rel=1e-6)


def test_score_of_two_kinds_of_images() -> None:
    """Fails if the score is not exp of the mean KL divergence, in nats."""
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(600, 1)
    expected = math.exp(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert score(probabilities) == pytest.approx(expected, rel=1e-6)


def test_the_last_layer_is_applied() -> None:
    """Fails if the features themselves are taken for classes."""
    features, swap = torch.randn(50, 4), torch.zeros(4, 3)
    assert inception_score(features, swap) == pytest.approx(1, rel=1e-9)
    assert inception_score(features, torch.randn(4, 3)) > 1.01


def test_splits_are_of_images_in_their_order() -> None:
    """Fails if splits are drawn at random: sorted images have one class a split."""
    certain = 1000 * torch.eye(2).repeat_interleave(100, dim=0)
    assert inception_score(certain, torch.eye(2), 100) == pytest.approx(1, rel=1e-9)
    assert inception_score(certain, torch.eye(2), 200) == pytest.approx(2, rel=1e-9)


def test_a_short_last_split_counts_as_one() -> None:
    """Fails if the rest is left out, or weighs by its size: ADM's evaluator does neither."""
    certain = 1000 * torch.eye(4)[[0, 1, 2, 3, 0, 0]]
    assert inception_score(certain, torch.eye(4), 4) == pytest.approx((4 + 1) / 2, rel=1e-9)


def test_the_published_split_is_the_default() -> None:
    """Fails if 50,000 images are scored in other splits than ten: more images score higher."""
    classes = torch.eye(2)[torch.arange(10_000) // 5000]
    assert inception_score(1000 * classes, torch.eye(2)) == pytest.approx(1, rel=1e-9)
