"""What benchmarks run, where, and by which clock: models with random weights (speed does not depend
on them), the device, and the time of a run.
"""

from collections.abc import Callable

import torch

from autoregressive.devices import now, resolve_device
from autoregressive.models.config import GPTConfig
from autoregressive.models.defaults import model_defaults
from autoregressive.models.gpt import GPT_models, Transformer
from tokenizer.tokenizer_image.vq_model import VQ_CONFIGS, VQ_models, VQModel


def use_device(name: str | None) -> torch.device:
    """The device that --device names, by default a GPU if there is one. It becomes the current one.

    Raises:
        SettingError: it is not here.
    """
    device = resolve_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def empty_transformer(name: str, image_size: int | None = None) -> Transformer:
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
    return empty_transformer(name).config


def with_random_weights(gpt: Transformer, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The transformer in eval mode on the device, its weights drawn from seed 0."""
    gpt = gpt.to(dtype).to_empty(device=device)
    gpt.init_weights(torch.Generator(device).manual_seed(0))
    return gpt.eval().requires_grad_(False)


def random_tokenizer(name: str, device: torch.device) -> VQModel:
    """A tokenizer in eval mode on the device, its weights drawn from seed 0."""
    torch.manual_seed(0)
    return VQ_models[name]().to(device).eval().requires_grad_(False)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run by the host's clock; the device is idle before and after it."""
    began = now(device)
    run()
    return now(device) - began
