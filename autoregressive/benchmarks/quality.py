"""How far a transformer's distributions are from those of the same weights in float32.

Both are fed the same codes, those of real images, so that they are compared at every position
whatever either of them would have drawn. A distribution is the guided and filtered one that a
token is drawn from. The total variation of two distributions is the least share of draws that must
differ (0 to 1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoregressive.benchmarks.teacher_forcing import TeacherForced
from autoregressive.devices import ieee_float32
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.model_runner import ModelRunner, quantize_as_configured
from kernels.sampling_reference import kept_tokens


@dataclass(frozen=True)
class RealImages:
    """Images whose codes are known."""

    codes: Tensor  # int32 [images, tokens]
    labels: Sequence[int]


@dataclass(frozen=True)
class Distance:
    """How far distributions are from those of float32, over all positions of all images."""

    total_variation: float  # mean
    changed_greedy: float  # share of positions with another likeliest token


@dataclass(frozen=True)
class Subject:
    """A transformer, and how an engine runs it."""

    gpt: Transformer
    config: EngineConfig


@torch.no_grad()
@ieee_float32()
def distances(
    reference: Transformer,
    subjects: Mapping[str, Subject],
    real: RealImages,
    params: SamplingParams,
    images_at_once: int,
    on_position: Callable[[int, int], None] | None = None,
) -> dict[str, Distance]:
    """The distance of each subject from a reference of the same shape.

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
    totals = {name: torch.zeros(2, dtype=torch.float64) for name in subjects}
    runners = {name: _runner(each, images_at_once) for name, each in subjects.items()}
    of_reference = _runner(Subject(reference, EngineConfig()), images_at_once)
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


def _runner(subject: Subject, images: int) -> ModelRunner:
    """Runs single passes, without graphs."""
    gpt, config = subject.gpt, subject.config
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
