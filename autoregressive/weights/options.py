"""The options by which a user chooses a model, and which model they mean.

Options that are left out take the values of the chosen model, so that only what the user said can
be a mismatch. Nothing here imports torch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

from autoregressive.errors import SettingError, SettingName, UserError, did_you_mean, either
from autoregressive.folders import pretrained_folders
from autoregressive.models.classes import ClassNames
from autoregressive.models.config import GPT_SHAPES
from autoregressive.models.defaults import DEMO_MODEL, ModelDefaults, model_defaults
from autoregressive.models.sampling_params import Bounds
from autoregressive.weights.published import (
    PUBLISHED_FILES,
    PublishedFile,
    published_as,
    published_file,
)
from tokenizer.tokenizer_image.vq_config import VQ_CONFIGS

# What is larger is a slip of the keyboard, and would fill the memory.
_SIZE = Bounds(Integral, 1, 10**6, "1 to 1000000")
_BOUNDS = {
    "image_size": _SIZE,
    "downsample_size": _SIZE,
    "codebook_size": _SIZE,
    "codebook_embed_dim": _SIZE,
    "num_classes": _SIZE,
    "cls_token_num": Bounds(Integral, 1, 1, "1"),
}
_NAMES = {
    "gpt_model": list(GPT_SHAPES),
    "vq_model": list(VQ_CONFIGS),
    "gpt_type": ["c2i", "t2i"],
    "precision": ["none", "fp16", "bf16"],
}


@dataclass(frozen=True)
class ModelOptions:
    """What was said about the model, its weights, and where it runs; None: nothing.

    The names are those of the commands' flags.
    """

    gpt_model: str | None = None
    gpt_ckpt: Path | None = None
    vq_model: str | None = None
    vq_ckpt: Path | None = None
    gpt_type: str | None = None
    cls_token_num: int | None = None
    image_size: int | None = None  # pixels of a side
    downsample_size: int | None = None  # pixels of a code's side
    codebook_size: int | None = None
    codebook_embed_dim: int | None = None
    num_classes: int | None = None
    precision: str | None = None  # "none", "fp16" or "bf16"
    device: str | None = None  # "cpu", "cuda" or "cuda:N"
    from_fsdp: bool = False
    ema: bool = False
    random_weights: bool = False
    download: bool = False
    pretrained_dir: Path | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where weights are looked for; downloads go to the first."""
        return (self.pretrained_dir,) if self.pretrained_dir else pretrained_folders()

    @property
    def published_gpt(self) -> PublishedFile | None:
        """The published transformer that `gpt_ckpt` is named after."""
        published = published_as(self.gpt_ckpt)
        return published if published and published.image_size else None


def check_options(options: ModelOptions) -> None:
    """Checks all that can be checked without a look at the device.

    Raises:
        UserError: there is no such model, a value is out of range, options contradict each other,
            or a checkpoint is missing.
    """
    for setting, known in _NAMES.items():
        name = getattr(options, setting)
        if name is not None and name not in known:
            told = did_you_mean(str(name), known) or f": use {either(known)}"
            raise SettingError(setting, name, f"there is no such choice{told}")
    _check_sizes(options)
    if options.gpt_type == "t2i":
        raise SettingError(
            "gpt_type", "t2i", "text to image is not supported; this program draws classes (c2i)"
        )
    for setting in ("gpt_ckpt", "vq_ckpt"):
        find_checkpoint(options, setting)
    if options.ema and options.gpt_ckpt is None:
        raise UserError(
            SettingName("ema"),
            " goes with ",
            SettingName("gpt_ckpt"),
            ": it picks the averaged weights out of a training checkpoint",
        )
    gpt_model = choose_gpt_model(options)
    choose_image_size(options, gpt_model)
    vq_model = choose_vq_model(options, model_defaults(gpt_model))
    downsample = VQ_CONFIGS[vq_model].downsample_size
    if options.downsample_size not in (None, downsample):
        raise SettingError(
            "downsample_size", options.downsample_size, f"must be {downsample} for {vq_model}"
        )


def _check_sizes(options: ModelOptions) -> None:
    for setting, bounds in _BOUNDS.items():
        value = getattr(options, setting)
        if value is not None:
            bounds.check(setting, value)


def choose_gpt_model(options: ModelOptions) -> str:
    """The transformer that is meant."""
    if options.gpt_model is not None:
        return options.gpt_model
    if options.gpt_ckpt is not None:
        return options.published_gpt.model if options.published_gpt else "GPT-B"
    sizes = (options.image_size,) if options.image_size else model_defaults("GPT-B").image_sizes
    there = any(_gpt_file_there(options, "GPT-B", size) for size in sizes)
    return "GPT-B" if there or options.download else DEMO_MODEL


