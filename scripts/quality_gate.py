"""Measures what quantised weights and pages cost in quality, and whether that is within bounds.

    python scripts/quality_gate.py --quantization int8 --kv-cache-dtype int8
    python scripts/quality_gate.py --gpt-model GPT-XL --quantization fp8 --codes codes.npz

Real images are fed to the transformer, token by token. At each position the distribution that a
token is drawn from, guided and filtered, is compared with that of the same weights in float32. The
script reports the mean total variation, which is the least share of draws that must differ, and the
share of positions whose likeliest token is another. Beside them it reports those of bf16 with
torch's operations, whose results are bf16 as in LlamaGen's code. They are the yardstick on every
device: the total variation may be 1.5 times theirs with int8 weights, 2.5 times with fp8 weights,
and 3 times with fp8 pages. int4 is reported, and never passes. On a GPU the engine's kernels keep
more digits between products, so that bf16 without quantisation is nearer to float32 there; it is
reported, too.

The images are those of --codes: an npz file with `labels` [n] and either `codes`, integers [n,
tokens], or `arr_0`, pictures uint8 [n, height, width, 3] of the model's size. The demo model's are
rendered from the font of its data. For the demo model the script also draws pictures with and
without quantisation, and counts how many a classifier recognises; the share may differ by one
point. The classifier is trained on renderings first, which takes an hour on one CPU core and a
minute on a GPU; --judge keeps it. With --reference, pictures of both are drawn by the bulk command,
and the changes of FID and Inception Score are reported. Ends in JSON; exit status 1 if a bound is
not kept.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoregressive.cli.command import run_command, slow_imports
from autoregressive.errors import UserError

with slow_imports(__name__):
    import torch
    from safetensors.torch import load_file, save_file
    from torch import nn

    from autoregressive.benchmarks.harness import use_device
    from autoregressive.benchmarks.published_checks import Subject, measure_fid
    from autoregressive.benchmarks.quality import (
        Candidate,
        Distance,
        RealImages,
        Verdict,
        distances,
        encoded,
        judged,
        read_images,
    )
    from autoregressive.benchmarks.script import (
        add_device,
        add_model,
        add_output,
        add_quantization,
        add_values,
        give_figures,
        script_parser,
        whole_number,
    )
    from autoregressive.demo_training.emoji_data import (
        LARGEST_SEED,
        add_font,
        load_sprites,
        render,
        step_generator,
    )
    from autoregressive.demo_training.judge import new_classifier, recognised, train_classifier
    from autoregressive.devices import PRECISIONS, default_precision, limited_cpu_threads
    from autoregressive.evaluation.reference import open_reference
    from autoregressive.files import check_file, check_own_folder, write_whole
    from autoregressive.models.config import GPT_SHAPES
    from autoregressive.models.defaults import DEMO_MODEL
    from autoregressive.output.records import device_name
    from autoregressive.progress import progress_bar
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.serve.engine.engine_config import EngineConfig
    from autoregressive.weights.finding import (
        FoundWeights,
        ModelSettings,
        find_weights,
        missing_weights,
        resolve_model,
    )
    from autoregressive.weights.loading import load_models
    from autoregressive.weights.options import ModelOptions
    from kernels.operations import triton_runs_on
    from tokenizer.tokenizer_image.vq_model import VQModel


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    add_model(parser, DEMO_MODEL)
    for flag, metavar, told in (
        ("--gpt-ckpt", "PATH", "the transformer's original weights"),
        ("--vq-ckpt", "PATH", "the tokenizer's weights"),
        ("--pretrained-dir", "DIR", "where weights are looked for (default: as the commands')"),
        ("--codes", "FILE.npz", "the real images (default: rendered, for the demo model)"),
        ("--judge", "FILE.safetensors", "the classifier; it is trained and written if missing"),
        ("--reference", "FILE.npz", "what the images of --fid are compared with"),
    ):
        parser.add_argument(flag, type=Path, metavar=metavar, help=told)
    parser.add_argument(
        "--sample-dir",
        type=Path,
        default=Path("samples"),
        metavar="DIR",
        help="where the images of --reference go (default: %(default)s)",
    )
    add_font(parser)
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="256 or 384")
    add_quantization(parser)
    add_values(
        parser,
        ("--images", whole_number(1), 64, "N", "real images that are compared, at most"),
        ("--pictures", whole_number(0), 4096, "N", "that the classifier sees; 0: none"),
        ("--batch", whole_number(1), 32, "N", "images of a pass"),
        ("--fid", whole_number(2), 50_000, "N", "images for --reference"),
        ("--classifier-steps", whole_number(1), 2000, "STEPS", "that the classifier is trained"),
        ("--classifier-batch", whole_number(8), 128, "N", "renderings of a step"),
        ("--seed", whole_number(0, LARGEST_SEED), 1, "N", "of renderings and pictures"),
    )
    add_device(parser)
    add_output(parser)
    typed = parser.parse_args(argv)
    if typed.quantization is None and typed.kv_cache_dtype == "auto":
        raise UserError("there is nothing to measure: give --quantization or --kv-cache-dtype")
    if typed.judge is not None and not typed.judge.exists():
        check_file("--judge", typed.judge, ".safetensors")
    if typed.reference is not None:
        check_own_folder("--sample-dir", typed.sample_dir)
    typed.device = use_device(typed.device)
    return typed


def find_model(typed: argparse.Namespace) -> tuple[ModelSettings, FoundWeights]:
    """The model that is meant, with its original weights.

    Raises:
        UserError: there are none, or they are quantised.
    """
    settings = resolve_model(
        ModelOptions(
            typed.gpt_model,
            gpt_ckpt=typed.gpt_ckpt,
            vq_ckpt=typed.vq_ckpt,
            image_size=typed.image_size,
            pretrained_dir=typed.pretrained_dir,
            device=str(typed.device),
        )
    )
    found = find_weights(settings)
    missing = missing_weights(settings, found)
    if missing is not None:
        raise missing
    if found.quantization is not None:
        raise UserError(f"{found.gpt}: holds {found.quantization} weights; give the original ones")
    return settings, found


def real_images(typed: argparse.Namespace, settings: ModelSettings, vq: VQModel) -> RealImages:
    """The images of --codes, or rendered ones of the demo model's data.

    Raises:
        UserError: there are none, or they do not fit the model.
    """
    if typed.codes is not None:
        return read_images(typed.codes, typed.images, settings, vq)
    if settings.gpt_model != DEMO_MODEL:
        raise UserError(f"--codes: give codes of real images for {settings.gpt_model}")
    labels = torch.arange(typed.images) % settings.num_classes
    sprites = load_sprites(typed.font)
    pixels = render(sprites, labels, step_generator(typed.seed, "quality", 0, sprites.device))
    return RealImages(encoded(pixels, vq), labels.tolist())


def compare(
    typed: argparse.Namespace, settings: ModelSettings, found: FoundWeights
) -> dict[str, Distance]:
    """The distances from float32 of bf16 with torch's operations, of what is measured, and of bf16
    with the engine's kernels where they run.
    """
    exact = load_models(replace(settings, precision=torch.float32), found)
    real = real_images(typed, settings, exact.vq)
    in_bf16 = replace(settings, precision=torch.bfloat16)
    plain = load_models(in_bf16, found).gpt
    candidates = {
        "bf16": Candidate(plain, EngineConfig(attention_backend="torch")),
        "quantised": Candidate(
            load_models(in_bf16, found, typed.quantization).gpt,
            EngineConfig(kv_cache_dtype=typed.kv_cache_dtype),
        ),
    }
    if triton_runs_on(typed.device):
        candidates["bf16_kernels"] = Candidate(plain, EngineConfig())
    with progress_bar("comparing", " positions") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return distances(
            exact.gpt, candidates, real, settings.defaults.sampling, typed.batch, progress
        )


def classifier(typed: argparse.Namespace) -> nn.Module:
    """The classifier of --judge, or a new one.

    Raises:
        UserError: the file holds no such classifier.
    """
    sprites = load_sprites(typed.font).to(typed.device)
    if typed.judge is not None and typed.judge.exists():
        judge = new_classifier(len(sprites))
        try:
            judge.load_state_dict(load_file(typed.judge))
        except Exception as error:
            raise UserError(f"--judge {typed.judge}: is no classifier of this script") from error
        return judge.to(typed.device).eval()
    judge = train_classifier(sprites, typed.classifier_steps, typed.classifier_batch, typed.seed)
    if typed.judge is not None:
        weights = {name: tensor.contiguous().cpu() for name, tensor in judge.state_dict().items()}
        write_whole(typed.judge, lambda part: save_file(weights, part))
    return judge


def recognised_shares(
    typed: argparse.Namespace, settings: ModelSettings, found: FoundWeights, judge: nn.Module
) -> dict[str, float]:
    """The share of pictures that the classifier recognises, without and with quantisation, in the
    precision that the device has by default.
    """
    labels = [index % settings.num_classes for index in range(typed.pictures)]
    params = settings.defaults.sampling.updated(seed=typed.seed)
    shares = {}
    for name, quantization, pages in (
        ("plain", None, "auto"),
        ("quantised", typed.quantization, typed.kv_cache_dtype),
    ):
        models = load_models(settings, found, quantization)
        rows = min(2 * typed.batch, 2 * len(labels))
        engine = Engine(models.gpt, models.vq, EngineConfig(rows, kv_cache_dtype=pages))
        codes = engine.generate(labels, params, progress=True, decode=False)
        assert engine.decoder is not None
        seen = [
            recognised(judge, engine.decoder.decode(part.to(typed.device)).clamp(-1, 1), wanted)
            for part, wanted in zip(
                codes.split(typed.batch),
                torch.tensor(labels, device=typed.device).split(typed.batch),
                strict=True,
            )
        ]
        shares[name] = torch.cat(seen).mean().item()
    return shares


def evaluations(
    typed: argparse.Namespace, settings: ModelSettings, found: FoundWeights
) -> dict[str, Any]:
    """FID and its kin of images without and with quantisation."""
    subject = Subject(settings, found, settings.defaults.class_labels)
    flags = ["--kv-cache-dtype", typed.kv_cache_dtype]
    if typed.quantization is not None:
        flags += ["--quantization", typed.quantization]
    made = {}
    way = f"{typed.quantization or 'plain'}-kv-{typed.kv_cache_dtype}"
    for name, called, engine_flags in (
        ("plain", "plain", ()),
        ("quantised", way, tuple(flags)),
    ):
        folder = typed.sample_dir / f"{settings.gpt_model}-{called}"
        folder.mkdir(parents=True, exist_ok=True)
        made[name] = measure_fid(
            subject, typed.fid, typed.reference, folder, str(typed.device), engine_flags
        )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    typed = parse_arguments(argv)
    if typed.reference is not None:
        open_reference(typed.reference)  # hours of drawing come before it is needed
    settings, found = find_model(typed)
    shape = GPT_SHAPES[settings.gpt_model]
    with limited_cpu_threads(shape, typed.device):
        measured = compare(typed, settings, found)
        shares: dict[str, float] | None = None
        if settings.gpt_model == DEMO_MODEL and typed.pictures:
            shares = recognised_shares(typed, settings, found, classifier(typed))
    evaluation = None if typed.reference is None else evaluations(typed, settings, found)
    verdict = judged(typed.quantization, typed.kv_cache_dtype, measured, shares)
    tell_verdict(measured, shares, verdict)
    default = default_precision(typed.device)
    figures = {
        "benchmark": "quality_gate",
        "device": device_name(typed.device),
        "torch": torch.__version__,
        "model": settings.gpt_model,
        "quantization": typed.quantization,
        "kv_cache_dtype": typed.kv_cache_dtype,
        "images": typed.images,
        "distances": {name: vars(distance) for name, distance in measured.items()},
        "pictures": typed.pictures if shares else 0,
        "precision_of_pictures": next(name for name, one in PRECISIONS.items() if one == default),
        "recognised": shares,
        "evaluation": evaluation,
        **vars(verdict),
    }
    give_figures(figures, typed.output)
    if verdict.passed is False:
        sys.exit(1)


def tell_verdict(
    measured: dict[str, Distance], shares: dict[str, float] | None, verdict: Verdict
) -> None:
    """Prints the figures for people."""
    for name, distance in measured.items():
        print(
            f"{name}: total variation {distance.total_variation:.4f}, "
            f"{distance.changed_greedy:.1%} of the likeliest tokens changed"
        )
    bound = "no bound" if verdict.bound is None else f"at most {verdict.bound:g}"
    print(f"times that of bf16 with torch's operations: {verdict.ratio:.2f} ({bound})")
    for name, share in (shares or {}).items():
        print(f"recognised, {name}: {share:.2%}")
    words = {True: "passed", False: "NOT PASSED", None: "experimental: reported, not passed"}
    print(words[verdict.passed])


if __name__ == "__main__":
    run_command(main)
