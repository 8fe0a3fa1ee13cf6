"""What the typed flags mean together: every value resolved, in range and fitting the others, before
any long work.

Flags not typed take the values of the chosen model, so only what the user typed can be a mismatch.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from autoregressive.devices import PRECISIONS, default_precision, resolve_device
from autoregressive.errors import UserError, either
from autoregressive.files import check_file, check_own_folder
from autoregressive.folders import in_checkout, pretrained_folder
from autoregressive.models.classes import ClassNames, numbered_classes
from autoregressive.models.defaults import (
    DEMO_MODEL,
    LARGEST_SCALE,
    LARGEST_TEMPERATURE,
    ModelDefaults,
    model_defaults,
)
from autoregressive.output.images import PICTURE_FORMATS, check_grid_fits, check_record_fits
from autoregressive.weights.finding import ModelSettings, file_in
from autoregressive.weights.published import (
    DEMO_GPT,
    PUBLISHED_FILES,
    PublishedFile,
    gpt_file_name,
    published_as,
)
from tokenizer.tokenizer_image.config import VQ_CONFIGS, VQConfig

T = TypeVar("T")

# of codebooks and data sets; what is larger is a slip of the keyboard, and would fill the memory
_LARGEST_SIZE = 10**6


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn; the names and meanings are those of `generate`, and `temperature` 0
    takes the likeliest token.
    """

    cfg_scale: float
    cfg_interval: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(frozen=True)
class OutputSettings:
    """Which files to write."""

    typed_grid: Path | None  # None: the default name, which says whether the weights are trained
    captions: bool
    individual: Path | None  # a folder, made if need be
    codes: Path | None

    def grid(self, *, trained: bool) -> Path:
        """The file that the grid goes to."""
        return self.typed_grid or Path("sample_c2i.png" if trained else "sample_c2i_untrained.png")


