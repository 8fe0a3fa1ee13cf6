"""The command from its arguments to its JSON, with networks that stand in for ADM's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from feature_network import StandInNetwork, random_images
from PIL import Image
from refusals import refused
from source_tree import ROOT
from torch import Tensor

from autoregressive.evaluation.evaluator import PUBLISHED_IMAGES
from autoregressive.evaluation.frechet import Gaussian
from autoregressive.evaluation.inception import FeatureNetwork, Features
from autoregressive.evaluation.manifold import precision_and_recall
from autoregressive.evaluation.npz_images import ImageArray
from autoregressive.evaluation.reference import (
    ADM_REFERENCE,
    UNKNOWN,
    Fit,
    Reference,
    recognise,
)
from autoregressive.weights.checkpoint import load_weights
from tokenizer.tokenizer_image.vq_model import VQ_models

Run = Callable[..., dict[str, Any]]


class EncoderNetwork:
    """The encoder of the demo model's tokenizer, which knows the demo's pictures."""

    name, is_adms = "demo encoder", False
    pool_features, spatial_features = 64, 7 * 4 * 4

    def __init__(self) -> None:
        self._model = VQ_models["VQ-demo"]().eval()
        path = ROOT / "pretrained_models" / "demo_vq.safetensors"
        load_weights(self._model, path, device=torch.device("cpu"), dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        self.softmax_weights = torch.randn(64, 10, generator=generator)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Features:
        """As of `FeatureNetwork`, of the images at a quarter of their size."""
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = self._model.encoder(F.avg_pool2d(pixels, 4))  # [images, 64, 4, 4]
        return Features(encoded.mean(dim=(2, 3)), encoded[:, :7].permute(0, 2, 3, 1).flatten(1))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on the two files of arrays; returns its JSON and, as "lines", what stands
    above it.
    """

    def compare(
        samples: dict[str, np.ndarray],
        reference: dict[str, np.ndarray],
        *flags: str,
        network: FeatureNetwork | None = None,
    ) -> dict[str, Any]:
        network = network or StandInNetwork()
        monkeypatch.setattr(evaluate, "load_inception", lambda device, weights: network)
        np.savez(tmp_path / "samples.npz", **samples)  # type: ignore[arg-type]
        np.savez(tmp_path / "reference.npz", **reference)  # type: ignore[arg-type]
        files = (str(tmp_path / "samples.npz"), str(tmp_path / "reference.npz"))
        evaluate.main([*files, "--device", "cpu", *flags])
        *lines, last = capsys.readouterr().out.splitlines()
        return {**json.loads(last), "lines": lines}

    return compare


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A file's images."""
    return {"arr_0": random_images(count, seed=seed)}


def numpy_features(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stand-in's pool and spatial features, float64."""
    features = StandInNetwork().features(torch.from_numpy(array))
    return features.pool.double().numpy(), features.spatial.double().numpy()


def statistics(array: np.ndarray) -> dict[str, np.ndarray]:
    """Stored statistics of some images."""
    pool, spatial = numpy_features(array)
    return {
        "mu": pool.mean(axis=0),
        "sigma": np.cov(pool, rowvar=False),
        "mu_s": spatial.mean(axis=0),
        "sigma_s": np.cov(spatial, rowvar=False),
    }


def distance(
    means: tuple[np.ndarray, np.ndarray], covariances: tuple[np.ndarray, np.ndarray]
) -> float:
    """The Fréchet distance by the eigenvalues of the covariances' product."""
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1])
    root = np.sqrt(eigenvalues.astype(complex)).real.sum()
    traces = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(((means[0] - means[1]) ** 2).sum() + traces - 2 * root)


def test_the_figures_are_numpys(run: Run) -> None:
    """Fails if pool and spatial features are mixed up, a batch at a file's end is left out, or
    samples and reference change places.
    """
    samples, reference = images(150, 1), images(90, 2)
    found = run(samples, reference, "--batch-size", "64")
    ours, theirs = numpy_features(samples["arr_0"]), numpy_features(reference["arr_0"])
    for name, first, second in zip(("fid", "sfid"), ours, theirs, strict=True):
        means = first.mean(axis=0), second.mean(axis=0)
        covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
        assert found[name] == pytest.approx(distance(means, covariances), rel=1e-5), name
    assert found["fid"] > 1.5 * found["sfid"] > 0
    logits = ours[0] @ StandInNetwork().softmax_weights.double().numpy()
    classes = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    divergence = (classes * np.log(classes / classes.mean(axis=0))).sum(axis=1).mean()
    assert found["inception_score"] == pytest.approx(np.exp(divergence), rel=1e-5)
    tensors = [torch.from_numpy(pool).float() for pool, _ in (theirs, ours)]
    assert (found["precision"], found["recall"]) == precision_and_recall(*tensors)
    assert found["precision"] != found["recall"]
    assert found["samples"]["shape"] == [150, 16, 16, 3]


