"""Builds both models with the weights that were found, or with random ones."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoregressive.models.gpt import GPT_models, Transformer, init_weight
from autoregressive.models.ranks import ALONE, Rank, WeightPart
from autoregressive.weights.checkpoint import load_weights
from autoregressive.weights.finding import FoundWeights, ModelSettings
from autoregressive.weights.quantized import quantize_products
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel


@dataclass(frozen=True)
class LoadedModels:
    """Both models in eval mode on the device: the transformer in the chosen precision, its layers'
    products quantised if that was asked for or the checkpoint is, and the tokenizer in float32.
    """

    gpt: Transformer
    vq: VQModel


def load_models(
    settings: ModelSettings,
    found: FoundWeights,
    quantization: str | None = None,
    rank: Rank = ALONE,
) -> LoadedModels:
    """Builds both models with the weights that were found, each directly on its device and in its
    dtype.

    Args:
        quantization: as of `load_weights`.
        rank: whose part of the transformer is built; nothing else of it is read.

    Raises:
        CheckpointError: a checkpoint is damaged, belongs to another model, or is quantised in
            another way.
    """
    gpt = load_gpt(settings, found.gpt, found.quantized_as(quantization), rank)
    return LoadedModels(gpt, _load_vq(settings, found.vq))


def load_gpt(
    settings: ModelSettings,
    path: Path | None,
    quantization: str | None = None,
    rank: Rank = ALONE,
) -> Transformer:
    """Builds one rank's part of the transformer.

    Raises:
        CheckpointError: as `load_models`.
    """
    with torch.device("meta"):
        model = GPT_models[settings.gpt_model](
            vocab_size=settings.codebook_size,
            block_size=settings.tokens_per_image,
            num_classes=settings.num_classes,
            ranks=rank.count,
        )
    if path is None:
        model = model.to(settings.precision).to_empty(device=settings.device)
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        for name, parameter in model.named_parameters():
            _draw_weight(parameter, rank.part_of(name), generator)
        if quantization is not None:
            quantize_products(model, quantization)
    else:
        load_weights(
            model,
            path,
            device=settings.device,
            dtype=settings.precision,
            ema=settings.ema,
            from_fsdp=settings.from_fsdp,
            quantization=quantization,
            rank=rank,
        )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _draw_weight(weight: Tensor, part: WeightPart | None, generator: torch.Generator) -> None:
    """Draws a parameter, or the same part of it that one rank alone would have drawn."""
    if part is None:
        init_weight(weight, generator)
        return
    whole = torch.empty(part.whole_shape(weight.shape), dtype=weight.dtype, device=weight.device)
    init_weight(whole, generator)
    part.copy_from(whole, weight)


def _load_vq(settings: ModelSettings, path: Path | None) -> VQModel:
    build = functools.partial(
        VQ_models[settings.vq_model],
        codebook_size=settings.codebook_size,
        codebook_embed_dim=settings.codebook_embed_dim,
    )
    if path is None:
        devices = [settings.device] if settings.device.type == "cuda" else []
        with torch.random.fork_rng(devices), settings.device:
            torch.manual_seed(settings.seed)
            model = build()
    else:
        with torch.device("meta"):
            model = build()
        load_weights(model, path, device=settings.device, dtype=torch.float32)
    return model.eval().requires_grad_(False)
