"""Draws pictures of classes with LlamaGen's plain loop: one step a token, a dense cache, math
attention.

The honest baseline that the fast command is compared with. Flags, defaults and output lines are
LlamaGen's.
"""

import shutil
from collections.abc import Sequence
from typing import cast

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError, either, on_terminal, tell

with slow_imports(__name__):
    import torch
    import triton  # noqa: F401 -- torch imports it when it makes the model, and a Ctrl-C meanwhile would be lost
    from torch import Tensor
    from tqdm import tqdm

    from autoregressive.cli.flags import build_parser
    from autoregressive.cli.results import save_results
    from autoregressive.cli.settings import (
        Settings,
        list_classes,
        resolve_settings,
        smaller_precision,
    )
    from autoregressive.devices import now, threads_that_pay
    from autoregressive.models.generate import NonFiniteLogitsError, generate
    from autoregressive.models.gpt import Transformer
    from autoregressive.weights.finding import find_weights, untrained_warning
    from autoregressive.weights.loading import LoadedModels, load_models

PURPOSE = "Draws pictures of classes, token by token, with LlamaGen's models: the plain loop."


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags (the process's own if None), draws, saves.

    Raises:
        UserError: anything that the user can mend.
    """
    arguments = build_parser(PURPOSE, "autoregressive/sample/sample_c2i.py").parse_args(argv)
    if arguments.list_classes is not None:
        print(list_classes(arguments))
        return
    settings = resolve_settings(arguments)
    if settings.note is not None:
        tell(settings.note)
    found = find_weights(settings.model)
    set_numerics(settings)
    device = settings.model.device
    try:
        models = load_models(settings.model, found)
        warning = untrained_warning(settings.model, found)
        if warning is not None:
            tell(warning)
        started = now(device)
        codes = draw_codes(models, settings)
        drawn = now(device)
        pixels = decode(models, codes, settings)
        decoded = now(device)
    except NonFiniteLogitsError as error:
        raise UserError(f"{error}; try --precision none, or other weights") from error
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
    # 80 x 24 where a terminal states no size: tqdm alone would draw nothing
    columns, lines = shutil.get_terminal_size()
    bar = tqdm(
        total=images * tokens,
        unit=" tokens",
        desc="sampling",
        disable=not on_terminal(),
        ncols=columns,
        nrows=lines,
    )
    with bar, threads_that_pay(gpt.config, device):
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
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        images = len(settings.labels)
        fewer = (
            f"draw fewer than {images} pictures at once (--class-labels)"
            if images > 1
            else "use a smaller model"
        )
        ways = either([fewer, *smaller_precision(settings.model)])
        return UserError(f"{settings.model.device} has too little free memory: {ways}")
    if settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return UserError(f"--compile failed ({str(error).strip().splitlines()[0]}): leave it out")
    return error


if __name__ == "__main__":
    run_command(main)
