"""What a bulk job is: which images, and what its files are named."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoregressive.devices import PRECISIONS
from autoregressive.errors import SettingName, UserError
from autoregressive.files import file_sha256
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.output.records import quantized_record, sampling_record, weights_name
from autoregressive.serve.bulk.options import BULK_BOUNDS, IMAGE_SIZE_EVAL
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.weights.finding import FoundWeights, ModelSettings

# What settings were in jobs that do not name them.
_UNSAID = {"tensor_parallel_size": 1}


@dataclass(frozen=True)
class BulkJob:
    """A number of images, each of which is drawn by the job's settings and its own index.

    Attributes:
        sampling: of every image; its seed is the job's.
        image_size_eval: pixels of a side that images are resized to.
        labels: int64 [images], the class of each.
        labels_from: how they were chosen, as `labels_name` says.
        naive_batch: images of a batch of the plain loop, on which its draws depend; None: the
            engine draws.
        compiled: whether the plain loop's transformer is compiled.
        deterministic, attention_backend, quantization, kv_cache_dtype, tensor_parallel_size: of the
            engine, as in `EngineConfig`.
    """

    model: ModelSettings
    found: FoundWeights
    sampling: SamplingParams
    image_size_eval: int
    labels: NDArray[np.int64]
    labels_from: str
    naive_batch: int | None = None
    compiled: bool = False
    deterministic: bool = EngineConfig.deterministic
    attention_backend: str = EngineConfig.attention_backend
    quantization: str | None = EngineConfig.quantization
    kv_cache_dtype: str = EngineConfig.kv_cache_dtype
    tensor_parallel_size: int = EngineConfig.tensor_parallel_size

    @property
    def images(self) -> int:
        """How many images the job has."""
        return len(self.labels)

    @property
    def name(self) -> str:
        """The name of its folder and its npz file, as LlamaGen's bulk command has them."""
        return job_name(self.model, self.found, self.sampling, self.image_size_eval)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the images depend on, ready for JSON. A job goes on only with the same.

        It has the checksums of the weights, which take seconds to compute.
        """
        model = self.model
        return {
            "images": self.images,
            "labels": self.labels_from,
            "labels_sha256": hashlib.sha256(self.labels.tobytes()).hexdigest(),
            "naive": self.naive_batch is not None,
            "gpt_model": model.gpt_model,
            "compile": self.compiled,
            "gpt_ckpt": weights_name(self.found.gpt),
            "gpt_ckpt_sha256": weights_sha256(self.found.gpt),
            "ema": model.ema,
            "vq_model": model.vq_model,
            "vq_ckpt": weights_name(self.found.vq),
            "vq_ckpt_sha256": weights_sha256(self.found.vq),
            "image_size": model.image_size,
            "image_size_eval": self.image_size_eval,
            "codebook_size": model.codebook_size,
            "codebook_embed_dim": model.codebook_embed_dim,
            "num_classes": model.num_classes,
            "precision": next(name for name, one in PRECISIONS.items() if one == model.precision),
            "device": _device_kind(model.device),
            "per_proc_batch_size": self.naive_batch,
            "deterministic": self.deterministic,
            "attention_backend": self.attention_backend,
            # None, as a job says that was begun before there were any
            **dict.fromkeys(("quantization", "kv_cache_dtype")),
            **quantized_record(self.found, self.quantization, self.kv_cache_dtype),
            "tensor_parallel_size": self.tensor_parallel_size,
        } | sampling_record(self.sampling)


def job_name(
    model: ModelSettings, found: FoundWeights, sampling: SamplingParams, image_size_eval: int
) -> str:
    """The name that LlamaGen's bulk command gives to the files of a job."""
    return (
        f"{model.gpt_model}-{_checkpoint_name(model, found)}-size-{model.image_size}"
        f"-size-{image_size_eval}-{model.vq_model}-topk-{sampling.top_k}"
        f"-topp-{float(sampling.top_p)}-temperature-{float(sampling.temperature)}"
        f"-cfg-{float(sampling.cfg_scale)}-seed-{sampling.seed}"
    )


class DifferentJobError(UserError):
    """Two jobs are not the same; the message, "which has ...", says in what."""


def check_same(there: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises `DifferentJobError` for the first setting that differs. Where the labels came from
    does not matter, if they are the same.
    """
    for name, value in settings.items():
        found = there.get(name, _UNSAID.get(name))
        if name != "labels" and found != value:
            raise DifferentJobError("which has ", *_difference(name, found, value))


def _difference(name: str, there: object, here: object) -> list[str | SettingName]:
    """A setting of another job beside this one's, in words."""
    if name == "labels_sha256":
        return ["other labels"]
    if name in ("gpt_ckpt_sha256", "vq_ckpt_sha256"):
        return ["other weights in ", SettingName(name.removesuffix("_sha256"))]
    if name in ("images", "device"):  # not what a flag is called
        return [f"{name} {there} and not {here}"]
    return [SettingName(name), f" {there} and not {here}"]


def evaluation_size(model: ModelSettings, typed: int | None) -> int:
    """Pixels of a side that images are resized to: by default 256, as LlamaGen evaluates, or the
    model's size where that is less.

    Raises:
        SettingError: the size is out of range.
    """
    if typed is None:
        return min(IMAGE_SIZE_EVAL, model.image_size)
    BULK_BOUNDS["image_size_eval"].check("image_size_eval", typed)
    return typed


def _checkpoint_name(model: ModelSettings, found: FoundWeights) -> str:
    if found.gpt is None:
        return "untrained"
    # A link counts by its own name, as in LlamaGen: what it points to may be named by a checksum.
    path = found.gpt.absolute()
    if model.from_fsdp and not path.is_dir():
        return path.parent.name
    name = path.name
    for suffix in (".pth", ".pt", ".safetensors"):
        name = name.removesuffix(suffix)
    return name


def _device_kind(device: torch.device) -> str:
    """What of a device the bits of an image depend on."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def weights_sha256(path: Path | None) -> str | None:
    """The SHA-256 of a checkpoint: of a file, or of the SHA-256 of all files of a folder in the
    order of their names.
    """
    if path is None:
        return None
    if path.is_file():
        return file_sha256(path)
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
