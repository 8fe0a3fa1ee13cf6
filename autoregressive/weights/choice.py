"""Which model runs, with which weights, where: every value resolved, in range, and fitting the
others, before any long work.
"""

from dataclasses import dataclass

import torch

from autoregressive.devices import PRECISIONS, default_precision, resolve_device
from autoregressive.errors import Change, SettingError, SettingName, UserError
from autoregressive.models.classes import ClassNames
from autoregressive.models.defaults import ModelDefaults, model_defaults
from autoregressive.weights.finding import ModelSettings
from autoregressive.weights.options import (
    SIZES,
    ModelOptions,
    check_options,
    check_size,
    choose_gpt_model,
    choose_image_size,
    choose_vq_model,
    chosen_classes,
    require,
    resolve_checkpoint,
)
from tokenizer.tokenizer_image.config import VQ_CONFIGS


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and what belongs to it."""

    model: ModelSettings
    defaults: ModelDefaults
    classes: ClassNames
    note: str | None  # for the user, once the work begins: what is unusual though unasked


def resolve_model(options: ModelOptions, seed: int = 0) -> ModelChoice:
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
    if options.gpt_type == "t2i":
        told = "text to image is not supported; this program draws classes (c2i)"
        raise SettingError("gpt_type", "t2i", told)
    require(options.cls_token_num in (None, 1), "cls_token_num", options.cls_token_num, "1")
    vq_model = choose_vq_model(options, defaults)
    tokenizer = VQ_CONFIGS[vq_model]
    downsample = tokenizer.downsample_size
    fits = options.downsample_size in (None, downsample)
    allowed = f"{downsample} for {vq_model}"
    require(fits, "downsample_size", options.downsample_size, allowed)
    for setting in SIZES:
        check_size(setting, getattr(options, setting))
    gpt_ckpt = resolve_checkpoint(options, "gpt_ckpt")
    vq_ckpt = resolve_checkpoint(options, "vq_ckpt")
    if options.ema and options.gpt_ckpt is None:
        picks = ": it picks the averaged weights out of a training checkpoint"
        raise UserError(SettingName("ema"), " goes with ", SettingName("gpt_ckpt"), picks)
    device = resolve_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = ModelSettings(
        gpt_model=gpt_model,
        vq_model=vq_model,
        gpt_ckpt=gpt_ckpt,
        vq_ckpt=vq_ckpt,
        from_fsdp=options.from_fsdp,
        ema=options.ema,
        random_weights=options.random_weights,
        download=options.download,
        folders=options.folders,
        image_size=choose_image_size(options, gpt_model),
        downsample_size=downsample,
        codebook_size=options.codebook_size or tokenizer.codebook_size,
        codebook_embed_dim=options.codebook_embed_dim or tokenizer.codebook_embed_dim,
        num_classes=options.num_classes or defaults.num_classes,
        precision=_resolve_precision(options.precision, device),
        device=device,
        seed=seed,
    )
    older_gpu = options.precision is None and model.precision == torch.float16
    note = f"{_why_not_bf16(device)}: the transformer runs in fp16" if older_gpu else None
    return ModelChoice(model, defaults, chosen_classes(options), note)


def smaller_precision(model: ModelSettings) -> list[Change]:
    """What to advise where memory is short: a precision of half the size, if there is one."""
    if model.precision != torch.float32:
        return []
    half = "fp16" if default_precision(model.device) == torch.float16 else "bf16"
    return [Change("use", "precision", half)]


def _resolve_precision(name: str | None, device: torch.device) -> torch.dtype:
    default = default_precision(device)
    if name is None:
        return default
    if name == "bf16" and default == torch.float16:
        raise SettingError("precision", name, f"{_why_not_bf16(device)}; use fp16 or none")
    return PRECISIONS[name]


def _why_not_bf16(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} has compute capability {major}.{minor}, and bf16 takes 8.0"
