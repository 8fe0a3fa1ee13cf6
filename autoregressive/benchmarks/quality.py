"""How far a transformer's distributions are from those of the same weights in float32.

Both are fed the same codes, those of real images, so that they are compared at every position
whatever either of them would have drawn. A distribution is the guided and filtered one that a
token is drawn from. The total variation of two distributions is the least share of draws that must
differ (0 to 1).
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from autoregressive.benchmarks.teacher_forcing import TeacherForced
from autoregressive.devices import ieee_float32
from autoregressive.errors import SettingError
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.model_runner import ModelRunner, quantize_as_configured
from autoregressive.weights.finding import ModelSettings
from kernels.sampling_reference import kept_tokens
from tokenizer.tokenizer_image.vq_model import VQModel

_ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class RealImages:
    """Images whose codes are known."""

    codes: Tensor  # int32 [images, tokens]
    labels: Sequence[int]


def read_images(path: Path, most: int, settings: ModelSettings, vq: VQModel) -> RealImages:
    """The first images of an npz file: `labels` [n], and either `codes`, integers [n, tokens], or
    `arr_0`, pictures uint8 [n, height, width, 3].

    Args:
        most: that are taken.
        vq: encodes pictures.

    Raises:
        UserError: the file cannot be read, or does not fit the model.
    """
    try:
        opened = np.load(path)
        if not isinstance(opened, NpzFile):
            raise ValueError("it holds one array")
        with opened as arrays:
            found = {name: np.atleast_1d(arrays[name])[:most] for name in arrays.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise SettingError("codes", path, f"cannot be read ({error}); give an npz file") from error
    labels, codes, pictures = (found.get(name) for name in ("labels", "codes", "arr_0"))
    size, tokens = settings.image_size, settings.tokens_per_image
    if labels is None or labels.ndim != 1 or not _within(labels, settings.num_classes):
        told = f"must have labels [n], each 0 to {settings.num_classes - 1}"
        raise SettingError("codes", path, told)
    if codes is None and pictures is not None:
        if pictures.dtype != np.uint8 or pictures.shape != (len(labels), size, size, 3):
            told = f"arr_0 must be uint8 [{len(labels)}, {size}, {size}, 3]"
            raise SettingError("codes", path, told)
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        return RealImages(encoded(pixels, vq), labels.tolist())
    fits = codes is not None and codes.shape == (len(labels), tokens)
    if codes is None or not fits or not _within(codes, settings.codebook_size):
        told = f"must have codes [{len(labels)}, {tokens}], each 0 to {settings.codebook_size - 1}"
        raise SettingError("codes", path, told)
    return RealImages(torch.from_numpy(codes.astype(np.int32)), labels.tolist())


def _within(numbers: NDArray[Any], count: int) -> bool:
    whole = np.issubdtype(numbers.dtype, np.integer) and numbers.size > 0
    return bool(whole and numbers.min() >= 0 and numbers.max() < count)


@torch.no_grad()
def encoded(pixels: Tensor, vq: VQModel) -> Tensor:
    """Pixels [images, 3, height, width] in -1..1 -> int32 codes [images, tokens] on the CPU."""
    device = next(vq.parameters()).device
    parts = [vq.encode(part.to(device)).codes.cpu() for part in pixels.split(_ENCODED_AT_ONCE)]
    return torch.cat([part.flatten() for part in parts]).view(len(pixels), -1).int()


@dataclass(frozen=True)
class Distance:
    """How far distributions are from those of float32, over all positions of all images."""

    total_variation: float  # mean
    changed_greedy: float  # share of positions with another likeliest token


@dataclass(frozen=True)
class Candidate:
    """A transformer, and how an engine runs it."""

    gpt: Transformer
    config: EngineConfig


@torch.no_grad()
@ieee_float32()
def distances(
    reference: Transformer,
    candidates: Mapping[str, Candidate],
    real: RealImages,
    params: SamplingParams,
    images_at_once: int,
    on_position: Callable[[int, int], None] | None = None,
) -> dict[str, Distance]:
    """The distance of each candidate from a reference of the same shape.

    Args:
        params: guidance, temperature and filters of the draw; the temperature is above 0.
        images_at_once: of a pass, with two rows each.
        on_position: called with positions done, and positions in all.
    """
    assert params.temperature > 0
    tokens = reference.config.block_size
    batches = list(
        zip(real.codes.split(images_at_once), _parts(real.labels, images_at_once), strict=True)
    )
    totals = {name: torch.zeros(2, dtype=torch.float64) for name in candidates}
    runners = {name: _runner(each, images_at_once) for name, each in candidates.items()}
    of_reference = _runner(Candidate(reference, EngineConfig()), images_at_once)
    for done, (codes, labels) in enumerate(batches):
        teacher = TeacherForced(of_reference, codes, labels)
        students = {name: TeacherForced(runner, codes, labels) for name, runner in runners.items()}
        for position in range(tokens):
            wanted, likeliest = _distribution(teacher, position, params)
            for name, student in students.items():
                got, its_likeliest = _distribution(student, position, params)
                variation = (got - wanted).abs().sum(dim=1) / 2
                changed = its_likeliest != likeliest
                totals[name] += torch.stack([variation.sum(), changed.sum()]).double().cpu()
            if on_position is not None:
                on_position(done * tokens + position + 1, len(batches) * tokens)
    count = real.codes.numel()
    return {name: Distance(*(total / count).tolist()) for name, total in totals.items()}


def _runner(candidate: Candidate, images: int) -> ModelRunner:
    """Runs single passes, without graphs."""
    gpt, config = candidate.gpt, candidate.config
    quantize_as_configured(gpt, config)
    shape = BatchShape.of(2 * images, gpt.config.block_size, config.page_size)
    return ModelRunner(gpt, shape, shape.max_rows * shape.pages_per_row, config)


def _parts(labels: Sequence[int], size: int) -> list[Sequence[int]]:
    return [labels[first : first + size] for first in range(0, len(labels), size)]


def _distribution(
    forced: TeacherForced, position: int, params: SamplingParams
) -> tuple[Tensor, Tensor]:
    """The probabilities of a position's tokens, float32 [images, vocabulary], and the likeliest."""
    conditional, unconditional = forced.logits(position).unbind(1)
    logits = conditional
    if position < params.guided_steps(forced.runner.shape.tokens):
        logits = unconditional + (conditional - unconditional) * params.cfg_scale
    scaled = logits / params.temperature
    each = torch.ones(len(scaled), device=scaled.device)
    kept = kept_tokens(scaled, (each * params.top_k).int(), each * params.top_p)
    return scaled.masked_fill(~kept, -torch.inf).softmax(dim=1), logits.argmax(dim=1)


