"""The work of scripts/verify_published.py: what can be checked and measured with published weights.

A check that fails does not stop the others. The report holds names of files, and neither their
folders nor anything else about the machine but its device and the versions of the software.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from autoregressive.benchmarks.guessing import draw_all, kept_a_pass
from autoregressive.benchmarks.harness import use_device
from autoregressive.benchmarks.script import Table, give_figures
from autoregressive.benchmarks.speedup import ROOT, code_version, time_paged
from autoregressive.cli.drawing import Settings
from autoregressive.devices import PRECISIONS, ieee_float32, limited_cpu_threads
from autoregressive.errors import SettingName, UserError, missing_extra, one_line, tell
from autoregressive.files import file_sha256, write_whole
from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.output.records import device_name, sampling_record
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig, LookaheadSetting
from autoregressive.version import program_version
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


# --- the checks ---


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
        outcome[_name_of(default)] = _compare_greedy(subject, default)
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
        compile=False,
        output=None,
        captions=False,
        individual=None,
        codes=None,
    )
    gpt, told = subject.loaded(), ("seconds", "repeats", "tokens_a_pass", "floor_seconds")
    outcome: Outcome = {"images": len(subject.labels)}
    for setting in ("off", "auto"):
        timing = time_paged(gpt, settings, repeats, "auto" if setting == "auto" else "off")
        outcome[setting] = {name: timing[name] for name in told if name in timing}
    return outcome


def measure_fid(
    subject: Subject, images: int, reference: Path, folder: Path, device: str | None
) -> Outcome:
    """FID and its kin of so many images, by the commands for them. The images stay in the folder,
    and a run that broke off goes on.

    Args:
        device: None: every GPU of the machine.

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
    evaluated_size = min(settings.image_size, _EVALUATED_SIZE)
    flags = {
        "gpt-model": settings.gpt_model,
        "gpt-ckpt": found.gpt,
        "vq-ckpt": found.vq,
        "image-size": settings.image_size,
        "image-size-eval": evaluated_size,
        "num-fid-samples": images,
        "global-seed": 0,
        "cfg-scale": cfg_scale,
        "top-k": 0,
        "sample-dir": folder,
    }
    on_device = ["--device", device] if device else []
    typed = [word for name, value in flags.items() for word in (f"--{name}", value)]
    _run([_BULK, *typed, *on_device])
    weights = Path(str(found.gpt)).stem
    samples = folder / (
        f"{settings.gpt_model}-{weights}-size-{settings.image_size}-size-{evaluated_size}-"
        f"{settings.vq_model}-topk-0-topp-1.0-temperature-1.0-cfg-{cfg_scale}-seed-0.npz"
    )
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


# --- the report ---


def has_failed(outcome: Outcome) -> bool:
    """Whether a check found something that must be equal and is not, or could not be carried
    out.
    """
    return "error" in outcome or outcome.get("equal") is False


def verify(subject: Subject, checks: Mapping[str, Callable[[], Outcome]]) -> Outcome:
    """The outcomes of all checks of a model, by their names; what they say goes to stderr."""
    settings = subject.settings
    entry: Outcome = {
        "model": settings.gpt_model,
        "image_size": settings.image_size,
        "precision": _name_of(settings.precision),
        "sampling": sampling_record(subject.params),
    }
    for name, check in checks.items():
        tell(f"{subject.name}: {name}")
        try:
            entry[name] = check()
        except Exception as error:  # whatever it is, it is reported, and the others go on
            # The message may name folders, and is not for the report.
            entry[name] = {"error": type(error).__name__}
            tell(f"{subject.name}: {name}: {type(error).__name__}: {one_line(str(error))}")
        gc.collect()  # the check's models and engines
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    entry["failed"] = [name for name in checks if has_failed(entry[name])]
    return entry


