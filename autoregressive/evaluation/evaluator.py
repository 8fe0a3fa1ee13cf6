"""The five figures of a file of samples: FID, sFID, Inception Score, precision and recall.

Of the images only pool features are kept (8 KB each), for precision and recall compare all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from autoregressive.errors import UserError
from autoregressive.evaluation.frechet import Gaussian, RunningGaussian, frechet_distance
from autoregressive.evaluation.inception import FeatureNetwork
from autoregressive.evaluation.inception_score import inception_score
from autoregressive.evaluation.manifold import NEIGHBOURS, precision_and_recall
from autoregressive.evaluation.npz_images import ImageArray
from autoregressive.evaluation.reference import Fit, Reference, check_sizes, recognise
from autoregressive.progress import progress_bar

PUBLISHED_IMAGES = 50_000


@dataclass(frozen=True)
class Extracted:
    """What the network says of a file's images."""

    pool_features: Tensor  # float32 [images, features], on the CPU
    pool: Gaussian
    spatial: Gaussian


@dataclass(frozen=True)
class Evaluation:
    """The figures. None: the reference does not have what the figure needs."""

    fid: float
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None
    reference: str  # which it is
    fit: Fit | None  # of its images and its statistics
    notes: tuple[str, ...]  # why figures are missing, or cannot be compared with published ones


def evaluate(
    samples: ImageArray,
    reference: Reference,
    network: FeatureNetwork,
    device: torch.device,
    batch_size: int = 64,
) -> Evaluation:
    """Compares the samples with the reference.

    Args:
        device: where all is computed but the roots of the covariances.
        batch_size: images that the network sees at a time.

    Raises:
        UserError: a file is damaged, there are too few images, or the reference's statistics are
            of other features.
    """
    check_sizes(reference, network)
    for images in filter(None, (samples, reference.images)):
        if images.count <= NEIGHBOURS:
            raise UserError(
                f"{images.path}: has {images.count} images; {NEIGHBOURS + 1} are needed at least"
            )
    theirs = None
    if reference.images is not None:
        theirs = extract(reference.images, network, device, batch_size, "reference")
    ours = extract(samples, network, device, batch_size, "samples")
    pool, spatial = _statistics(reference, theirs)
    fit, score = _fit(reference, theirs), None
    precision = recall = None
    if theirs is not None:
        score = _score(theirs, network, device)
        precision, recall = precision_and_recall(
            theirs.pool_features.to(device), ours.pool_features.to(device)
        )
    return Evaluation(
        fid=frechet_distance(ours.pool, pool),
        sfid=None if spatial is None else frechet_distance(ours.spatial, spatial),
        inception_score=_score(ours, network, device),
        precision=precision,
        recall=recall,
        reference=recognise(reference, network, fit, score),
        fit=fit,
        notes=tuple(_notes(samples, reference, network, fit)),
    )


def extract(
    images: ImageArray,
    network: FeatureNetwork,
    device: torch.device,
    batch_size: int,
    description: str,
) -> Extracted:
    """Shows the network all images of a file."""
    pool_features = torch.empty(images.count, network.pool_features)
    pool = RunningGaussian(network.pool_features, device)
    spatial = RunningGaussian(network.spatial_features, device)
    with progress_bar(description, " images", images.count) as bar:
        for batch in images.batches(batch_size):
            features = network.features(torch.from_numpy(batch).to(device))
            pool_features[pool.count : pool.count + len(batch)] = features.pool.cpu()
            pool.update(features.pool)
            spatial.update(features.spatial)
            bar.update(len(batch))
    return Extracted(pool_features, pool.result(), spatial.result())


def _statistics(
    reference: Reference, extracted: Extracted | None
) -> tuple[Gaussian, Gaussian | None]:
    """The reference's statistics of pool and spatial features: the stored ones if it has any, and
    none of the two is computed beside a stored one.
    """
    if reference.pool is not None:
        return reference.pool, reference.spatial
    assert extracted is not None, "a reference has images or statistics"
    return extracted.pool, extracted.spatial


def _fit(reference: Reference, extracted: Extracted | None) -> Fit | None:
    if extracted is None or reference.pool is None or reference.images is None:
        return None
    count, spatial = reference.images.count, None
    if reference.spatial is not None:
        spatial = reference.spatial.standard_errors(extracted.spatial.mean, count)
    return Fit(reference.pool.standard_errors(extracted.pool.mean, count), spatial)


def _score(extracted: Extracted, network: FeatureNetwork, device: torch.device) -> float:
    return inception_score(extracted.pool_features, network.softmax_weights.to(device))


def _notes(
    samples: ImageArray, reference: Reference, network: FeatureNetwork, fit: Fit | None
) -> list[str]:
    """Why figures are missing, or cannot be compared with published ones."""
    theirs = reference.images
    notes = []
    if not network.is_adms:
        notes.append("the network is not ADM's, so no figure is comparable with others")
    if samples.count != PUBLISHED_IMAGES:
        higher = "higher" if samples.count < PUBLISHED_IMAGES else "lower"
        notes.append(
            f"published figures are of {PUBLISHED_IMAGES:,} images; FID of {samples.count:,} is "
            f"{higher}"
        )
    if theirs is None:
        notes.append("the reference has no images, so there is no precision and no recall")
    elif theirs.shape[1:] != samples.shape[1:]:
        notes.append(
            f"the samples have {samples.width} x {samples.height} pixels and the reference's images"
            f" {theirs.width} x {theirs.height}"
        )
    if reference.pool is not None and reference.spatial is None:
        notes.append("the reference has no mu_s and sigma_s, so there is no sFID")
    if fit is not None and not fit.is_good:
        notes.append(
            "the reference's images do not fit its statistics, which are of another network or "
            "other images: FID and sFID mean nothing"
        )
    return notes
