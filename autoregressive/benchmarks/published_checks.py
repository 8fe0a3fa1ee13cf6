"""What scripts/verify_published.py checks and measures with published weights."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.benchmarks.guessing import draw_all, kept_a_pass
from autoregressive.benchmarks.speedup import ROOT, time_paged
from autoregressive.cli.drawing import Settings
from autoregressive.devices import PRECISIONS, ieee_float32, limited_cpu_threads
from autoregressive.errors import UserError
from autoregressive.files import file_sha256
from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.bulk.job import job_name
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig, LookaheadSetting
from autoregressive.weights.finding import (
    FoundWeights,
    ModelSettings,
    find_weights,
    missing_weights,
    resolve_model,
)
from autoregressive.weights.loading import load_models
from autoregressive.weights.options import ModelOptions, file_in
from autoregressive.weights.published import (
    PUBLISHED_FILES,
    SHIPPED_FILES,
    PublishedFile,
    published_file,
)
from kernels.operations import MANY_ROWS

# Float32 sums in another order move a guided logit by less than this. Where the plain loop's two
# likeliest tokens are closer, either is right.
NEAR_TIE = 1e-3
LOOKAHEAD_SETTINGS: tuple[LookaheadSetting, ...] = (4, 8, 16, "auto")
_GREEDY_IMAGES = 2
_EVALUATED_SIZE = 256  # pixels of a side, to which larger images are resized
_STDERR = 2  # stdout is for the table and the report
_BULK = ROOT / "autoregressive/sample/sample_c2i_ddp.py"
_EVALUATE = ROOT / "scripts/evaluate.py"
Outcome = dict[str, Any]  # of a check; it has failed if it has "error", or its "equal" is False


@dataclass(frozen=True)
class PublishedFID:
    """A row of the tables 8 to 10 of LlamaGen's paper (arXiv 2406.06525), 300 epochs."""

    model: str
    image_size: int
    cfg_scale: float
    fid: float  # of 50,000 images at 256 px; top-k 0, top-p 1, temperature 1


# The README of LlamaGen has the same figures, without the guidance.
PUBLISHED_FIDS = (
    PublishedFID("GPT-B", 256, 2.0, 5.46),
    PublishedFID("GPT-L", 256, 1.75, 3.80),
    PublishedFID("GPT-B", 384, 2.25, 6.09),
    PublishedFID("GPT-L", 384, 2.0, 3.07),
    PublishedFID("GPT-XL", 384, 1.75, 2.62),
    PublishedFID("GPT-XXL", 384, 1.75, 2.34),
    PublishedFID("GPT-3B", 384, 1.65, 2.18),
)
_UNPUBLISHED_CFG_SCALE = 1.5  # the default of LlamaGen's bulk command


@dataclass(frozen=True)
class Subject:
    """A model whose weights are here."""

    settings: ModelSettings
    found: FoundWeights
    labels: tuple[int, ...]

    @property
    def name(self) -> str:
        """The model and its size, for people."""
        return f"{self.settings.gpt_model}, {self.settings.image_size} px"

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters that LlamaGen's command has by default for this model."""
        return self.settings.defaults.sampling

    def loaded(self, precision: torch.dtype | None = None) -> Transformer:
        """The transformer, in the default precision unless another is given."""
        settings = replace(self.settings, precision=precision or self.settings.precision)
        return load_models(settings, self.found).gpt


def subjects(
    models: Sequence[str] | None,
    image_size: int | None,
    images: int | None,
    pretrained_dir: Path | None,
    device: torch.device,
) -> list[Subject]:
    """The models that are meant and found.

    Args:
        models: their names; None: all that are found.
        image_size: pixels of a side; None: all that are found.
        images: how many of the family's labels; None: all.

    Raises:
        UserError: a model that was named is not found, nothing is found, or a tokenizer is missing.
    """
    folders = ModelOptions(pretrained_dir=pretrained_dir).folders
    files = [
        file
        for file in (*PUBLISHED_FILES, *SHIPPED_FILES)
        if file.image_size is not None
        and image_size in (None, file.image_size)
        and file_in(folders, file) is not None
    ]
    found = {file.model for file in files}
    size = f" for {image_size} px" if image_size else ""
    if missing := [model for model in models or () if model not in found]:
        raise UserError(
            f"{', '.join(missing)}: there are no weights{size} in {folders[0]}; get them with "
            "llamagen-download, or name another folder with --pretrained-dir"
        )
    if not files:
        raise UserError(
            f"there are no published weights{size} in {folders[0]}; get them with "
            "llamagen-download, or name another folder with --pretrained-dir"
        )
    chosen = [file for file in files if models is None or file.model in models]
    return [_subject(file, images, pretrained_dir, device) for file in chosen]