def choose_vq_model(options: ModelOptions, defaults: ModelDefaults) -> str:
    """The tokenizer that is meant.

    Raises:
        SettingError: no tokenizer has that downsample size.
    """
    if options.vq_model is not None:
        return options.vq_model
    published = published_as(options.vq_ckpt)
    if published is not None and published.image_size is None:
        return published.model
    for name in (defaults.vq_model, *VQ_CONFIGS):
        if options.downsample_size in (None, VQ_CONFIGS[name].downsample_size):
            return name
    sizes = sorted({config.downsample_size for config in VQ_CONFIGS.values()})
    raise SettingError("downsample_size", options.downsample_size, f"must be {either(sizes)}")


def choose_image_size(options: ModelOptions, gpt_model: str) -> int:
    """Pixels of a side of the images that are meant.

    Raises:
        SettingError: the model makes no images of that size.
    """
    published, defaults = options.published_gpt, model_defaults(gpt_model)
    size = options.image_size
    if size is None:
        if published is not None and published.image_size in defaults.image_sizes:
            return published.image_size
        if options.gpt_ckpt is not None or options.random_weights or options.download:
            return defaults.image_size
        best_first = (defaults.image_size, *defaults.image_sizes)
        there = (one for one in best_first if _gpt_file_there(options, gpt_model, one))
        return next(there, defaults.image_size)
    check_image_size(gpt_model, size, named=options.gpt_model is not None)
    if options.gpt_ckpt is not None and published is not None and published.image_size != size:
        raise SettingError(
            "image_size",
            size,
            f"{options.gpt_ckpt.name} makes pictures of {published.image_size} px",
        )
    return size


def check_image_size(gpt_model: str, size: int, *, named: bool = True) -> None:
    """Checks that a model makes pictures of that size.

    Args:
        named: whether the user has named the model.

    Raises:
        SettingError: it does not.
    """
    sizes = model_defaults(gpt_model).image_sizes
    if size not in sizes:
        another = SettingName("gpt_model", "; name another model with {}")
        told = f"must be {either(sizes)} for {gpt_model}"
        raise SettingError("image_size", size, [told] if named else [told, another])


def _gpt_file_there(options: ModelOptions, gpt_model: str, image_size: int) -> bool:
    vq_model = choose_vq_model(options, model_defaults(gpt_model))
    published = published_file(gpt_model, image_size, VQ_CONFIGS[vq_model].downsample_size)
    return published is not None and file_in(options.folders, published) is not None


def file_in(folders: tuple[Path, ...], published: PublishedFile) -> Path | None:
    """The file of that name, or of the same name but ending in .safetensors: its conversion."""
    candidates = [folder / published.file_name for folder in folders]
    candidates += [path.with_suffix(".safetensors") for path in candidates]
    # Path.exists raises where a name is too long.
    return next((path for path in candidates if os.path.exists(path)), None)


def find_checkpoint(options: ModelOptions, setting: str) -> Path | None:
    """The checkpoint that was named. A bare name may be that of a file among the pretrained models.

    Args:
        setting: "gpt_ckpt" or "vq_ckpt".

    Raises:
        UserError: there is no such file or folder, or the weights were to be random.
    """
    typed: Path | None = getattr(options, setting)
    if typed is None:
        return None
    if options.random_weights:
        raise UserError(
            SettingName(setting),
            " and ",
            SettingName("random_weights"),
            " contradict each other: leave one out",
        )
    bare = len(typed.parts) == 1
    for place in (typed, *(folder / typed for folder in options.folders if bare)):
        if os.path.exists(place):  # Path.exists raises where the name is too long
            return place
    also = f", nor in {options.folders[0]}" if bare else ""
    told: list[str | SettingName] = [f"there is no such file or folder{also}"]
    if typed.name in {published.file_name for published in PUBLISHED_FILES}:
        told += ["; leave out ", SettingName(setting), " and add ", SettingName("download")]
    raise SettingError(setting, typed, told)


def chosen_classes(options: ModelOptions) -> ClassNames:
    """The classes of the model that is meant. Where the user has not named it, a message about an
    unknown class does.

    Raises:
        SettingError: no data set has so many classes.
    """
    _check_sizes(options)
    gpt_model = choose_gpt_model(options)
    defaults = model_defaults(gpt_model)
    classes = defaults.classes_of(options.num_classes or defaults.num_classes)
    if options.gpt_model is not None or options.num_classes is not None:
        return classes
    note: list[str | SettingName] = [f"; these are the classes of {gpt_model}"]
    if gpt_model == DEMO_MODEL:
        note += ["; ", SettingName("gpt_model"), " GPT-B has ImageNet's"]
    return replace(classes, note=tuple(note))


def resolve_labels(options: ModelOptions, wanted: Sequence[int | str] | None) -> tuple[int, ...]:
    """The ids of classes; None: the model's own choice. Digits are an id, else a name in any case
    (`ClassNames.resolve`).

    Raises:
        UserError: there is no such class.
    """
    classes = chosen_classes(options)
    if wanted is not None:
        return tuple(map(classes.resolve, wanted))
    defaults = model_defaults(choose_gpt_model(options))
    if options.num_classes in (None, defaults.num_classes):
        return defaults.class_labels
    return tuple(range(len(classes)))[: len(defaults.class_labels)]
