"""Which model runs, with which weights, where.

`resolve_model` fills in what the user left out and checks it; `find_weights` then looks for the
weights. They come from the checkpoint that was named; else from a folder of pretrained models under
the published name; else, where that was asked for, from the hub; else they are drawn from the seed.
`missing_weights` tells of the last case, so that noise never passes as a picture.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from autoregressive.devices import PRECISIONS, default_precision, rank_devices, resolve_device
from autoregressive.errors import (
    Change,
    SettingError,
    SettingName,
    UserError,
    either,
    missing_extra,
)
from autoregressive.folders import can_be_written, in_checkout, pretrained_folder
from autoregressive.models.classes import ClassNames
from autoregressive.models.config import FFN_MULTIPLE, GPT_SHAPES
from autoregressive.models.defaults import ModelDefaults, model_defaults
from autoregressive.weights.checkpoint import loaded_quantization, stored_quantization
from autoregressive.weights.options import (
    ModelOptions,
    check_options,
    choose_gpt_model,
    choose_image_size,
    choose_vq_model,
    file_in,
    find_checkpoint,
)
from autoregressive.weights.published import (
    PUBLISHED_FILES,
    SHIPPED_FILES,
    PublishedFile,
    published_file,
)
from tokenizer.tokenizer_image.vq_config import VQ_CONFIGS


@dataclass(frozen=True)
class ModelSettings:
    """What to build, from which weights, and where: resolved, in range, and fitting together."""

    gpt_model: str
    vq_model: str
    gpt_ckpt: Path | None  # that the user named; None: look for the weights
    vq_ckpt: Path | None
    from_fsdp: bool
    ema: bool
    random_weights: bool
    download: bool
    folders: tuple[Path, ...]  # where weights are looked for; downloads go to the first
    image_size: int  # pixels of a side
    downsample_size: int  # pixels of a code's side
    codebook_size: int
    codebook_embed_dim: int
    num_classes: int
    precision: torch.dtype  # of the transformer; the tokenizer runs in float32, as LlamaGen's
    device: torch.device
    seed: int  # draws the weights that are not found
    note: str | None  # for the user, once the work begins: what is unusual though unasked

    @property
    def grid(self) -> int:
        """Side of the square of codes that makes an image."""
        return self.image_size // self.downsample_size

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image."""
        return self.grid**2

    @property
    def defaults(self) -> ModelDefaults:
        """The values that suit the model's family."""
        return model_defaults(self.gpt_model)

    @property
    def classes(self) -> ClassNames:
        """The names of the model's classes, by id."""
        return self.defaults.classes_of(self.num_classes)

    @property
    def published_gpt(self) -> PublishedFile | None:
        """The file of the transformer's weights; None if none are published for that size."""
        return published_file(self.gpt_model, self.image_size, self.downsample_size)


def resolve_model(options: ModelOptions, seed: int = 0) -> ModelSettings:
    """Fills in what was left out, and checks all that can be checked without loading weights.

    Args:
        seed: draws weights that are not found.

    Raises:
        UserError: a value is out of range, options contradict each other, a checkpoint is missing,
            or there is no such device.
    """
    check_options(options)
    gpt_model = choose_gpt_model(options)
    defaults = model_defaults(gpt_model)
    vq_model = choose_vq_model(options, defaults)
    tokenizer = VQ_CONFIGS[vq_model]
    device = resolve_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    typed, default, note = options.precision, default_precision(device), None
    if default == torch.float16 and typed in (None, "bf16"):
        major, minor = torch.cuda.get_device_capability(device)
        older = f"{device} has compute capability {major}.{minor}, and bf16 takes 8.0"
        if typed is not None:
            raise SettingError("precision", typed, f"{older}; use fp16 or none")
        note = f"{older}: the transformer runs in fp16"
    return ModelSettings(
        gpt_model=gpt_model,
        vq_model=vq_model,
        gpt_ckpt=find_checkpoint(options, "gpt_ckpt"),
        vq_ckpt=find_checkpoint(options, "vq_ckpt"),
        from_fsdp=options.from_fsdp,
        ema=options.ema,
        random_weights=options.random_weights,
        download=options.download,
        folders=options.folders,
        image_size=choose_image_size(options, gpt_model),
        downsample_size=tokenizer.downsample_size,
        codebook_size=options.codebook_size or tokenizer.codebook_size,
        codebook_embed_dim=options.codebook_embed_dim or tokenizer.codebook_embed_dim,
        num_classes=options.num_classes or defaults.num_classes,
        precision=default if typed is None else PRECISIONS[typed],
        device=device,
        seed=seed,
        note=note,
    )


