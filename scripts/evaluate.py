"""Evaluates images: FID, sFID, Inception Score, precision and recall, as ADM's evaluator defines
them (openai/guided-diffusion, evaluations/evaluator.py). Ends in JSON.

    pip install "llamagen-serve[eval]"
    python scripts/evaluate.py samples.npz VIRTUAL_imagenet256_labeled.npz --output figures.json

Both files have images as arr_0, uint8 [images, height, width, 3]. The reference may have statistics
(mu, sigma, mu_s, sigma_s) beside them or alone; FID and sFID go by those if it has them, and
precision and recall need its images. The network's weights are downloaded once, 91 MB.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autoregressive.cli.command import run_command, slow_imports

with slow_imports(__name__):
    import torch

    from autoregressive.benchmarks.harness import use_device
    from autoregressive.benchmarks.script import (
        Table,
        add_device,
        add_output,
        add_values,
        give_figures,
        script_parser,
        whole_number,
    )
    from autoregressive.devices import is_out_of_memory, now
    from autoregressive.errors import UserError
    from autoregressive.evaluation.evaluator import Evaluation, evaluate
    from autoregressive.evaluation.inception import load_inception
    from autoregressive.evaluation.npz_images import IMAGES, ImageArray, open_images
    from autoregressive.evaluation.reference import Reference, open_reference
    from autoregressive.files import file_sha256
    from autoregressive.output.records import device_name

# Field of an evaluation -> its name, and how it is written.
_TITLES = {
    "fid": ("FID", ".2f"),
    "sfid": ("sFID", ".2f"),
    "inception_score": ("Inception Score", ".2f"),
    "precision": ("precision", ".4f"),
    "recall": ("recall", ".4f"),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, and ends the process on a mistake."""
    parser = script_parser(__doc__)
    parser.add_argument("samples", type=Path, metavar="SAMPLES.npz", help="the images to evaluate")
    parser.add_argument(
        "reference", type=Path, metavar="REFERENCE.npz", help="what they are compared with"
    )
    add_values(
        parser,
        ("--batch-size", whole_number(1), 64, "N", "images that the network sees at a time"),
    )
    parser.add_argument(
        "--inception-weights",
        type=Path,
        metavar="FILE.pth",
        help="the network's weights, weights-inception-2015-12-05-6726825d.pth of torch-fidelity "
        "(default: downloaded to torch's hub folder, once)",
    )
    add_device(parser)
    add_output(parser)
    typed = parser.parse_args(argv)
    typed.device = use_device(typed.device)
    return typed


def open_samples(path: Path) -> ImageArray:
    """The samples. `UserError` if the file has none."""
    images = open_images(path)
    if images is None:
        raise UserError(f"{path}: has no images ({IMAGES})")
    return images


def describe(images: ImageArray | None) -> str:
    """How many images there are, and how large."""
    if images is None:
        return "no images"
    return f"{images.count:,} images of {images.width} x {images.height} px"


def print_table(samples: ImageArray, reference: Reference, result: Evaluation) -> None:
    """Prints what was compared, the figures and the notes."""
    stored = " and statistics" if reference.pool else ""
    print(f"samples: {samples.path}, {describe(samples)}")
    print(f"reference: {reference.path}, {describe(reference.images)}{stored}")
    print(f"known as: {result.reference}")
    if result.fit is not None:
        spatial = "" if result.fit.spatial is None else f", spatial {result.fit.spatial:.2f}"
        print(
            "its images' mean features are this many standard errors from its statistics' (1 is "
            f"expected): pool {result.fit.pool:.2f}{spatial}"
        )
    table = Table({"figure": "<16", "value": ">10"})
    for field, (title, form) in _TITLES.items():
        value = getattr(result, field)
        table.row(title, None if value is None else format(value, form))
    for note in result.notes:
        print(f"note: {note}")


def figures_of(
    samples: ImageArray, reference: Reference, checksum: str, result: Evaluation
) -> dict[str, Any]:
    """All that was found out, for JSON."""
    return {
        "benchmark": "evaluate",
        **{field: getattr(result, field) for field in _TITLES},
        "samples": {"file": str(samples.path), "shape": samples.shape},
        "reference": {
            "file": str(reference.path),
            "sha256": checksum,
            "shape": reference.images and reference.images.shape,
            "is": result.reference,
            "standard_errors": result.fit and asdict(result.fit),
        },
        "notes": result.notes,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Does what the command line says."""
    typed = parse_arguments(argv)
    samples, reference = open_samples(typed.samples), open_reference(typed.reference)
    checksum = file_sha256(typed.reference)
    network = load_inception(typed.device, typed.inception_weights)
    began = now(typed.device)
    try:
        result = evaluate(samples, reference, network, typed.device, typed.batch_size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{typed.device} has too little memory; lower --batch-size") from error
    environment = {
        "seconds": now(typed.device) - began,
        "network": network.name,
        "device": device_name(typed.device),
        "torch": torch.__version__,
    }
    print_table(samples, reference, result)
    figures = figures_of(samples, reference, checksum, result)
    give_figures({**figures, **environment}, typed.output)


if __name__ == "__main__":
    run_command(main)