def test_stored_statistics_come_first(run: Run) -> None:
    """Fails if FID goes by the reference's few images where it has statistics of the whole data
    set, or precision goes by anything but the images.
    """
    samples, reference = images(60, 1), images(50, 2)
    stored = statistics(random_images(800, seed=3))
    plain, both = run(samples, reference), run(samples, {**reference, **stored})
    alone = run(samples, stored)
    assert both["fid"] == pytest.approx(alone["fid"], rel=1e-9) != plain["fid"]
    assert both["sfid"] == pytest.approx(alone["sfid"], rel=1e-9) != plain["sfid"]
    assert (both["precision"], both["recall"]) == (plain["precision"], plain["recall"])
    assert (alone["precision"], alone["recall"]) == (None, None)
    assert any("no precision and no recall" in line for line in alone["lines"])
    assert alone["inception_score"] == plain["inception_score"]


def test_statistics_of_pool_features_alone_give_no_sfid(run: Run) -> None:
    """Fails if a file of another evaluator is refused, or sFID is made up from its images."""
    stored = {
        name: value
        for name, value in statistics(random_images(100, seed=3)).items()
        if "_s" not in name
    }
    for reference in (stored, {**stored, **images(50, 3)}):
        found = run(images(60), reference)
        assert found["sfid"] is None
        assert found["fid"] > 0
        assert any("so there is no sFID" in line for line in found["lines"])


def test_a_reference_is_compared_with_its_own_statistics(run: Run) -> None:
    """Fails if a network, a layer or an order of features other than the one that the statistics
    were made with goes unnoticed, or images of the same data set are taken for others.
    """
    tint = np.array([1.0, 0.8, 0.6])
    stored = statistics((random_images(3000, seed=3) * tint).astype(np.uint8))
    shown = {"arr_0": (random_images(400, seed=4) * tint).astype(np.uint8)}
    found = run(images(60), {**stored, **shown})
    errors = found["reference"]["standard_errors"]
    assert 0.5 < errors["pool"] < 2
    assert 0.5 < errors["spatial"] < 2
    assert not any("do not fit" in note for note in found["notes"])
    channels_first = np.arange(12).reshape(2, 2, 3).transpose(2, 0, 1).ravel()
    for name, order in (("mu_s", channels_first), ("mu", np.arange(24)[::-1])):
        wrong = {**stored, name: stored[name][order]}
        found = run(images(60), {**wrong, **shown})
        assert max(found["reference"]["standard_errors"].values()) > 8, name
        assert any("do not fit its statistics" in note for note in found["notes"]), name
        assert found["reference"]["is"] == UNKNOWN


def test_what_is_not_comparable_is_noted(run: Run) -> None:
    """Fails if few images, another size or another network pass for a published figure."""
    small = {"arr_0": random_images(20, size=8)}
    found = run(small, images(30))
    told = " ".join(found["notes"])
    assert "the network is not ADM's" in told
    assert f"published figures are of {PUBLISHED_IMAGES:,} images" in told
    assert "the samples have 8 x 8 pixels and the reference's images 16 x 16" in told
    assert found["reference"]["is"] == UNKNOWN
    assert [f"note: {note}" for note in found["notes"]] == [
        line for line in found["lines"] if line.startswith("note: ")
    ]


def test_the_figures_are_written(run: Run, tmp_path: Path) -> None:
    """Fails if the file says anything else than the last line, or a figure is not in the table."""
    found = run(images(60), images(50, 1), "--output", str(tmp_path / "figures.json"))
    lines = found.pop("lines")
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    assert len(found["reference"]["sha256"]) == 64
    for title, value in (("FID", f"{found['fid']:.2f}"), ("recall", f"{found['recall']:.4f}")):
        assert any(line.split() == [title, value] for line in lines)