def check_ranks(model: ModelSettings, count: int, engines: int = 1) -> None:
    """Checks that ranks can share a model, and that there are devices for them.

    Args:
        engines: that take so many ranks each.

    Raises:
        SettingError: they cannot, or there are too few GPUs, or GPUs of several kinds.
    """
    shape = replace(GPT_SHAPES[model.gpt_model], vocab_size=model.codebook_size)
    if count not in shape.rank_counts:
        told = (
            f"must divide the {shape.n_head} heads and the {shape.vocab_size} codes of "
            f"{model.gpt_model}, and its feed-forward width {shape.ffn_dim} into multiples of "
            f"{FFN_MULTIPLE}: use {either(shape.rank_counts)}"
        )
        raise SettingError("tensor_parallel_size", count, told)
    if model.device.type == "cpu" or count == 1:
        return
    first = torch.device("cuda", model.device.index or 0)
    needed, there = count * engines, torch.cuda.device_count() - first.index
    if needed > there:
        each = f", {count} for each of {engines} engines" if engines > 1 else ""
        told = f"takes {needed} GPUs{each}, and there are {there} from {model.device} on"
        raise SettingError("tensor_parallel_size", count, told)
    for engine in range(engines):
        ranks = rank_devices(torch.device("cuda", first.index + engine * count), count)
        kinds = [torch.cuda.get_device_capability(device) for device in ranks]
        if len(set(kinds)) > 1:  # they would round otherwise, and draw other tokens
            versions = ", ".join(f"{major}.{minor}" for major, minor in kinds)
            told = f"takes GPUs of one kind, and from {ranks[0]} on their compute capabilities are "
            raise SettingError("tensor_parallel_size", count, told + versions)


def smaller_precision(model: ModelSettings) -> list[Change]:
    """What to advise where memory is short: a precision of half the size, if there is one."""
    if model.precision != torch.float32:
        return []
    half = "fp16" if default_precision(model.device) == torch.float16 else "bf16"
    return [Change("use", "precision", half)]


@dataclass(frozen=True)
class FoundWeights:
    """Where the weights of each model are; None where they are drawn from the seed."""

    gpt: Path | None
    vq: Path | None
    ema: bool = False  # whether the averaged weights of the transformer's checkpoint are meant

    @cached_property
    def quantization(self) -> str | None:
        """How the transformer's checkpoint is quantised: fp8, int8, int4, or None. The first use
        opens it.

        Raises:
            CheckpointError: it is damaged, or quantised in a way that is not read here.
        """
        return None if self.gpt is None else stored_quantization(self.gpt, self.ema)

    def quantized_as(self, asked: str | None) -> str | None:
        """How the transformer's weights are quantised once they are loaded.

        Args:
            asked: as of `EngineConfig.quantization`.

        Raises:
            CheckpointError: as `quantization`, or the checkpoint is quantised in another way than
                was asked for.
        """
        if self.gpt is None:
            return asked
        return loaded_quantization(self.gpt, self.quantization, asked)

    @property
    def trained(self) -> bool:
        """Whether a picture made with them can be more than noise."""
        return self.gpt is not None and self.vq is not None


def find_weights(settings: ModelSettings) -> FoundWeights:
    """Looks where the module's docstring says, in that order; downloads if that was asked for.

    Raises:
        UserError: a download failed.
    """
    if settings.random_weights:
        return FoundWeights(None, None)
    gpt = settings.gpt_ckpt or _find_published(settings, settings.published_gpt)
    vq = settings.vq_ckpt or _find_published(settings, published_file(settings.vq_model))
    return FoundWeights(gpt, vq, settings.ema)


def _find_published(settings: ModelSettings, file: PublishedFile | None) -> Path | None:
    there = file_in(settings.folders, file) if file is not None else None
    if there is not None or not settings.download or file not in PUBLISHED_FILES:
        return there
    folder = settings.folders[0]
    if not can_be_written(folder):
        raise UserError(
            SettingName("download"),
            f": {folder} cannot be written; choose another ",
            SettingName("pretrained_dir"),
        )
    try:
        from autoregressive.weights.hub import fetch
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    return fetch(file, folder)


def missing_weights(settings: ModelSettings, found: FoundWeights) -> UserError | None:
    """The error where a model has no trained weights, which says how to get them; None if both
    have. It is for the caller to raise, or to tell as a warning.
    """
    size, grid, folder = settings.image_size, settings.grid, settings.folders[0]
    missing: dict[str, PublishedFile | None] = {}  # by the name for people
    if found.gpt is None:
        name = f"{settings.gpt_model} for {size} px in {grid} x {grid} tokens"
        missing[name] = settings.published_gpt
    if found.vq is None:
        missing[settings.vq_model] = published_file(settings.vq_model)
    if not missing:
        return None
    names, asked_for = " and ".join(missing), SettingName("random_weights")
    if settings.random_weights:
        return UserError(f"{names}: leave out ", asked_for, " to use trained weights")
    ways: list[str | SettingName] = []
    files = [file for file in missing.values() if file is not None]
    published = " and ".join(file.file_name for file in files if file in PUBLISHED_FILES)
    shipped = " and ".join(file.file_name for file in files if file in SHIPPED_FILES)
    if published:
        ways += [
            "get them with ",
            SettingName("download"),
            f", which puts {published} into {folder}; ",
        ]
    if shipped:
        here = folder == pretrained_folder() and in_checkout()
        fetch = "git checkout pretrained_models" if here else f"copy them into {folder}"
        ways += [f"{shipped} ship with the program: {fetch}; "]
    unpublished = " and ".join(name for name, file in missing.items() if file is None)
    if unpublished:
        sizes = [file.image_size for file in PUBLISHED_FILES if file.model == settings.gpt_model]
        others = f" (there are some for {' and '.join(map(str, sizes))} px)" if sizes else ""
        ways += [
            f"none are published for {unpublished}{others}: give your own with ",
            SettingName("gpt_ckpt"),
            "; ",
        ]
    return UserError(
        f"there are no trained weights for {names}: ", *ways, "or use ", asked_for, " for noise"
    )