def _subject(
    file: PublishedFile, images: int | None, pretrained_dir: Path | None, device: torch.device
) -> Subject:
    settings = resolve_model(
        ModelOptions(
            file.model,
            image_size=file.image_size,
            device=str(device),
            pretrained_dir=pretrained_dir,
        )
    )
    found = find_weights(settings)
    missing = missing_weights(settings, found)
    if missing is not None:  # of the tokenizer; the commands' flags for it are not this script's
        tokenizer = published_file(settings.vq_model)
        name = tokenizer.file_name if tokenizer else settings.vq_model
        raise UserError(
            f"{file.model}: there is no {name} in {settings.folders[0]}; get it with "
            f"llamagen-download {settings.vq_model}"
        )
    labels = settings.defaults.class_labels
    if images is not None and images > len(labels):
        raise UserError(
            f"--images {images}: must be 1 to {len(labels)}, the labels of {file.model}"
        )
    return Subject(settings, found, labels[:images])


def check_files(subject: Subject, stated: Mapping[str, str]) -> Outcome:
    """The SHA-256 of both checkpoints, beside what the hub states.

    Args:
        stated: name of a published file -> SHA-256.
    """
    settings, found = subject.settings, subject.found
    records = [
        _file_record(found.gpt, settings.published_gpt, stated),
        _file_record(found.vq, published_file(settings.vq_model), stated),
    ]
    compared = [record["equal"] for record in records if record["equal"] is not None]
    return {"files": records, "equal": all(compared) if compared else None}


def _file_record(
    path: Path | None, published: PublishedFile | None, stated: Mapping[str, str]
) -> Outcome:
    assert path is not None
    assert published is not None  # the weights were found by this name
    if path.is_dir():
        return {"name": published.file_name, "kind": "folder", "equal": None}
    sha256 = file_sha256(path)
    # A file of the same stem and another suffix is a conversion.
    is_original = path.name == published.file_name
    expected = stated.get(published.file_name) if is_original else None
    return {
        "name": published.file_name if is_original else f"{path.suffix} of {published.file_name}",
        "bytes": path.stat().st_size,
        "sha256": sha256,
        "hub_sha256": expected,
        "equal": None if expected is None else sha256 == expected,
    }


def check_greedy(subject: Subject) -> Outcome:
    """The tokens of temperature 0, by the engine and by the plain loop: in float32, which must be
    equal but for near ties, and in the default precision, which tells the share that is.
    """
    default = subject.settings.precision
    exact = _compare_greedy(subject, torch.float32)
    outcome: Outcome = {"float32": exact, "equal": exact["gap"] < NEAR_TIE}
    if default != torch.float32:
        outcome[precision_name(default)] = _compare_greedy(subject, default)
    return outcome


def _compare_greedy(subject: Subject, precision: torch.dtype) -> Outcome:
    gpt, labels = subject.loaded(precision), subject.labels[:_GREEDY_IMAGES]
    params = replace(subject.params, temperature=0.0)
    config = EngineConfig(max_num_seqs=len(labels) * params.rows, lookahead="off")
    with limited_cpu_threads(gpt.config, subject.settings.device):
        engine = Engine(gpt, None, config)
        drawn = _codes(engine, labels, params)
        del engine  # its pages
        plain, gaps = _plain_greedy(gpt, labels, params, drawn)
    equal = plain == drawn
    # Only until the first difference do both go on from the same tokens.
    first = torch.where(equal.all(dim=1), 0, (~equal).int().argmax(dim=1))
    gap = gaps.gather(1, first[:, None]).max()
    return {
        "images": len(labels),
        "tokens": equal.numel(),
        "equal_tokens": int(equal.sum()),
        "equal_images": int(equal.all(dim=1).sum()),
        "gap": float(gap),
    }


def _codes(engine: Engine, labels: Sequence[int], params: SamplingParams) -> Tensor:
    requests = draw_all(engine, labels, [params] * len(labels))
    return torch.cat([request.codes for request in requests if request.codes is not None])