def _row(entry: Outcome) -> list[object]:
    """A model's line of the table; None where a check has no figure."""
    greedy, speed = entry["greedy"].get("float32"), entry["speed"]
    share = greedy and greedy["equal_tokens"] / greedy["tokens"]
    kept = {each["lookahead"]: each for each in entry["lookahead"].get("settings", ())}
    fid = entry.get("fid", {}).get("evaluation", {})
    return [
        entry["model"],
        entry["image_size"],
        {True: "yes", False: "NO", None: None}[entry["files"].get("equal")],
        share,
        *(kept[each]["tokens_a_pass"] if kept else None for each in LOOKAHEAD_SETTINGS),
        *(speed[each]["seconds"] if each in speed else None for each in ("off", "auto")),
        fid.get("fid"),
        ", ".join(entry["failed"]) or "nothing",
    ]


_COLUMNS = {
    "model": "<8",
    "px": ">4",
    "files": ">6",
    "greedy": ">7.1%",
    **{f"W={setting}": ">6.2f" for setting in LOOKAHEAD_SETTINGS},
    "off, s": ">8.3f",
    "auto, s": ">8.3f",
    "FID": ">6.2f",
    "failed": "<",
}


def _hub_hashes(chosen: Sequence[Subject]) -> dict[str, str]:
    """What the hub states of the published files that are here."""
    try:
        from autoregressive.weights.hub import stated_sha256
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    names = {
        file
        for subject in chosen
        for file in (subject.settings.published_gpt, published_file(subject.settings.vq_model))
    }
    return {file.file_name: stated_sha256(file) for file in PUBLISHED_FILES if file in names}


def _name_of(precision: torch.dtype) -> str:
    return next(name for name, dtype in PRECISIONS.items() if dtype == precision)


def run(arguments: argparse.Namespace) -> None:
    """Checks every model, and writes the report after each. Exit status 1 if a check failed.

    Raises:
        UserError: weights are missing, flags contradict each other, or the hub cannot be asked.
    """
    if (arguments.fid is None) != (arguments.reference is None):
        raise UserError("--fid and --reference go together: give both, or leave both out")
    if arguments.reference is not None and not arguments.reference.is_file():
        raise UserError(SettingName("reference"), f" {arguments.reference}: there is no such file")
    # Hours of drawing would come before the evaluation finds out.
    if arguments.fid is not None and find_spec("torch_fidelity") is None:
        raise UserError("--fid: torch_fidelity is missing: pip install 'llamagen-serve[eval]'")
    device = use_device(arguments.device)
    chosen = subjects(
        arguments.models,
        arguments.image_size,
        arguments.images,
        arguments.pretrained_dir,
        device,
    )
    stated = _hub_hashes(chosen) if arguments.ask_hub else {}
    report: Outcome = {"benchmark": "verify_published", **_about(device), "models": []}
    table = Table(_COLUMNS)
    for subject in chosen:
        entry = verify(subject, _checks(subject, stated, arguments))
        report["models"].append(entry)
        table.row(*_row(entry))
        write_whole(
            arguments.output, lambda part: part.write_text(json.dumps(report, indent=1) + "\n")
        )
    give_figures(report, arguments.output)
    if any(entry["failed"] for entry in report["models"]):
        sys.exit(1)


def _checks(
    subject: Subject, stated: Mapping[str, str], arguments: argparse.Namespace
) -> dict[str, Callable[[], Outcome]]:
    checks = {
        "files": lambda: check_files(subject, stated),
        "greedy": lambda: check_greedy(subject),
        "lookahead": lambda: check_lookahead(subject),
        "speed": lambda: measure_speed(subject, arguments.repeats),
    }
    if arguments.fid is not None:
        checks["fid"] = lambda: measure_fid(
            subject, arguments.fid, arguments.reference, arguments.sample_dir, arguments.device
        )
    return checks


def _about(device: torch.device) -> Outcome:
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "compute_capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        "version": program_version(),
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
    }
