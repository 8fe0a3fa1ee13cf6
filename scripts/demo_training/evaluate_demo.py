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
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch
    import torch.nn.functional as F
    import torchvision
    from demo_support.demo_stages import load_tokenizer
    from demo_support.emoji_data import (
        IMAGE_SIZE,
        LARGEST_SEED,
        add_font,
        load_sprites,
        render,
        render_batch,
        step_generator,
    )
    from torch import Tensor, nn
    from torchvision.transforms.v2.functional import gaussian_blur
    from torchvision.utils import make_grid, save_image
    from train_demo import ROOT

    from autoregressive.benchmarks.arguments import (
        add_device,
        output_file,
        script_parser,
        whole_number,
    )
    from autoregressive.files import write_whole
    from autoregressive.models.defaults import model_defaults
    from autoregressive.models.generate import generate
    from autoregressive.models.gpt import GPT_models, Transformer
    from autoregressive.models.sampling import SamplingParams
    from autoregressive.serve.engine.config import EngineConfig
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.weights.checkpoint import load_weights
    from tokenizer.tokenizer_image.vq_model import VQModel

QUARTER = IMAGE_SIZE // 4
_BLURRED = 8  # one in so many of the judge's pictures


@dataclass(frozen=True)
class SampleFigures:
    """What is said of the pictures of one guidance scale."""

    cfg_scale: float
    recognised: float  # share of pictures in which the classifier sees the class asked for
    # mean over classes of the mean pairwise distance of a class's pictures (root mean square of
    # pixels)
    distance: float
    distance_of_data: float  # the same of as many renderings
    weakest: dict[str, float]  # the share recognised of the three classes recognised least


def blurred(pixels: Tensor, size: int = QUARTER) -> Tensor:
    """The pictures averaged down to `size` and smoothly enlarged again."""
    small = F.interpolate(pixels, size=(size, size), mode="area")
    return F.interpolate(small, size=pixels.shape[-2:], mode="bilinear")


def train_classifier(sprites: Tensor, steps: int, batch: int, seed: int) -> nn.Module:
    """A ResNet-18 that knows the emoji and, as its last class, blur."""
    device, blur_class = sprites.device, len(sprites)
    torch.manual_seed(seed)
    classifier = torchvision.models.resnet18(num_classes=blur_class + 1).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    classifier.train()
    for step in range(steps):
        pixels, labels = render_batch(sprites, batch, seed, "classifier training", step)
        share = batch // _BLURRED
        pixels[:share] = blurred(pixels[:share], QUARTER - 6 + step % 13)
        labels[:share] = blur_class
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(classifier(pixels).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"classifier: step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)
    return classifier.eval()


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], inputs: Tensor, batch: int = 256) -> Tensor:
    """The function's outputs for all inputs, a batch at a time."""
    return torch.cat([function(part) for part in inputs.split(batch)])


def recognised(classifier: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Float [n]: 1 for each picture in which the classifier sees its label, 0 for the others."""
    return (in_batches(lambda part: classifier(part).argmax(dim=-1), pixels) == labels).float()


def share_right(classifier: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """The share of pictures in which the classifier sees their label."""
    return recognised(classifier, pixels, labels).mean().item()


def mean_pairwise_distance(pixels: Tensor) -> float:
    """Pixels [classes, pictures, 3, height, width] -> mean over classes and pairs of the
    root-mean-square difference.
    """
    distances = []
    for pictures in pixels.flatten(2).float():
        count, values = pictures.shape
        pairs = F.pdist(pictures) / math.sqrt(values)
        assert pairs.shape[0] == count * (count - 1) // 2
        distances.append(pairs.mean())
    return torch.stack(distances).mean().item()


@torch.no_grad()
def draw(
    gpt: Transformer, tokenizer: VQModel, labels: Tensor, cfg_scale: float, batch: int
) -> Tensor:
    """One picture a label [n] with the demo model's default sampling and this guidance: [n, 3,
    height, width] in -1..1.
    """
    defaults = model_defaults("GPT-demo").sampling
    grid, dim = gpt.config.grid, tokenizer.config.codebook_embed_dim

    def draw_some(some: Tensor) -> Tensor:
        codes = generate(
            gpt, some, grid**2, cfg_scale=cfg_scale, cfg_interval=defaults.cfg_interval,
            temperature=defaults.temperature, top_k=defaults.top_k, top_p=defaults.top_p,
        )  # fmt: skip
        return tokenizer.decode_code(codes, [len(some), dim, grid, grid]).clamp(-1, 1)

    return in_batches(draw_some, labels, batch)


def draw_with_engine(
    gpt: Transformer, tokenizer: VQModel, labels: Tensor, cfg_scale: float, batch: int, seed: int
) -> Tensor:
    """As `draw`, with the engine: each picture by its own random numbers, `batch` guided pictures
    at a time.
    """
    params = model_defaults("GPT-demo").sampling.updated(cfg_scale=cfg_scale, seed=seed)
    engine = Engine(gpt, tokenizer, EngineConfig(max_num_seqs=2 * batch))
    return engine.generate(labels.tolist(), params).clamp(-1, 1)


def judge(
    classifier: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    names: tuple[str, ...],
    cfg_scale: float,
    data_distance: float,
) -> SampleFigures:
    """The figures of pictures [n, 3, height, width] whose labels [n] run through the classes one
    after another.
    """
    by_class = recognised(classifier, pixels, labels).view(len(names), -1).mean(dim=1)
    weakest = {names[int(i)]: round(by_class[i].item(), 3) for i in by_class.argsort()[:3]}
    distance = mean_pairwise_distance(pixels.view(len(names), -1, *pixels.shape[1:]))
    return SampleFigures(cfg_scale, by_class.mean().item(), distance, data_distance, weakest)


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the judge's training."""
    parser.add_argument(
        "--classifier-steps",
        type=whole_number(1),
        default=2000,
        metavar="STEPS",
        help="that the judge is trained for (default: %(default)s)",
    )
    parser.add_argument(
        "--classifier-batch",
        type=whole_number(_BLURRED),
        default=128,
        metavar="N",
        help="renderings of a step (default: %(default)s)",
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    pretrained = ROOT / "pretrained_models"
    parser.add_argument(
        "--weights-dir",
        type=Path,
        default=pretrained,
        metavar="DIR",
        help="where demo_gpt.safetensors and demo_vq.safetensors are (default: %(default)s)",
    )
    add_font(parser)
    add_device(parser)
    scales = [model_defaults("GPT-demo").sampling.cfg_scale, 1.0]
    parser.add_argument(
        "--cfg-scale",
        type=float,
        nargs="+",
        default=scales,
        metavar="X",
        help=f"guidance, one scale or more; 1: none (default: {' '.join(map(str, scales))})",
    )
    parser.add_argument(
        "--samples",
        type=whole_number(2),
        default=16,
        metavar="N",
        help="pictures of each class (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="pictures drawn at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--engine", action="store_true", help="draw with the engine (default: with the naive loop)"
    )
    add_judge(parser)
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=1,
        metavar="N",
        help="of the judge, the renderings and the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=output_file("--output", ".json"),
        metavar="FILE.json",
        help="write the figures here",
    )
    parser.add_argument(
        "--grid",
        type=output_file("--grid", ".png"),
        metavar="FILE.png",
        help="write the first scale's pictures here, a class a row",
    )
    typed = parser.parse_args(argv)
    if typed.seed > LARGEST_SEED:
        raise UserError(f"--seed {typed.seed}: must be 0 to {LARGEST_SEED}")
    try:
        for scale in typed.cfg_scale:
            SamplingParams(cfg_scale=scale)
    except ValueError as error:
        raise UserError(str(error).replace("cfg_scale", "--cfg-scale")) from error
    return typed