def _plain_greedy(
    gpt: Transformer, labels: Sequence[int], params: SamplingParams, others: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain loop's tokens, and how far below its likeliest token's logit another's logit is.

    Args:
        others: int32 [images, tokens] on the CPU.

    Returns:
        int32 [images, tokens], float32 [images, tokens], both on the CPU.
    """
    device = gpt.tok_embeddings.weight.device
    wanted, gaps = others.to(device).long(), torch.zeros(others.shape, device=device)

    def compare(step: int, logits: Tensor) -> None:
        of_other = logits.gather(1, wanted[:, step : step + 1])[:, 0]
        gaps[:, step] = logits.max(dim=1).values - of_other

    with ieee_float32():
        codes = generate(
            gpt,
            torch.tensor(labels, device=device),
            others.shape[1],
            cfg_scale=params.cfg_scale,
            cfg_interval=params.cfg_interval,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            sample_logits=False,
            on_logits=compare,
        )
    return codes.cpu(), gaps.cpu()


def check_lookahead(subject: Subject) -> Outcome:
    """The tokens that a pass keeps with the published sampling defaults, and whether all codes are
    those of one token a pass.

    Each setting has at most as many rows as make 64 positions a pass, which is where the order of a
    GPU's sums is fixed.
    """
    gpt, params, labels = subject.loaded(), subject.params, subject.labels
    expected: Tensor | None = None
    results: list[Outcome] = []
    for setting in ("off", *LOOKAHEAD_SETTINGS):
        window = 1 if isinstance(setting, str) else setting
        rows = min(len(labels) * params.rows, max(params.rows, MANY_ROWS // window))
        engine = Engine(gpt, None, EngineConfig(max_num_seqs=rows, lookahead=setting))
        with limited_cpu_threads(gpt.config, subject.settings.device):
            requests = draw_all(engine, labels, [params] * len(labels))
        codes = torch.cat([request.codes for request in requests if request.codes is not None])
        expected = codes if expected is None else expected
        results.append(
            {
                "lookahead": setting,
                "rows": rows,
                "tokens_a_pass": kept_a_pass(requests),
                "equal_images": int((codes == expected).all(dim=1).sum()),
            }
        )
        del engine
    equal = all(result["equal_images"] == len(labels) for result in results)
    return {"images": len(labels), "settings": results, "equal": equal}


def measure_speed(subject: Subject, repeats: int) -> Outcome:
    """The seconds of all labels at once by the engine, lookahead off and auto: the job of
    scripts/speedup_table.py.
    """
    settings = Settings(
        model=subject.settings,
        sampling=subject.params,
        labels=subject.labels,
        axes=None,
        compile=False,
        output=None,
        captions=False,
        individual=None,
        codes=None,
    )
    gpt, told = subject.loaded(), ("seconds", "repeats", "tokens_a_pass", "floor_seconds")
    outcome: Outcome = {"images": len(subject.labels)}
    for setting in ("off", "auto"):
        config = EngineConfig(lookahead="auto" if setting == "auto" else "off")
        timing = time_paged(gpt, settings, repeats, config)
        outcome[setting] = {name: timing[name] for name in told if name in timing}
    return outcome


def measure_fid(
    subject: Subject,
    images: int,
    reference: Path,
    folder: Path,
    device: str | None,
    engine_flags: Sequence[str] = (),
) -> Outcome:
    """FID and its kin of so many images, by the commands for them. The images stay in the folder,
    and a run that broke off goes on.

    Args:
        device: None: every GPU of the machine.
        engine_flags: how the images are drawn. The names of files do not tell, so that each way
            needs a folder of its own.

    Raises:
        UserError: one of the two commands failed; it has said why.
    """
    settings, found = subject.settings, subject.found
    published = next(
        (
            each
            for each in PUBLISHED_FIDS
            if (each.model, each.image_size) == (settings.gpt_model, settings.image_size)
        ),
        None,
    )
    cfg_scale = published.cfg_scale if published else _UNPUBLISHED_CFG_SCALE
    sampling = SamplingParams(cfg_scale=cfg_scale, top_k=0)
    evaluated_size = min(settings.image_size, _EVALUATED_SIZE)
    flags = {
        "gpt-model": settings.gpt_model,
        "gpt-ckpt": found.gpt,
        "vq-ckpt": found.vq,
        "image-size": settings.image_size,
        "image-size-eval": evaluated_size,
        "num-fid-samples": images,
        "global-seed": sampling.seed,
        "cfg-scale": sampling.cfg_scale,
        "top-k": sampling.top_k,
        "sample-dir": folder,
    }
    on_device = ["--device", device] if device else []
    typed = [word for name, value in flags.items() for word in (f"--{name}", value)]
    _run([_BULK, *typed, *on_device, *engine_flags])
    samples = folder / f"{job_name(settings, found, sampling, evaluated_size)}.npz"
    *_, last = ["", *_run([_EVALUATE, samples, reference, *on_device], captured=True).splitlines()]
    return {
        "images": images,
        "cfg_scale": cfg_scale,
        "published_fid": published and published.fid,
        "evaluation": _without_folders(json.loads(last)),
    }


def _without_folders(value: Any) -> Any:
    """The same with the names of files that exist in the place of their paths."""
    if isinstance(value, dict):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return Path(value).name if isinstance(value, str) and os.path.exists(value) else value


def _run(words: Sequence[object], *, captured: bool = False) -> str:
    """Runs one of our commands. Returns its stdout if that is captured."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE if captured else _STDERR, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{Path(command[1]).name} ended with status {done.returncode}")
    return done.stdout or ""


def precision_name(precision: torch.dtype) -> str:
    """As the flag --precision has it."""
    return next(name for name, dtype in PRECISIONS.items() if dtype == precision)
