"""What a picture says inside of how it was made."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from autoregressive.devices import PRECISIONS
from autoregressive.models.axes import CLASS, GridAxes
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.version import PROGRAM, program_version
from autoregressive.weights.finding import FoundWeights, ModelSettings

Loop = Literal["naive", "paged"]  # autoregressive/sample, autoregressive/serve


def generation_record(
    model: ModelSettings,
    found: FoundWeights,
    loop: Loop,
    *,
    compiled: bool = False,
    quantization: str | None = None,
    kv_cache_dtype: str = "auto",
    tensor_parallel_size: int = 1,
) -> dict[str, object]:
    """How pictures are made, ready for JSON: with labels and sampling parameters, enough to make
    them again on the same machine.

    The loop is part of it: from one seed the plain command and the engine's draw different
    pictures.

    Args:
        quantization: that was asked for; the checkpoint's counts where nothing was.
        kv_cache_dtype: of the engine's pages.
        tensor_parallel_size: ranks that share the model, whose number changes the order of sums.
    """
    record = {
        "program": PROGRAM,
        "version": program_version(),
        "torch": torch.__version__,
        "device": device_name(model.device),
        "loop": loop,
        "trained": found.trained,
        "model": model.gpt_model,
        "weights": weights_name(found.gpt),
        "ema": model.ema,
        "tokenizer": model.vq_model,
        "tokenizer_weights": weights_name(found.vq),
        "image_size": model.image_size,
        "downsample_size": model.downsample_size,
        "codebook_size": model.codebook_size,
        "codebook_embed_dim": model.codebook_embed_dim,
        "num_classes": model.num_classes,
        "precision": next(name for name, dtype in PRECISIONS.items() if dtype == model.precision),
        "compile": compiled,
    } | quantized_record(found, quantization, kv_cache_dtype)
    if tensor_parallel_size > 1:
        record["tensor_parallel_size"] = tensor_parallel_size
    return record


def quantized_record(
    found: FoundWeights, quantization: str | None, kv_cache_dtype: str
) -> dict[str, object]:
    """What is quantised of the weights and of the pages, and nothing where nothing is. So what was
    made before anything could be has the same record.
    """
    loaded = found.quantized_as(quantization)
    said = {"quantization": loaded, "kv_cache_dtype": kv_cache_dtype}
    return {name: value for name, value in said.items() if value not in (None, "auto")}


def image_record(
    common: dict[str, object],
    params: SamplingParams,
    *,
    label: int,
    class_name: str,
    images: int = 1,
    image: int = 0,
) -> dict[str, object]:
    """How one image was made: enough to make it again on the same machine.

    Args:
        common: a `generation_record`.
        params: the parameters it was drawn with.
        images, image: how many were drawn with that seed, and which of them it is.
    """
    return (
        common
        | sampling_record(params)
        | {"images": images, "image": image, "label": label, "class_name": class_name}
    )


def axes_record(
    common: dict[str, object],
    params: SamplingParams,
    axes: GridAxes,
    *,
    label: int,
    class_name: str,
) -> dict[str, object]:
    """How the pictures of a grid were made. `axes` has what varies from left to right, and then
    what varies from top to bottom: each maps keys of an `image_record` to lists of values. Nothing
    else varies, so a picture's record is this one with its own value of each list.

    Args:
        common: a `generation_record`.
        params, label, class_name: those of all pictures, but for what varies.
    """
    varied: list[dict[str, object]] = [
        {"label": list(axis.values), "class_name": list(axis.names)}
        if axis.setting == CLASS
        else {axis.setting: list(axis.values)}
        for axis in axes.both
    ]
    same = image_record(common, params, label=label, class_name=class_name)
    for keys in varied:
        same = {key: value for key, value in same.items() if key not in keys}
    return same | {"axes": varied}


def sampling_record(params: SamplingParams) -> dict[str, object]:
    """The parameters of a draw, ready for JSON."""
    return {name: value for name, value in asdict(params).items() if name != "n"}


def readable(record: dict[str, object]) -> str:
    """The record of a grid or of a single picture for people: the classes on a line, then
    everything else.
    """
    axes: Any = record.get("axes", [])
    varied = {key: values for keys in axes for key, values in keys.items()}
    labels: Any = varied.get("label", record.get("labels", [record.get("label")]))
    names: Any = varied.get("class_name", record.get("class_names", [record.get("class_name")]))
    drawn = ", ".join(f"{name} ({label})" for label, name in zip(labels, names, strict=True))
    said_before = ("labels", "class_names", "label", "class_name", "trained", "axes")
    rest = {key: value for key, value in (record | varied).items() if key not in said_before}
    noise = [] if record["trained"] else ["untrained weights: this picture is noise"]
    return "\n".join(
        [
            *noise,
            drawn,
            ", ".join(f"{key.replace('_', ' ')}: {_listed(value)}" for key, value in rest.items()),
        ]
    )


def _listed(value: object) -> str:
    """A value, or all that vary."""
    return " | ".join(map(str, value)) if isinstance(value, list) else str(value)


def weights_name(weights: Path | None) -> str:
    """The file's name without its folder, which is the user's own business.

    Bytes in it that are no UTF-8 are written with backslashes: no picture's file can hold them as
    they are.
    """
    return (
        os.fsencode(weights.resolve().name).decode(errors="backslashreplace")
        if weights
        else "untrained"
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
