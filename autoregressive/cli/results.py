"""Saves what a command drew: the grid, single pictures, codes."""

from pathlib import Path

from torch import Tensor

from autoregressive.cli.settings import Settings
from autoregressive.errors import UserError
from autoregressive.output.images import individual_file, picture_grid, save_codes, save_picture
from autoregressive.output.records import (
    Loop,
    generation_record,
    image_record,
    readable,
    sampling_record,
)
from autoregressive.weights.finding import FoundWeights


def save_results(
    settings: Settings, found: FoundWeights, codes: Tensor, pixels: Tensor, *, loop: Loop
) -> Path:
    """Writes every file that was asked for, the grid last.

    Args:
        codes: integers [images, tokens]
        pixels: [images, 3, height, width] in -1..1
        loop: which one drew the codes.

    Returns:
        Where the grid is.

    Raises:
        UserError: the pixels are not finite, or a file cannot be written; files written before
            stay.
    """
    if not pixels.isfinite().all():
        raise UserError(
            "the tokenizer's decoder gave NaN or infinite pixels: its weights are damaged (see "
            "--vq-ckpt)"
        )
    output = settings.output
    names = [settings.classes[label] for label in settings.labels]
    params = settings.sampling
    common = generation_record(settings.model, found, loop, compiled=settings.compile)
    grid = output.grid(trained=found.trained)
    if output.codes is not None:
        save_codes(output.codes, codes)
    if output.individual is not None:
        _make_folder(output.individual)
        for image, (label, name) in enumerate(zip(settings.labels, names, strict=True)):
            one = image_record(
                common, params, label=label, class_name=name, images=len(names), image=image
            )
            file = individual_file(
                output.individual, image, label, name, trained=found.trained, suffix=grid.suffix
            )
            picture = picture_grid(pixels[image : image + 1])
            save_picture(file, picture, readable(one), one)
    classes = {"labels": list(settings.labels), "class_names": names}
    record = common | sampling_record(params) | classes
    save_picture(
        grid, picture_grid(pixels, names if output.captions else None), readable(record), record
    )
    return grid


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--save-individual {folder}: cannot make this folder: {error.strerror}"
        ) from error
