"""The plain loop's way from flags to files."""

import argparse
from dataclasses import asdict
from typing import cast

import torch

# torch imports triton when it makes the model, and a Ctrl-C meanwhile would be lost.
import triton  # noqa: F401
from torch import Tensor

from autoregressive.cli.drawing import (
    Settings,
    find_weights_and_warn,
    resolve_settings,
    save_results,
)
from autoregressive.devices import is_out_of_memory, limited_cpu_threads, now, set_llamagen_numerics
from autoregressive.errors import Change, SettingName, UserError, tell
from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from autoregressive.progress import progress_bar
from autoregressive.weights.finding import smaller_precision
from autoregressive.weights.loading import load_models


def run(arguments: argparse.Namespace) -> None:
    """Draws and saves what was asked for.

    Raises:
        UserError: anything that the user can mend.
    """
    settings = resolve_settings(arguments)
    found = find_weights_and_warn(settings)
    model = settings.model
    set_llamagen_numerics(model.device)
    try:
        models = load_models(model, found)
        started = now(model.device)
        codes = draw_codes(models.gpt, settings)
        drawn = now(model.device)
        with torch.no_grad():
            pixels = torch.cat(
                [
                    models.vq.decode_code(
                        part, [len(part), model.codebook_embed_dim, model.grid, model.grid]
                    )
                    for part in codes.split(_batch_size(settings))
                ]
            )
        seconds = (drawn - started, now(model.device) - drawn)
    except RuntimeError as error:
        raise _mendable(error, settings) from error
    save_results(settings, found, codes, pixels, seconds, loop="naive")


def draw_codes(gpt: Transformer, settings: Settings) -> Tensor:
    """Draws the tokens of every picture: int32 [images, tokens]."""
    device, tokens = settings.model.device, settings.model.tokens_per_image
    if settings.compile:
        tell("compiling the model; the sampling time will include it")
        gpt = cast(Transformer, torch.compile(gpt, mode="reduce-overhead", fullgraph=True))
    labels, size = torch.tensor(settings.labels, device=device), _batch_size(settings)
    codes = []
    with (
        progress_bar("sampling", " tokens", len(labels) * tokens) as bar,
        limited_cpu_threads(gpt.config, device),
    ):
        for batch, sampling in zip(labels.split(size), settings.each[::size], strict=True):
            params = asdict(sampling)
            torch.manual_seed(params.pop("seed"))
            del params["n"]
            drawn = generate(
                gpt,
                batch,
                tokens,
                **params,
                sample_logits=sampling.temperature > 0,
                on_token=lambda _: bar.update(size),
            )
            codes.append(drawn)
    return torch.cat(codes)


def _batch_size(settings: Settings) -> int:
    """How many pictures are drawn together. Those of a grid with axes have parameters of their own,
    and one generator draws for a whole batch, so each is drawn alone.
    """
    return len(settings.labels) if settings.axes is None else 1


def _mendable(error: RuntimeError, settings: Settings) -> Exception:
    """What to tell the user about a failure inside torch; the error itself where there is nothing
    to tell.
    """
    if is_out_of_memory(error):
        images = _batch_size(settings)
        fewer = Change("shorten", "class_labels", f"to fewer than {images} pictures at once")
        ways = [fewer if images > 1 else "use a smaller model", *smaller_precision(settings.model)]
        return UserError(f"{settings.model.device} has too little free memory", remedies=ways)
    if settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return UserError(
            SettingName("compile"),
            f" failed ({str(error).strip().splitlines()[0]}): leave it out",
        )
    return error