@dataclass(frozen=True)
class Settings:
    """Everything that a command was asked to do."""

    model: ModelSettings
    sampling: SamplingSettings
    output: OutputSettings
    labels: tuple[int, ...]  # one a picture
    classes: ClassNames
    compile: bool
    note: str | None = None  # for the user, once the work begins: what is not as usual, unasked


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and what belongs to it."""

    model: ModelSettings
    defaults: ModelDefaults
    classes: ClassNames
    note: str | None  # for the user, once the work begins: what is not as usual, unasked


def resolve_model_choice(arguments: argparse.Namespace, seed: int) -> ModelChoice:
    """The model's part of `resolve_settings`.

    Args:
        arguments: what a parser with `add_model_flags` parsed.
        seed: draws weights that are not found.

    Raises:
        UserError: as `resolve_settings`.
    """
    gpt_model = _choose_gpt_model(arguments)
    defaults = model_defaults(gpt_model)
    model = _resolve_model(arguments, gpt_model, defaults, seed)
    older_gpu = arguments.precision is None and model.precision == torch.float16
    note = f"{_why_not_bf16(model.device)}: the transformer runs in fp16" if older_gpu else None
    return ModelChoice(model, defaults, _classes(defaults, model.num_classes), note)


def resolve_settings(arguments: argparse.Namespace) -> Settings:
    """Fills in what was not typed and checks everything that can be checked without loading
    weights.

    Args:
        arguments: what `build_parser` parsed.

    Raises:
        UserError: a value out of range, an unknown class, flags that contradict each other, a
            missing checkpoint, no such device, a file that cannot be written. The message names the
            flag and what it allows.
    """
    seed = _or(arguments.seed, 0)
    _require(0 <= seed < 2**63, "--seed", seed, "0 to 2**63 - 1")
    choice = resolve_model_choice(arguments, seed)
    model = choice.model
    labels = _resolve_labels(arguments, model.gpt_model, model.num_classes)
    return Settings(
        model=model,
        sampling=_resolve_sampling(arguments, choice.defaults, seed),
        output=_resolve_output(arguments, labels, choice.classes, model.image_size),
        labels=labels,
        classes=choice.classes,
        compile=arguments.compile,
        note=choice.note,
    )


def list_classes(arguments: argparse.Namespace) -> str:
    """What --list-classes shows.

    Raises:
        UserError: no class name contains the word.
    """
    gpt_model = _choose_gpt_model(arguments)
    defaults = model_defaults(gpt_model)
    num_classes = _or(arguments.num_classes, defaults.num_classes)
    _require(
        1 <= num_classes <= _LARGEST_SIZE, "--num-classes", num_classes, f"1 to {_LARGEST_SIZE}"
    )
    with _naming_the_model(arguments, gpt_model):
        return _classes(defaults, num_classes).listing(arguments.list_classes)


def _choose_gpt_model(arguments: argparse.Namespace) -> str:
    if arguments.gpt_model is not None:
        return arguments.gpt_model
    if arguments.gpt_ckpt is not None:
        if arguments.gpt_ckpt.name == DEMO_GPT:
            return DEMO_MODEL
        published = _published_gpt(arguments)
        return published.model if published else "GPT-B"
    sizes = (
        model_defaults("GPT-B").image_sizes
        if arguments.image_size is None
        else [arguments.image_size]
    )
    there = any(_gpt_file_there(arguments, "GPT-B", size) for size in sizes)
    return "GPT-B" if there or arguments.download else DEMO_MODEL


def _choose_image_size(
    arguments: argparse.Namespace, gpt_model: str, defaults: ModelDefaults
) -> int:
    published = _published_gpt(arguments)
    size: int | None = arguments.image_size
    if size is None:
        if published is not None and published.image_size in defaults.image_sizes:
            return published.image_size
        if arguments.gpt_ckpt is not None or arguments.random_weights or arguments.download:
            return defaults.image_size
        best_first = (defaults.image_size, *defaults.image_sizes)
        there = (
            candidate
            for candidate in best_first
            if _gpt_file_there(arguments, gpt_model, candidate)
        )
        return next(there, defaults.image_size)
    check_image_size(
        gpt_model, size, hint="" if arguments.gpt_model else "; name another model with --gpt-model"
    )
    if published is not None and published.image_size != size:
        raise UserError(
            f"--image-size {size}: {arguments.gpt_ckpt.name} makes pictures of "
            f"{published.image_size} px"
        )
    return size


def check_image_size(gpt_model: str, size: int, *, hint: str = "") -> None:
    """Raises `UserError`, with the hint at its end, unless the model makes pictures of
    that size.
    """
    sizes = model_defaults(gpt_model).image_sizes
    _require(size in sizes, "--image-size", size, f"{either(sizes)} for {gpt_model}{hint}")


def _published_gpt(arguments: argparse.Namespace) -> PublishedFile | None:
    published = published_as(arguments.gpt_ckpt) if arguments.gpt_ckpt else None
    return published if published and published.image_size else None


def _gpt_file_there(arguments: argparse.Namespace, gpt_model: str, image_size: int) -> bool:
    downsample = VQ_CONFIGS[_choose_vq_model(arguments, model_defaults(gpt_model))].downsample_size
    file_name = gpt_file_name(gpt_model, image_size, downsample)
    return file_in(_or(arguments.pretrained_dir, pretrained_folder()), file_name) is not None


def _choose_vq_model(arguments: argparse.Namespace, defaults: ModelDefaults) -> str:
    if arguments.vq_model is not None:
        return arguments.vq_model
    published = published_as(arguments.vq_ckpt) if arguments.vq_ckpt else None
    if published is not None and published.image_size is None:
        return published.model
    wanted = _or(arguments.downsample_size, VQ_CONFIGS[defaults.vq_model].downsample_size)
    fitting = [name for name, config in VQ_CONFIGS.items() if config.downsample_size == wanted]
    sizes = sorted({config.downsample_size for config in VQ_CONFIGS.values()})
    _require(bool(fitting), "--downsample-size", wanted, either(sizes))
    return defaults.vq_model if defaults.vq_model in fitting else fitting[0]


def _resolve_model(
    arguments: argparse.Namespace, gpt_model: str, defaults: ModelDefaults, seed: int
) -> ModelSettings:
    if arguments.gpt_type == "t2i":
        raise UserError(
            "--gpt-type t2i: text to image is not supported; this program draws classes (c2i)"
        )
    _require(arguments.cls_token_num in (None, 1), "--cls-token-num", arguments.cls_token_num, "1")
    vq_model = _choose_vq_model(arguments, defaults)
    tokenizer: VQConfig = VQ_CONFIGS[vq_model]
    downsample = tokenizer.downsample_size
    typed_downsample = _or(arguments.downsample_size, downsample)
    _require(
        typed_downsample == downsample,
        "--downsample-size",
        typed_downsample,
        f"{downsample} for {vq_model}",
    )
    for flag, typed in (
        ("--codebook-size", arguments.codebook_size),
        ("--codebook-embed-dim", arguments.codebook_embed_dim),
        ("--num-classes", arguments.num_classes),
    ):
        _require(typed is None or 1 <= typed <= _LARGEST_SIZE, flag, typed, f"1 to {_LARGEST_SIZE}")
    pretrained = _or(arguments.pretrained_dir, pretrained_folder())
    gpt_ckpt = _resolve_checkpoint(
        "--gpt-ckpt", arguments.gpt_ckpt, pretrained, arguments.random_weights
    )
    vq_ckpt = _resolve_checkpoint(
        "--vq-ckpt", arguments.vq_ckpt, pretrained, arguments.random_weights
    )
    if arguments.ema and arguments.gpt_ckpt is None:
        raise UserError(
            "--ema goes with --gpt-ckpt: it picks the averaged weights out of a training checkpoint"
        )
    device = resolve_device(_or(arguments.device, "cuda" if torch.cuda.is_available() else "cpu"))
    return ModelSettings(
        gpt_model=gpt_model,
        vq_model=vq_model,
        gpt_ckpt=gpt_ckpt,
        vq_ckpt=vq_ckpt,
        from_fsdp=arguments.from_fsdp,
        ema=arguments.ema,
        random_weights=arguments.random_weights,
        download=arguments.download,
        pretrained=pretrained,
        image_size=_choose_image_size(arguments, gpt_model, defaults),
        downsample_size=downsample,
        codebook_size=_or(arguments.codebook_size, tokenizer.codebook_size),
        codebook_embed_dim=_or(arguments.codebook_embed_dim, tokenizer.codebook_embed_dim),
        num_classes=_or(arguments.num_classes, defaults.num_classes),
        precision=_resolve_precision(arguments.precision, device),
        device=device,
        seed=seed,
    )


def _resolve_precision(typed: str | None, device: torch.device) -> torch.dtype:
    default = default_precision(device)
    if typed == "bf16" and default == torch.float16:
        raise UserError(f"--precision bf16: {_why_not_bf16(device)}; use fp16 or none")
    return default if typed is None else PRECISIONS[typed]


def _why_not_bf16(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} has compute capability {major}.{minor}, and bf16 takes 8.0"


def smaller_precision(model: ModelSettings) -> list[str]:
    """What to advise where memory is short: a precision of half the size, if there is one."""
    if model.precision != torch.float32:
        return []
    return [
        f"use --precision {'fp16' if default_precision(model.device) == torch.float16 else 'bf16'}"
    ]


def _resolve_checkpoint(
    flag: str, typed: Path | None, pretrained: Path, random_weights: bool
) -> Path | None:
    """The checkpoint as typed; a bare name that is not in the current folder may be in that of the
    pretrained models.
    """
    if typed is None:
        return None
    if random_weights:
        raise UserError(f"{flag} and --random-weights contradict each other: leave one out")
    places = [typed, pretrained / typed] if len(typed.parts) == 1 else [typed]
    for place in places:
        if os.path.exists(place):  # Path.exists raises where the name is too long
            return place
    also = f", nor in {pretrained}" if len(places) > 1 else ""
    get = ""
    if typed.name in {published.file_name for published in PUBLISHED_FILES}:
        script = f"get it with python scripts/download_models.py {typed.name}"
        get = f"; {script if in_checkout() else f'leave out {flag} and add --download'}"
    raise UserError(f"{flag} {typed}: there is no such file or folder{also}{get}")


def _resolve_sampling(
    arguments: argparse.Namespace, defaults: ModelDefaults, seed: int
) -> SamplingSettings:
    settings = SamplingSettings(
        cfg_scale=_or(arguments.cfg_scale, defaults.cfg_scale),
        cfg_interval=_or(arguments.cfg_interval, defaults.cfg_interval),
        temperature=_or(arguments.temperature, defaults.temperature),
        top_k=_or(arguments.top_k, defaults.top_k),
        top_p=_or(arguments.top_p, defaults.top_p),
        seed=seed,
    )
    scale, temperature = settings.cfg_scale, settings.temperature
    _require(0 <= scale <= LARGEST_SCALE, "--cfg-scale", scale, f"0 to {LARGEST_SCALE:g}")
    _require(settings.cfg_interval >= -1, "--cfg-interval", settings.cfg_interval, "-1 or more")
    fits = 0 <= temperature <= LARGEST_TEMPERATURE
    _require(fits, "--temperature", temperature, f"0 (greedy) to {LARGEST_TEMPERATURE:g}")
    _require(0 <= settings.top_k < 2**31, "--top-k", settings.top_k, "0 (all) to 2**31 - 1")
    _require(0 < settings.top_p <= 1, "--top-p", settings.top_p, "above 0 and at most 1")
    return settings


def _resolve_output(
    arguments: argparse.Namespace, labels: Sequence[int], classes: ClassNames, side: int
) -> OutputSettings:
    output = OutputSettings(
        typed_grid=arguments.output,
        captions=arguments.captions,
        individual=arguments.save_individual,
        codes=arguments.save_codes,
    )
    for trained in (True, False):  # which of the default names it will be is not known yet
        check_file("--output", output.grid(trained=trained), *PICTURE_FORMATS)
    grid = output.grid(trained=True)
    check_grid_fits("--output", grid, len(labels), side, captions=output.captions)
    check_record_fits("--output", grid, labels, [classes[label] for label in labels])
    if output.codes is not None:
        check_file("--save-codes", output.codes, ".npy")
    if output.individual is not None:
        check_own_folder("--save-individual", output.individual)
    return output


def _resolve_labels(
    arguments: argparse.Namespace, gpt_model: str, num_classes: int
) -> tuple[int, ...]:
    defaults = model_defaults(gpt_model)
    if arguments.class_labels is not None:
        classes = _classes(defaults, num_classes)
        with _naming_the_model(arguments, gpt_model):
            return tuple(classes.resolve(wanted) for wanted in arguments.class_labels)
    if num_classes == defaults.num_classes:
        return defaults.class_labels
    return tuple(range(min(num_classes, len(defaults.class_labels))))


@contextmanager
def _naming_the_model(arguments: argparse.Namespace, gpt_model: str) -> Iterator[None]:
    """Adds to an error about classes whose classes they are, where the user may not know: the model
    was not typed.
    """
    try:
        yield
    except UserError as error:
        if arguments.gpt_model is not None or arguments.num_classes is not None:
            raise
        other = "; --gpt-model GPT-B has ImageNet's" if gpt_model == DEMO_MODEL else ""
        raise UserError(f"{error}; these are the classes of {gpt_model}{other}") from error


def _classes(defaults: ModelDefaults, num_classes: int) -> ClassNames:
    return (
        defaults.classes if num_classes == defaults.num_classes else numbered_classes(num_classes)
    )


def _or(typed: T | None, otherwise: T) -> T:
    return otherwise if typed is None else typed


def _require(holds: bool, flag: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{flag} {value}: must be {allowed}")
