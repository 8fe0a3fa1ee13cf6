"""Networks that stand in for ADM's where its weights are not at hand."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.evaluation.inception import Features


class StandInNetwork:
    """A fixed random layer over the images' coarse colours. Whatever image it is shown, its
    features are not those of ADM's network; what is tested is all around the network.
    """

    name = "stand-in"
    pool_features, spatial_features, classes = 24, 12, 10

    def __init__(self, is_adms: bool = False) -> None:
        self.is_adms = is_adms
        generator = torch.Generator().manual_seed(1)
        self._weights = torch.randn(48, self.pool_features, generator=generator)
        self.softmax_weights = 8 * torch.randn(
            self.pool_features, self.classes, generator=generator
        )
        self.batches: list[int] = []  # sizes

    def features(self, images: Tensor) -> Features:
        """As of `FeatureNetwork`."""
        self.batches.append(len(images))
        pixels = images.permute(0, 3, 1, 2).float() / 255
        coarse = F.adaptive_avg_pool2d(pixels, 4).flatten(1)
        spatial = F.adaptive_avg_pool2d(pixels, 2).permute(0, 2, 3, 1).flatten(1)
        return Features((coarse @ self._weights).relu(), spatial)


def random_images(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Images whose colours change slowly: uint8 [count, size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)