def load_models(folder: Path, device: torch.device) -> tuple[Transformer, VQModel]:
    """The demo model in float32."""
    tokenizer = load_tokenizer(folder / "demo_vq.safetensors", device)
    codes, grid = tokenizer.config.codebook_size, IMAGE_SIZE // tokenizer.config.downsample_size
    classes = len(model_defaults("GPT-demo").classes)
    with torch.device("meta"):
        gpt = GPT_models["GPT-demo"](vocab_size=codes, block_size=grid**2, num_classes=classes)
    load_weights(gpt, folder / "demo_gpt.safetensors", device=device, dtype=torch.float32)
    return gpt.eval(), tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the judge, draws, counts."""
    arguments = parse_arguments(argv)
    device = arguments.device
    sprites = load_sprites(arguments.font).to(device)
    gpt, tokenizer = load_models(arguments.weights_dir, device)
    names = model_defaults("GPT-demo").classes.names

    classifier = train_classifier(
        sprites, arguments.classifier_steps, arguments.classifier_batch, arguments.seed
    )
    test_labels = torch.arange(len(sprites), device=device).repeat_interleave(64)
    clean = render(
        sprites, test_labels, step_generator(arguments.seed, "classifier test", 0, device)
    )
    rebuilt = in_batches(lambda part: tokenizer(part)[0].clamp(-1, 1), clean)
    smoothed = gaussian_blur(clean, kernel_size=[13, 13], sigma=[2.0, 2.0])
    error = (rebuilt - clean).square().mean(dim=(1, 2, 3))
    figures = {
        "renderings recognised": share_right(classifier, clean, test_labels),
        "renderings recognised when blurred to a quarter": share_right(
            classifier, blurred(clean), test_labels
        ),
        "renderings recognised under a Gaussian blur of 2 pixels": share_right(
            classifier, smoothed, test_labels
        ),
        "renderings recognised when encoded and decoded": share_right(
            classifier, rebuilt, test_labels
        ),
        "tokenizer PSNR in dB": (10 * torch.log10(4 / error)).mean().item(),
    }
    for name, value in figures.items():
        print(f"{name}: {value:.4f}", flush=True)

    labels = torch.arange(len(sprites), device=device).repeat_interleave(arguments.samples)
    data = render(sprites, labels, step_generator(arguments.seed, "distance", 0, device))
    data_distance = mean_pairwise_distance(data.view(len(sprites), -1, *data.shape[1:]))
    results = []
    for cfg_scale in arguments.cfg_scale:
        if arguments.engine:
            pixels = draw_with_engine(
                gpt, tokenizer, labels, cfg_scale, arguments.batch, arguments.seed
            )
        else:
            torch.manual_seed(arguments.seed)
            pixels = draw(gpt, tokenizer, labels, cfg_scale, arguments.batch)
        results.append(judge(classifier, pixels, labels, names, cfg_scale, data_distance))
        print(results[-1], flush=True)
        if arguments.grid and len(results) == 1:
            grid = make_grid(pixels, nrow=arguments.samples, normalize=True, value_range=(-1, 1))
            write_whole(arguments.grid, partial(save_image, grid, format="png"))
    if arguments.output:
        text = json.dumps(
            figures
            | {"engine": arguments.engine, "samples": [asdict(result) for result in results]},
            indent=2,
        )
        write_whole(arguments.output, lambda path: path.write_text(text + "\n"))


if __name__ == "__main__":
    run_command(main)
