"""The Inception Score, as ADM's evaluator defines it (openai/guided-diffusion,
evaluations/evaluator.py; the score is of Salimans et al., arXiv 1606.03498).
"""

import torch
from torch import Tensor

SPLIT_SIZE = 5000
_BATCH = 512


def inception_score(features: Tensor, weights: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """The mean, over splits, of exp(mean KL divergence of an image's classes from the split's).

    A split is so many images one after the other, as they stand in the file. Images that are sorted
    by class therefore score lower than the same images in random order.

    Args:
        features: float [images, features].
        weights: of the network's last layer, float [features, classes]; there is no bias.
    """
    weights = weights.double()
    scores = [_split_score(split, weights) for split in features.split(split_size)]
    return torch.stack(scores).mean().item()


def _split_score(features: Tensor, weights: Tensor) -> Tensor:
    """exp of the mean entropy's distance: float64 of one value, on the weights' device."""
    negative_entropy = weights.new_zeros(())
    mean = weights.new_zeros(weights.shape[1])
    for batch in features.split(_BATCH):
        logarithms = (batch.to(weights) @ weights).log_softmax(dim=1)
        probabilities = logarithms.exp()
        negative_entropy += (probabilities * logarithms).sum() / len(features)
        mean += probabilities.sum(dim=0) / len(features)
    return (negative_entropy - torch.xlogy(mean, mean).sum()).exp()