def test_the_network_sees_the_batches_that_were_asked_for(run: Run) -> None:
    """Fails if --batch-size has no effect on the memory that the network takes."""
    network = StandInNetwork()
    run(images(25), images(20), "--batch-size", "10", network=network)
    assert network.batches == [10, 10, 10, 10, 5]


REFUSED = {
    "no samples": (statistics(random_images(9)), images(9), "samples.npz: has no images"),
    "no reference": (
        images(9),
        {"mu_s": np.zeros(12), "sigma_s": np.eye(12)},
        "has neither images",
    ),
    "few samples": (images(3), images(9), "samples.npz: has 3 images; 4 are needed"),
    "few references": (images(9), images(1), "reference.npz: has 1 images; 4 are needed"),
    "other features": (
        images(9),
        {"mu": np.zeros(5), "sigma": np.eye(5)},
        "reference.npz: mu has 5 values, and the network 24 features",
    ),
    "other layer": (
        images(9),
        {**statistics(random_images(9)), "mu_s": np.zeros(5), "sigma_s": np.eye(5)},
        "reference.npz: mu_s has 5 values, and the network 12 features",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_compared_is_refused(kind: str, run: Run, tmp_path: Path) -> None:
    """Fails if it is found out after the network has seen all images, or is a traceback."""
    samples, reference, told = REFUSED[kind]
    network = StandInNetwork()
    with refused(told):
        run(samples, reference, "--output", str(tmp_path / "x.json"), network=network)
    assert not network.batches
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), MemoryError()])
def test_too_little_memory_says_what_to_do(
    error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a batch that does not fit is a traceback."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(StandInNetwork, "features", fail)
    with refused("cpu has too little memory; lower --batch-size"):
        run(images(9), images(9))


def adm_reference() -> Reference:
    """What ADM's file looks like."""
    stored = Gaussian(torch.zeros(1), torch.ones(1, 1))
    return Reference(Path("x.npz"), ImageArray(Path("x.npz"), 10_000, 256, 256), stored, stored)


def test_adms_reference_is_known_by_all_that_it_shows() -> None:
    """Fails if any one of its marks is enough: the same form have ADM's files of other data sets,
    whose images score low, and no figure of another network is comparable.
    """
    reference, fit = adm_reference(), Fit(1.1, 0.9)
    network, other = StandInNetwork(is_adms=True), StandInNetwork()
    assert ADM_REFERENCE in recognise(reference, network, fit, 200.0)
    fewer = replace(reference, images=ImageArray(Path("x.npz"), 9_999, 256, 256))
    for shown in (
        (replace(reference, images=None), network, None, None),
        (fewer, network, fit, 200.0),
        (reference, other, fit, 200.0),
        (reference, network, Fit(9.0, 0.9), 200.0),
        (reference, network, Fit(1.1, 9.0), 200.0),
        (reference, network, Fit(1.1, float("nan")), 200.0),
        (reference, network, Fit(1.1, None), 200.0),
        (reference, network, None, 200.0),
        (reference, network, fit, 5.0),
    ):
        assert recognise(*shown) == UNKNOWN, shown


@pytest.fixture(scope="module")
def demo_pictures() -> np.ndarray:
    """The 64 pictures of the demo model that the documents show."""
    with Image.open(ROOT / "docs" / "images" / "classes.png") as grid:
        pixels = np.asarray(grid.convert("RGB"))
    places = [(2 + 130 * row, 2 + 130 * column) for row in range(4) for column in range(16)]
    return np.stack([pixels[y : y + 128, x : x + 128] for y, x in places])


def test_worse_pictures_have_worse_figures(run: Run, demo_pictures: np.ndarray) -> None:
    """Fails if FID or sFID does not grow with noise in the demo's pictures, recall does not shrink,
    or pictures are not as good as themselves.
    """
    network, noise = EncoderNetwork(), np.random.default_rng(0).normal(size=demo_pictures.shape)
    found = []
    for strength in (0, 12, 120):
        noisy = (demo_pictures + strength * noise).clip(0, 255).astype(np.uint8)
        found.append(run({"arr_0": noisy}, {"arr_0": demo_pictures}, network=network))
    same, slightly, hardly = found
    assert abs(same["fid"]) + abs(same["sfid"]) < 1e-5
    assert (same["precision"], same["recall"]) == (1, 1)
    for name in ("fid", "sfid"):
        assert 0 < slightly[name] < hardly[name] / 2
    assert hardly["recall"] < slightly["recall"]
