"""Times decoding codes to pixels: the plain command's float32 (TF32) against the engine's decoder.
Ends in JSON.

    python scripts/benchmarks/bench_pixels.py --vq-model VQ-16 --image-size 384 --images 8 16

Random weights and codes, both kept on the device; median of the repeats after warming up. PSNR is
against float32 without TF32 (peak to peak 2.0), the worst image of the batch. It is about GPUs; on
a CPU one small case shows that it works.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch
    from torch import Tensor

    from autoregressive.benchmarks.harness import random_tokenizer, seconds_of, use_device
    from autoregressive.benchmarks.script import (
        Table,
        add_device,
        add_output,
        add_repeats,
        give_figures,
        on_cpu,
        script_parser,
        whole_number,
    )
    from autoregressive.devices import now
    from autoregressive.output.records import device_name
    from autoregressive.serve.engine.pixel_decoder import PixelDecoder
    from tokenizer.tokenizer_image.vq_model import VQ_CONFIGS, VQ_models, VQModel

_NAIVE_IMAGES = 8  # at once: more need too much memory in float32
_WARM_UPS = 3
_COLUMNS = {
    "px": ">7",
    "images": ">6",
    "naive": ">9.2f",
    "engine": ">9.2f",
    "an image": ">9.2f",
    "speed-up": ">9.2f",
    "PSNR dB": ">7.1f",
}


def median_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds by the host's clock, after the warm-up."""
    times = [seconds_of(run, device) for _ in range(_WARM_UPS + repeats)]
    return median(times[_WARM_UPS:]) * 1e3


def naive(vq: VQModel, codes: Tensor, grid: int, *, tf32: bool) -> Tensor:
    """Decodes as the plain command does, a large batch in parts."""
    shape = [vq.config.codebook_embed_dim, grid, grid]
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32
    ):
        return torch.cat(
            [vq.decode_code(part, [part.shape[0], *shape]) for part in codes.split(_NAIVE_IMAGES)]
        )


def worst_psnr(found: Tensor, expected: Tensor) -> float | None:
    """Of the images [n, 3, height, width], in decibels; peak to peak 2.0. None if they
    are equal.
    """
    error = (found.double() - expected.double()).square().mean(dim=(1, 2, 3)).max().item()
    return 10 * math.log10(4.0 / error) if error > 0 else None


@torch.no_grad()
def measure(
    vq: VQModel, image_size: int, batches: list[int], repeats: int, table: Table
) -> dict[str, Any]:
    """All batches at one size of image, and what building the decoder (compiling, capturing) took:
    seconds and memory.
    """
    device = vq.quantize.embedding.weight.device
    grid = image_size // vq.config.downsample_size
    before, began = _reserved_bytes(device), now(device)
    decoder = PixelDecoder(vq, grid, device)
    start_seconds = now(device) - began
    mib = (_reserved_bytes(device) - before) / 2**20
    print(
        f"{image_size:>4} px: the decoder was ready after {start_seconds:.1f} s and keeps "
        f"{mib:.0f} MiB",
        flush=True,
    )
    results = []
    for images in batches:
        codes = torch.randint(
            0, vq.config.codebook_size, (images, grid * grid), dtype=torch.int32, device=device
        )
        psnr = worst_psnr(decoder.decode(codes), naive(vq, codes, grid, tf32=False))
        naive_ms = median_ms(partial(naive, vq, codes, grid, tf32=True), device, repeats)
        engine_ms = median_ms(partial(decoder.decode, codes), device, repeats)
        results.append(
            {
                "image_size": image_size,
                "images": images,
                "naive_ms": naive_ms,
                "engine_ms": engine_ms,
                "worst_psnr": psnr,  # decibels; None: equal
            }
        )
        ratios = (engine_ms / images, naive_ms / engine_ms)
        told = "equal" if psnr is None else psnr
        table.row(image_size, images, naive_ms, engine_ms, *ratios, told)
    return {
        "image_size": image_size,
        "start_seconds": start_seconds,
        "decoder_mib": mib,
        "results": results,
    }


def _reserved_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, what was not typed filled in; ends the process on a mistake."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--vq-model",
        choices=list(VQ_models),
        metavar="NAME",
        help=f"the tokenizer: {', '.join(VQ_models)} (default: VQ-16{on_cpu('VQ-demo')})",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help=f"one size or more, of whole tokens (default: 256 384{on_cpu(128)})",
    )
    parser.add_argument(
        "--images",
        type=whole_number(1),
        nargs="+",
        metavar="N",
        help=f"one number or more of images at once (default: 1 8 16 64{on_cpu(1)})",
    )
    add_repeats(parser, 10)
    add_device(parser)
    add_output(parser)
    typed = parser.parse_args(argv)
    typed.device = use_device(typed.device)
    on_gpu = typed.device.type == "cuda"
    typed.vq_model = typed.vq_model or ("VQ-16" if on_gpu else "VQ-demo")
    typed.image_size = typed.image_size or ([256, 384] if on_gpu else [128])
    typed.images = typed.images or ([1, 8, 16, 64] if on_gpu else [1])
    token = VQ_CONFIGS[typed.vq_model].downsample_size
    for size in typed.image_size:
        if size < token or size % token:
            raise UserError(
                f"--image-size {size}: must be a multiple of {token}, the side of a token of "
                f"{typed.vq_model}"
            )
    return typed


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    typed = parse_arguments(argv)
    device, name = device_name(typed.device), typed.vq_model
    vq = random_tokenizer(name, typed.device)
    print(f"{name} on {device}, median of {typed.repeats}, milliseconds")
    table = Table(_COLUMNS)
    figures = {
        "benchmark": "pixels",
        "vq_model": name,
        "torch": torch.__version__,
        "repeats": typed.repeats,
        "device": device,
        "sizes": [
            measure(vq, size, typed.images, typed.repeats, table) for size in typed.image_size
        ],
    }
    give_figures(figures, typed.output)


if __name__ == "__main__":
    run_command(main)
