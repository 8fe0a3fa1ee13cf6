"""Finds the weights of the two models that turn a class into a picture: the transformer and the
tokenizer.

Weights come from the flag; else from the folder of pretrained models under the published name;
else, with --download, from the hub; else they are drawn from the seed, and a warning says so. A
command always runs, and never passes noise off as a picture.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from autoregressive.errors import UserError
from autoregressive.folders import can_be_written, in_checkout, pretrained_folder
from autoregressive.weights.hub import fetch
from autoregressive.weights.published import (
    DEMO_GPT,
    DEMO_VQ,
    PUBLISHED_FILES,
    gpt_file_name,
    published_as,
    vq_file_name,
)


@dataclass(frozen=True)
class ModelSettings:
    """What to build, from which weights, and where: resolved, in range, and fitting together."""

    gpt_model: str
    vq_model: str
    gpt_ckpt: Path | None  # as typed; None: look for the weights
    vq_ckpt: Path | None
    from_fsdp: bool
    ema: bool
    random_weights: bool
    download: bool
    pretrained: Path  # the folder where weights are looked for and downloaded to
    image_size: int  # pixels of a side
    downsample_size: int  # pixels of a code's side
    codebook_size: int
    codebook_embed_dim: int
    num_classes: int
    precision: torch.dtype  # of the transformer; the tokenizer runs in float32, as LlamaGen's
    device: torch.device
    seed: int  # draws the weights that are not found

    @property
    def grid(self) -> int:
        """Side of the square of codes that makes an image."""
        return self.image_size // self.downsample_size

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image."""
        return self.grid**2


@dataclass(frozen=True)
class FoundWeights:
    """Where the weights of each model are; None where they are drawn from the seed."""

    gpt: Path | None
    vq: Path | None

    @property
    def trained(self) -> bool:
        """Whether a picture made with them can be more than noise."""
        return self.gpt is not None and self.vq is not None


def file_in(folder: Path, file_name: str | None) -> Path | None:
    """The file of that name, or of the same name but ending in .safetensors: its conversion."""
    if file_name is None:
        return None
    candidates = (folder / file_name, (folder / file_name).with_suffix(".safetensors"))
    # Path.exists raises where a name is too long
    return next((path for path in candidates if os.path.exists(path)), None)


def find_weights(settings: ModelSettings) -> FoundWeights:
    """Looks where the module's docstring says, in that order; downloads if that was asked for.

    Raises:
        UserError: a download failed.
    """
    if settings.random_weights:
        return FoundWeights(None, None)
    gpt_file = gpt_file_name(settings.gpt_model, settings.image_size, settings.downsample_size)
    vq_file = vq_file_name(settings.vq_model)
    return FoundWeights(
        _find(settings, settings.gpt_ckpt, gpt_file), _find(settings, settings.vq_ckpt, vq_file)
    )


def _find(settings: ModelSettings, typed: Path | None, file_name: str | None) -> Path | None:
    if typed is not None:
        return typed
    there = file_in(settings.pretrained, file_name)
    published = published_as(Path(file_name)) if file_name is not None else None
    if there is None and settings.download and published is not None:
        if not can_be_written(settings.pretrained):
            raise UserError(
                f"--download: {settings.pretrained} cannot be written; choose another "
                "--pretrained-dir"
            )
        return fetch(published, settings.pretrained)
    return there


def untrained_warning(settings: ModelSettings, found: FoundWeights) -> str | None:
    """What to tell the user, in a few lines, when a model runs without trained weights."""
    if found.trained:
        return None
    missing: dict[str, str | None] = {}  # name for people -> published file
    if found.gpt is None:
        file_name = gpt_file_name(settings.gpt_model, settings.image_size, settings.downsample_size)
        missing[
            f"{settings.gpt_model} for {settings.image_size} px in {settings.grid} x "
            f"{settings.grid} tokens"
        ] = file_name
    if found.vq is None:
        missing[settings.vq_model] = vq_file_name(settings.vq_model)
    return "\n".join(
        [
            "WARNING: UNTRAINED WEIGHTS. The picture will be noise; only the speed is real.",
            f"  {' and '.join(missing)}: drawn from seed {settings.seed}",
            *_ways_to_weights(settings, missing),
        ]
    )


def _ways_to_weights(settings: ModelSettings, missing: dict[str, str | None]) -> list[str]:
    if settings.random_weights:
        return ["  leave out --random-weights to use trained ones"]
    ways = []
    published = [
        name for name in missing.values() if name is not None and name not in (DEMO_GPT, DEMO_VQ)
    ]
    if published and in_checkout():
        folder = (
            ""
            if settings.pretrained == pretrained_folder()
            else f" --folder {shlex.quote(str(settings.pretrained))}"
        )
        ways.append(
            f"  get them: python scripts/download_models.py {' '.join(published)}{folder}  (or add "
            "--download)"
        )
    elif published:
        ways.append(
            f"  get them: add --download, which puts {' and '.join(published)} into "
            f"{settings.pretrained}"
        )
    shipped = [name for name in (DEMO_GPT, DEMO_VQ) if name in missing.values()]
    if shipped and in_checkout():
        ways.append(
            "  get them: git checkout pretrained_models, or train them: python "
            "scripts/demo_training/train_demo.py"
        )
    elif shipped:
        ways.append(
            f"  copy {' and '.join(shipped)} from the repository's pretrained_models into "
            f"{settings.pretrained}"
        )
    unpublished = " and ".join(name for name, file_name in missing.items() if file_name is None)
    if unpublished:
        sizes = " and ".join(
            str(file.image_size) for file in PUBLISHED_FILES if file.model == settings.gpt_model
        )
        others = f" (there are some for {sizes} px)" if sizes else ""
        ways.append(
            f"  none are published for {unpublished}{others}: give your own with --gpt-ckpt"
        )
    return ways
