"""The network that ADM's figures are computed with: the Inception network of TensorFlow's 2015
release, as torch-fidelity has it in PyTorch.

ADM reads two of its layers, `pool_3:0` and `mixed_6/conv:0`. The latter is the output, after ReLU,
of the 1x1 convolution in the block that torch-fidelity calls Mixed_6d, by the table of names in its
utils/util_convert_inception_weights.py. Mixed_6e, which other ports of the evaluator read, is
`mixed_7`.
"""

import hashlib
import http.client
import io
import pickle
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.backends import cudnn

from autoregressive.errors import UserError, missing_extra, on_terminal, shortened

POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7  # of 192
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17
# Of weights-inception-2015-12-05-6726825d.pth; its first eight digits are in torch-fidelity's name.
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_FLAG = "--inception-weights"


class Features(NamedTuple):
    """What the network says of some images, float32."""

    pool: Tensor  # [images, pool features]
    spatial: Tensor  # [images, spatial features]: by row, then column, then channel


class FeatureNetwork(Protocol):
    """A network by whose features images are compared."""

    name: str
    is_adms: bool  # whether its figures can be compared with published ones
    pool_features: int
    spatial_features: int
    softmax_weights: Tensor  # [pool features, classes]

    def features(self, images: Tensor) -> Features:
        """uint8 [images, height, width, 3] -> their features, on the network's device."""
        ...


class Inception:
    """ADM's network.

    Args:
        extractor: torch-fidelity's FeatureExtractorInceptionV3, which returns feature 2048 alone.
        sha256: of the file with its weights.
    """

    pool_features, spatial_features = POOL_FEATURES, SPATIAL_FEATURES

    def __init__(self, extractor: Any, sha256: str, device: torch.device) -> None:
        self.is_adms = sha256 == WEIGHTS_SHA256
        self.name = "Inception of 2015" if self.is_adms else "Inception with other weights"
        self._device, self._extractor = device, extractor.to(device)
        self.softmax_weights: Tensor = extractor.fc.weight.T
        self._spatial: list[Tensor] = []
        extractor.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, output: self._spatial.append(output[:, :SPATIAL_CHANNELS])
        )

    @torch.inference_mode()
    def features(self, images: Tensor) -> Features:
        """As of `FeatureNetwork`. The network resizes the images to 299 px itself, as TensorFlow 1
        does; its products are IEEE float32.
        """
        self._spatial.clear()
        pixels = images.to(self._device).permute(0, 3, 1, 2)
        with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"):
            (pool,) = self._extractor(pixels)
        # TensorFlow has the channels last, and reference files have their statistics in that order.
        return Features(pool, self._spatial.pop().permute(0, 2, 3, 1).flatten(1))


def load_inception(device: torch.device, path: Path | None = None) -> Inception:
    """ADM's network on a device, in float32.

    Args:
        path: the file with its weights; None: where torch-fidelity keeps it, and it is downloaded
            if it is not there.

    Raises:
        UserError: torch-fidelity is not installed, or there are no such weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    path = path or _downloaded(URL_INCEPTION_V3)
    weights, sha256 = _read_weights(path)
    # torch-fidelity unpickles the file that it is given, so it is given one that is written here.
    written = io.BytesIO()
    torch.save(weights, written)
    written.seek(0)
    try:
        extractor = FeatureExtractorInceptionV3(
            "inception", [str(POOL_FEATURES)], feature_extractor_weights_path=written
        )
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not the weights of torch-fidelity's Inception ({shortened(str(error), 200)})"
        ) from error
    return Inception(extractor, sha256, device)


def _downloaded(url: str) -> Path:
    """The file at an address, in the folder of torch.hub."""
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr):
            print(f"downloading {url} to {path}")
            torch.hub.download_url_to_file(url, str(path), WEIGHTS_SHA256, on_terminal())
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({shortened(str(error), 200)}); fetch it elsewhere and name "
            f"the file with {_FLAG}"
        ) from error
    return path


def _read_weights(path: Path) -> tuple[dict[str, Any], str]:
    """A file's tensors by name, and its SHA-256."""
    try:
        content = path.read_bytes()
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{_FLAG} {path}: {error.strerror or error}") from error
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path}: damaged, or no .pth file of weights; leave {_FLAG} out to download them"
        ) from error
    return weights, hashlib.sha256(content).hexdigest()