# Of bf16's own total variation, so many times.
_WEIGHT_BOUNDS = {None: 1.5, "int8": 1.5, "fp8": 2.5}
_FP8_PAGES_BOUND = 3.0
_MOST_LOST_SHARE = 0.01  # of recognised pictures


@dataclass(frozen=True)
class Verdict:
    """Whether quantised weights and pages are good enough."""

    ratio: float  # of the total variations, to that of bf16
    bound: float | None
    passed: bool | None  # None: experimental, which no bound makes pass


def judged(
    quantization: str | None,
    kv_cache_dtype: str,
    measured: Mapping[str, Distance],
    shares: Mapping[str, float] | None,
) -> Verdict:
    """Compares figures with their bounds.

    Args:
        measured: the distances of "bf16" and of what is "quantised".
        shares: of recognised pictures, "plain" and "quantised"; None: not measured.
    """
    variations = {name: distance.total_variation for name, distance in measured.items()}
    ratio = variations["quantised"] / variations["bf16"]
    if quantization == "int4":
        return Verdict(ratio, None, None)
    bound = _FP8_PAGES_BOUND if kv_cache_dtype == "fp8" else _WEIGHT_BOUNDS[quantization]
    kept = shares is None or abs(shares["quantised"] - shares["plain"]) <= _MOST_LOST_SHARE
    return Verdict(ratio, bound, ratio <= bound and kept)
