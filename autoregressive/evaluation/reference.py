"""What the samples are compared with: the reference file, and whether it is ADM's."""

from dataclasses import dataclass
from pathlib import Path

from autoregressive.errors import UserError
from autoregressive.evaluation.frechet import Gaussian
from autoregressive.evaluation.inception import FeatureNetwork
from autoregressive.evaluation.npz_images import IMAGES, ImageArray, open_images, read_gaussian

ADM_REFERENCE = "ADM's VIRTUAL_imagenet256_labeled.npz"
UNKNOWN = "unknown: not comparable with published figures"
# ADM's file has statistics of the whole data set and 10,000 images of it.
_ADM_SHAPE = (10_000, 256, 256, 3)
# The mean of images drawn from what the statistics describe is about 1 away; that of features of
# another layer, or in another order, is tens away for 10,000 images.
MOST_STANDARD_ERRORS = 5.0
# Images of many classes score high (ADM's samples of ImageNet 216, by its README). ADM's references
# of other data sets have the same form, and images of one kind, which score a few.
_LEAST_SCORE = 100.0


@dataclass(frozen=True)
class Reference:
    """A reference file."""

    path: Path
    images: ImageArray | None
    pool: Gaussian | None  # stored statistics: mu and sigma
    spatial: Gaussian | None  # mu_s and sigma_s


@dataclass(frozen=True)
class Fit:
    """How the reference's images fit its stored statistics: how far their mean is from the stored
    one in standard errors, about 1 if network and statistics belong together.
    """

    pool: float
    spatial: float | None = None

    @property
    def is_good(self) -> bool:
        """Whether the statistics are those of this network."""
        return all(
            errors <= MOST_STANDARD_ERRORS
            for errors in (self.pool, self.spatial)
            if errors is not None
        )


def open_reference(path: Path) -> Reference:
    """Reads what a reference file has, but not its pixels.

    Raises:
        UserError: it has neither images nor statistics, or is damaged.
    """
    reference = Reference(
        path,
        open_images(path),
        read_gaussian(path, "mu", "sigma"),
        read_gaussian(path, "mu_s", "sigma_s"),
    )
    if reference.images is None and reference.pool is None:
        raise UserError(f"{path}: has neither images ({IMAGES}) nor statistics (mu, sigma)")
    return reference


def check_sizes(reference: Reference, network: FeatureNetwork) -> None:
    """Raises `UserError` where stored statistics are of other features than the network's."""
    for name, stored, features in (
        ("mu", reference.pool, network.pool_features),
        ("mu_s", reference.spatial, network.spatial_features),
    ):
        if stored is not None and len(stored.mean) != features:
            raise UserError(
                f"{reference.path}: {name} has {len(stored.mean)} values, and the network "
                f"{features} features; give a reference of ADM's evaluator"
            )


def recognise(
    reference: Reference, network: FeatureNetwork, fit: Fit | None, score: float | None
) -> str:
    """The reference's name. No checksum of ADM's file is published, so that it is known by its
    form and by the network's figures of its images. A file of the validation set in this form
    cannot be told from it.

    Args:
        fit: of its images and its statistics.
        score: the Inception Score of its images.
    """
    is_adms = (
        network.is_adms
        and reference.images is not None
        and reference.images.shape == _ADM_SHAPE
        and fit is not None
        and fit.spatial is not None
        and fit.is_good
        and score is not None
        and score >= _LEAST_SCORE
    )
    told = f"{ADM_REFERENCE}, or another file of its form with images of ImageNet"
    return told if is_adms else UNKNOWN
