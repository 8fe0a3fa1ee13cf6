"""Builds both models with the weights that were found, or with random ones."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from autoregressive.models.gpt import GPT_models, Transformer
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
    settings: ModelSettings, found: FoundWeights, quantization: str | None = None
) -> LoadedModels:
    """Builds both models with the weights that were found, each directly on its device and in its
    dtype.

    Args:
        quantization: as of `load_weights`.

    Raises:
        CheckpointError: a checkpoint is damaged, belongs to another model, or is quantised in
            another way.
    """
    gpt = _load_gpt(settings, found.gpt, found.quantized_as(quantization))
    return LoadedModels(gpt=gpt, vq=_load_vq(settings, found.vq))


def _load_gpt(settings: ModelSettings, path: Path | None, quantization: str | None) -> Transformer:
    with torch.device("meta"):
        model = GPT_models[settings.gpt_model](
            vocab_size=settings.codebook_size,
            block_size=settings.tokens_per_image,
            num_classes=settings.num_classes,
        )
    if path is None:
        model = model.to(settings.precision).to_empty(device=settings.device)
        model.init_weights(torch.Generator(settings.device).manual_seed(settings.seed))
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
        )
    return model.eval().requires_grad_(False)


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
