"""The models that benchmarks run, with random weights: speed does not depend on them."""

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.defaults import model_defaults
from autoregressive.models.gpt import GPT_models, Transformer
from tokenizer.tokenizer_image.vq_model import VQ_CONFIGS

PAPER_MODELS = ("GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B")


def empty_transformer(name: str, image_size: int | None) -> Transformer:
    """The model's shape, on the meta device.

    Args:
        image_size: pixels of a side; None: the model's default.
    """
    defaults = model_defaults(name)
    tokenizer = VQ_CONFIGS[defaults.vq_model]
    grid = (image_size or defaults.image_size) // tokenizer.downsample_size
    with torch.device("meta"):
        return GPT_models[name](
            vocab_size=tokenizer.codebook_size, block_size=grid**2, num_classes=defaults.num_classes
        )


def config_of(name: str) -> GPTConfig:
    """The model's shape for images of its default size."""
    return empty_transformer(name, None).config


def random_transformer(
    name: str, image_size: int | None, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """In eval mode on the device, its weights drawn from seed 0."""
    gpt = empty_transformer(name, image_size).to(dtype).to_empty(device=device)
    gpt.init_weights(torch.Generator(device).manual_seed(0))
    return gpt.eval().requires_grad_(False)
