"""Measures the demo model: are its pictures recognised, do they differ, how good is its tokenizer?
Minutes on one GPU.

    mkdir -p runs
    python scripts/demo_training/evaluate_demo.py --output runs/evaluation.json --grid
    runs/evaluation.png

The judge is a ResNet-18 trained here on emoji renderings, never on model output, and tested on
renderings from another random stream. It has one class more than there are emoji, for pictures
blurred to about a quarter of their size, so that a blurred picture does not count as recognised; a
Gaussian blur, which it never saw, tests that.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from autoregressive.cli.command import run_command, slow_imports

with slow_imports(__name__):
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torchvision.transforms.v2.functional import gaussian_blur
    from torchvision.utils import make_grid, save_image
    from train_demo import ROOT

    from autoregressive.benchmarks.harness import use_device
    from autoregressive.benchmarks.script import (
        add_device,
        add_output,
        add_values,
        give_figures,
        output_file,
        script_parser,
        whole_number,
    )
    from autoregressive.demo_training.emoji_data import (
        IMAGE_SIZE,
        LARGEST_SEED,
        add_font,
        load_sprites,
        render,
        step_generator,
    )
    from autoregressive.demo_training.judge import (
        BLURRED,
        blurred,
        in_batches,
        recognised,
        train_classifier,
    )
    from autoregressive.demo_training.stages import demo_transformer, load_tokenizer
    from autoregressive.files import write_whole
    from autoregressive.models.defaults import model_defaults
    from autoregressive.models.generate import generate
    from autoregressive.models.gpt import Transformer
    from autoregressive.models.sampling_params import SamplingParams
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.serve.engine.engine_config import EngineConfig
    from autoregressive.weights.checkpoint import load_weights
    from tokenizer.tokenizer_image.vq_model import VQModel

_DEFAULTS = model_defaults("GPT-demo")


def mean_pairwise_distance(pixels: Tensor) -> float:
    """Pixels [classes, pictures, 3, height, width] -> mean over classes and pairs of the
    root-mean-square difference.
    """
    root = math.sqrt(pixels[0, 0].numel())
    distances = [(F.pdist(each) / root).mean() for each in pixels.flatten(2).float()]
    return torch.stack(distances).mean().item()


@torch.no_grad()
def draw_with_loop(
    gpt: Transformer, tokenizer: VQModel, labels: Tensor, params: SamplingParams, batch: int
) -> Tensor:
    """One picture a label [n], `batch` at a time: [n, 3, height, width] in -1..1."""
    torch.manual_seed(params.seed)
    grid, dim = gpt.config.grid, tokenizer.config.codebook_embed_dim

    def draw_some(some: Tensor) -> Tensor:
        codes = generate(
            gpt, some, grid**2, cfg_scale=params.cfg_scale, cfg_interval=params.cfg_interval,
            temperature=params.temperature, top_k=params.top_k, top_p=params.top_p,
        )  # fmt: skip
        return tokenizer.decode_code(codes, [len(some), dim, grid, grid]).clamp(-1, 1)

    return in_batches(draw_some, labels, batch)


def draw_with_engine(
    gpt: Transformer, tokenizer: VQModel, labels: Tensor, params: SamplingParams, batch: int
) -> Tensor:
    """As `draw_with_loop`, with the engine: each picture by its own random numbers."""
    engine = Engine(gpt, tokenizer, EngineConfig(max_num_seqs=2 * batch))
    return engine.generate(labels.tolist(), params).clamp(-1, 1)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--weights-dir",
        type=Path,
        default=ROOT / "pretrained_models",
        metavar="DIR",
        help="where demo_gpt.safetensors and demo_vq.safetensors are (default: %(default)s)",
    )
    add_font(parser)
    add_device(parser)
    scale = _DEFAULTS.sampling.cfg_scale
    parser.add_argument(
        "--cfg-scale",
        type=float,
        nargs="+",
        default=[scale, 1.0],
        metavar="X",
        help=f"guidance, one scale or more; 1: none (default: {scale} 1.0)",
    )
    pictures = "of the judge, the renderings and the pictures"
    add_values(
        parser,
        ("--samples", whole_number(2), 16, "N", "pictures of each class"),
        ("--batch", whole_number(1), 256, "N", "pictures drawn at a time"),
        ("--classifier-steps", whole_number(1), 2000, "STEPS", "that the judge is trained for"),
        ("--classifier-batch", whole_number(BLURRED), 128, "N", "renderings of a step"),
        ("--seed", whole_number(0, LARGEST_SEED), 1, "N", pictures),
    )
    parser.add_argument(
        "--engine", action="store_true", help="draw with the engine (default: with the naive loop)"
    )
    add_output(parser)
    parser.add_argument(
        "--grid",
        type=output_file("--grid", ".png"),
        metavar="FILE.png",
        help="write the first scale's pictures here, a class a row",
    )
    typed = parser.parse_args(argv)
    typed.device = use_device(typed.device)
    typed.params = [
        _DEFAULTS.sampling.updated(cfg_scale=scale, seed=typed.seed) for scale in typed.cfg_scale
    ]
    return typed


def load_models(folder: Path, device: torch.device) -> tuple[Transformer, VQModel]:
    """The demo model in float32."""
    tokenizer = load_tokenizer(folder / "demo_vq.safetensors", device)
    with torch.device("meta"):
        gpt = demo_transformer(tokenizer)
    load_weights(gpt, folder / "demo_gpt.safetensors", device=device, dtype=torch.float32)
    return gpt.eval(), tokenizer


def judge_renderings(
    classifier: nn.Module, tokenizer: VQModel, sprites: Tensor, seed: int
) -> dict[str, float]:
    """What the judge sees in renderings that it was not trained on, and what the tokenizer keeps of
    them. Prints each figure.
    """
    labels = torch.arange(len(sprites), device=sprites.device).repeat_interleave(64)
    generator = step_generator(seed, "classifier test", 0, sprites.device)
    clean = render(sprites, labels, generator)
    rebuilt = in_batches(lambda part: tokenizer(part)[0].clamp(-1, 1), clean)
    changed = {
        "": clean,
        " when blurred to a quarter": blurred(clean),
        " under a Gaussian blur of 2 pixels": gaussian_blur(clean, [13, 13], [2.0, 2.0]),
        " when encoded and decoded": rebuilt,
    }
    figures = {
        f"renderings recognised{how}": recognised(classifier, pixels, labels).mean().item()
        for how, pixels in changed.items()
    }
    error = (rebuilt - clean).square().mean(dim=(1, 2, 3))
    figures["tokenizer PSNR in dB"] = (10 * torch.log10(4 / error)).mean().item()
    for name, value in figures.items():
        print(f"{name}: {value:.4f}", flush=True)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the judge, draws, counts."""
    typed = parse_arguments(argv)
    device, names = typed.device, _DEFAULTS.classes.names
    sprites = load_sprites(typed.font).to(device)
    gpt, tokenizer = load_models(typed.weights_dir, device)
    classifier = train_classifier(
        sprites, typed.classifier_steps, typed.classifier_batch, typed.seed
    )
    figures: dict[str, Any] = judge_renderings(classifier, tokenizer, sprites, typed.seed)

    labels = torch.arange(len(sprites), device=device).repeat_interleave(typed.samples)
    by_class = (len(sprites), typed.samples, 3, IMAGE_SIZE, IMAGE_SIZE)
    data = render(sprites, labels, step_generator(typed.seed, "distance", 0, device))
    distance_of_data = mean_pairwise_distance(data.view(by_class))
    samples = []
    for params in typed.params:
        draw = draw_with_engine if typed.engine else draw_with_loop
        pixels = draw(gpt, tokenizer, labels, params, typed.batch)
        shares = recognised(classifier, pixels, labels).view(len(names), -1).mean(dim=1)
        samples.append(
            {
                "cfg_scale": params.cfg_scale,
                "recognised": shares.mean().item(),
                # mean over classes of the mean pairwise distance of a class's pictures (root mean
                # square of pixels), and the same of as many renderings
                "distance": mean_pairwise_distance(pixels.view(by_class)),
                "distance_of_data": distance_of_data,
                "weakest": {
                    names[int(i)]: round(shares[i].item(), 3) for i in shares.argsort()[:3]
                },
            }
        )
        print(samples[-1], flush=True)
        if typed.grid and len(samples) == 1:
            grid = make_grid(pixels, nrow=typed.samples, normalize=True, value_range=(-1, 1))
            write_whole(typed.grid, partial(save_image, grid, format="png"))
    give_figures({**figures, "engine": typed.engine, "samples": samples}, typed.output)


if __name__ == "__main__":
    run_command(main)
