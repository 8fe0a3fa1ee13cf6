"""ADM's network, with random weights: which layers are read, and whence weights are taken."""

import hashlib
import os
import pickle
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from feature_network import random_images
from refusals import refused
from torch import Tensor
from torch.backends import cudnn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from autoregressive.evaluation import inception as inception_module
from autoregressive.evaluation.inception import Inception, load_inception

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights, as torch-fidelity's file has them. torchvision's Inception has the
    same parameters.
    """
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, init_weights=False
    )
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            tensor.mul_(6**0.5)  # as strong behind each layer as before it
        elif name.endswith("bn.bias"):
            tensor.copy_(0.3 * torch.randn(tensor.shape))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def inception(weights: Path) -> Inception:
    """The network with these weights."""
    return load_inception(CPU, weights)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of torch.hub, and no way to download into it."""

    def fail(*_: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_the_layers_are_adms(inception: Inception) -> None:
    """Fails if sFID goes by another block than Mixed_6d (TensorFlow's mixed_6), by other channels
    than the first seven of its 1x1 branch, by their values before ReLU, by another order than row,
    column, channel, or by convolutions in TF32.
    """
    extractor, seen, precisions = inception._extractor, {}, []
    hooks = [
        extractor.Conv2d_1a_3x3.register_forward_pre_hook(
            lambda module, inputs: precisions.append(
                cudnn.conv.fp32_precision  # type: ignore[attr-defined]
            )
        )
    ]
    hooks += [
        getattr(extractor, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
        for name in ("Mixed_6c", "Mixed_6d", "AvgPool")
    ]
    found = inception.features(torch.from_numpy(random_images(1, 32)))
    for hook in hooks:
        hook.remove()
    assert precisions == ["ieee"]
    branch = extractor.Mixed_6d.branch1x1
    with torch.inference_mode():
        convolved = branch.bn(branch.conv(seen["Mixed_6c"]))
    spatial = convolved.clamp(min=0)[:, :7]
    assert 0.1 < (spatial == 0).float().mean() < 0.9
    assert torch.equal(seen["Mixed_6d"][:, :7], spatial)
    assert found.spatial.shape == (1, 17 * 17 * 7)
    for row, column, channel in ((0, 0, 0), (3, 11, 6), (16, 2, 5)):
        at = (row * 17 + column) * 7 + channel
        assert torch.equal(found.spatial[:, at], spatial[:, channel, row, column])
    assert torch.equal(found.pool, seen["AvgPool"].flatten(1))


def test_features_are_of_each_image_alone(inception: Inception) -> None:
    """Fails if features of one batch are left to the next, or images change one another's."""
    images = torch.from_numpy(random_images(2, 32))
    together, alone = inception.features(images), inception.features(images[1:])
    for features, of_one in zip(together, alone, strict=True):
        assert torch.allclose(features[1], of_one[0], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(features[0], of_one[0], rtol=1e-2, atol=1e-2)


def test_the_last_layer_has_no_bias(inception: Inception, weights: Path) -> None:
    """Fails if the Inception Score goes by other weights than TensorFlow's softmax/weights."""
    stored: dict[str, Tensor] = torch.load(weights, weights_only=True)
    assert torch.equal(inception.softmax_weights, stored["fc.weight"].T)
    assert inception.softmax_weights.shape == (inception.pool_features, 1008)
    assert inception.spatial_features == 2023


def test_other_weights_are_not_adms(inception: Inception) -> None:
    """Fails if figures of any network pass for comparable ones."""
    assert not inception.is_adms
    assert inception_module.WEIGHTS_SHA256.startswith(URL_INCEPTION_V3[-12:-4])


def test_weights_that_are_there_are_not_downloaded(hub: Path, weights: Path) -> None:
    """Fails if the file that torch-fidelity itself keeps is fetched once more."""
    hub.mkdir(parents=True)
    (hub / URL_INCEPTION_V3.rpartition("/")[2]).symlink_to(weights)
    assert load_inception(CPU).pool_features == 2048


def test_weights_are_downloaded_and_known(
    hub: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the file goes elsewhere than where torch-fidelity looks for it, its checksum is not
    asked for, stdout gets other lines than figures, or ADM's network is not known as such.
    """
    sha256, asked = hashlib.sha256(weights.read_bytes()).hexdigest(), []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, Path(path), hash_prefix))
        Path(path).symlink_to(weights)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(inception_module, "WEIGHTS_SHA256", sha256)
    assert load_inception(CPU).is_adms
    assert asked == [(URL_INCEPTION_V3, hub / URL_INCEPTION_V3.rpartition("/")[2], sha256)]
    assert capsys.readouterr().out == ""


def test_a_download_that_fails_says_what_to_do() -> None:
    """Fails if a machine without internet gets a traceback."""
    with refused("cannot download https://github.com/.*6726825d.pth .*--inception-weights"):
        load_inception(CPU)


def test_what_are_no_weights_is_refused(tmp_path: Path) -> None:
    """Fails if a wrong file is a traceback."""
    path = tmp_path / "x.pth"
    with refused("--inception-weights .*x.pth: No such file"):
        load_inception(CPU, path)
    for content in (b"", b"no weights", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        with refused("x.pth: damaged, or no .pth file of weights; leave --inception-weights out"):
            load_inception(CPU, path)
    for state in ({"fc.weight": torch.zeros(2, 2)}, [1]):
        torch.save(state, path)
        with refused("x.pth: not the weights of torch-fidelity's Inception"):
            load_inception(CPU, path)


def test_no_code_in_weights_is_run(tmp_path: Path) -> None:
    """Fails if a file from elsewhere can run a command, for torch-fidelity would let it."""

    class Command:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "x.pth"
    plain = pickle.dumps(Command(), protocol=2)
    for write in (lambda: torch.save(Command(), path), lambda: path.write_bytes(plain)):
        write()
        with refused("damaged, or no .pth file of weights"):
            load_inception(CPU, path)
    assert not (tmp_path / "made").exists()


def test_a_missing_package_is_named(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the line does not say what to install."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with refused(r"^torch_fidelity is not installed: pip install 'llamagen-serve\[eval\]'$"):
        load_inception(CPU, weights)
