"""The plain loop's way from flags to files."""

import argparse
from typing import cast

import torch

# torch imports triton when it makes the model, and a Ctrl-C meanwhile would be lost.
import triton  # noqa: F401
from torch import Tensor

from autoregressive.cli.command import flag_of
from autoregressive.cli.results import save_results
from autoregressive.cli.settings import Settings, resolve_settings
from autoregressive.devices import is_out_of_memory, limited_cpu_threads, now
from autoregressive.errors import SettingName, UserError, tell
from autoregressive.models.generate import NonFiniteLogitsError, generate
from autoregressive.models.gpt import Transformer
from autoregressive.progress import progress_bar
from autoregressive.weights.choice import smaller_precision
from autoregressive.weights.finding import find_weights, missing_weights
from autoregressive.weights.loading import LoadedModels, load_models


def run(arguments: argparse.Namespace) -> None:
    """Draws and saves what was asked for.

    Raises:
        UserError: anything that the user can mend.
    """
    settings = resolve_settings(arguments)
    if settings.note is not None:
        tell(settings.note)
    found = find_weights(settings.model)
    set_numerics(settings)
    device = settings.model.device
    try:
        models = load_models(settings.model, found)
        missing = missing_weights(settings.model, found)
        if missing is not None:
            tell(missing.warning(flag_of))
        started = now(device)
        codes = draw_codes(models, settings)
        drawn = now(device)
        pixels = decode(models, codes, settings)
        decoded = now(device)
    except NonFiniteLogitsError as error:
        told = f"{error}; try "
        raise UserError(told, SettingName("precision"), " none, or other weights") from error
    except RuntimeError as error:
        raise _mendable(error, settings) from error
    grid = save_results(settings, found, codes, pixels, loop="naive")
    # Only now: a pipe whose reader has left, or a full disk behind stdout, must not cost the
    # pictures.
    print(f"gpt sampling takes about {drawn - started:.2f} seconds.")
    print(f"decoder takes about {decoded - drawn:.2f} seconds.")
    print(f"image is saved to {grid}")


def set_numerics(settings: Settings) -> None:
    """TF32 and deterministic convolutions, as LlamaGen's command sets them."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if settings.model.device.type == "cuda":
        torch.cuda.set_device(settings.model.device)


def draw_codes(models: LoadedModels, settings: Settings) -> Tensor:
    """Draws the tokens of every picture in one batch: int32 [images, tokens]."""
    sampling, device, tokens = (
        settings.sampling,
        settings.model.device,
        settings.model.tokens_per_image,
    )
    images = len(settings.labels)
    gpt = models.gpt
    if settings.compile:
        tell("compiling the model; the sampling time will include it")
        gpt = cast(Transformer, torch.compile(gpt, mode="reduce-overhead", fullgraph=True))
    labels = torch.tensor(settings.labels, device=device)
    torch.manual_seed(sampling.seed)
    total = len(settings.labels) * tokens
    with (
        progress_bar("sampling", " tokens", total) as bar,
        limited_cpu_threads(gpt.config, device),
    ):
        return generate(
            gpt,
            labels,
            tokens,
            cfg_scale=sampling.cfg_scale,
            cfg_interval=sampling.cfg_interval,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            sample_logits=sampling.temperature > 0,
            on_token=lambda _: bar.update(images),
        )


@torch.no_grad()
def decode(models: LoadedModels, codes: Tensor, settings: Settings) -> Tensor:
    """Codes -> pixels [images, 3, height, width], about -1..1."""
    model = settings.model
    return models.vq.decode_code(
        codes, [codes.shape[0], model.codebook_embed_dim, model.grid, model.grid]
    )


def _mendable(error: RuntimeError, settings: Settings) -> Exception:
    """What to tell the user about a failure inside torch; the error itself where there is nothing
    to tell.
    """
    if is_out_of_memory(error):
        images = len(settings.labels)
        fewer = (
            f"draw fewer than {images} pictures at once (--class-labels)"
            if images > 1
            else "use a smaller model"
        )
        told = f"{settings.model.device} has too little free memory"
        return UserError(told, remedies=[fewer, *smaller_precision(settings.model)])
    if settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return UserError(f"--compile failed ({str(error).strip().splitlines()[0]}): leave it out")
    return error
