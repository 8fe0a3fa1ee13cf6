"""Finding the weights of the two models that turn a class into a picture: the transformer and the
tokenizer.

Weights come from the checkpoint that was named; else from a folder of pretrained models under the
published name; else, where that was asked for, from the hub; else they are drawn from the seed, and
a warning says so. A command always runs, and never passes noise off as a picture.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from autoregressive.errors import SettingName, Spelling, UserError, missing_extra
from autoregressive.folders import can_be_written, in_checkout, pretrained_folder
from autoregressive.weights.options import file_in
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
    folders: tuple[Path, ...]  # where weights are looked for; downloads go to the first
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
    there = file_in(settings.folders, file_name)
    published = published_as(Path(file_name)) if file_name is not None else None
    if there is None and settings.download and published is not None:
        folder = settings.folders[0]
        if not can_be_written(folder):
            told = f": {folder} cannot be written; choose another "
            raise UserError(SettingName("download"), told, SettingName("pretrained_dir"))
        try:
            from autoregressive.weights.hub import fetch
        except ModuleNotFoundError as error:
            raise missing_extra(error) or error from error
        return fetch(published, folder)
    return there


@dataclass(frozen=True)
class MissingWeights:
    """What runs without trained weights, and how to get them."""

    names: tuple[str, ...]  # of the models, for people
    seed: int  # draws the weights in their place
    ways: tuple[tuple[str | SettingName, ...], ...]  # to trained weights, a message each

    def warning(self, spell: Spelling) -> str:
        """The lines that tell it where a picture is drawn all the same."""
        return "\n".join(
            [
                "WARNING: UNTRAINED WEIGHTS. The picture will be noise; only the speed is real.",
                f"  {' and '.join(self.names)}: drawn from seed {self.seed}",
                *(f"  {UserError(*way).spelled(spell)}" for way in self.ways),
            ]
        )

    def error(self) -> UserError:
        """The error that tells it where noise was not asked for."""
        ways = itertools.chain.from_iterable((*way, "; ") for way in self.ways)
        what = f"there are no trained weights for {' and '.join(self.names)}: "
        return UserError(what, *ways, "or use ", SettingName("random_weights"), " for noise")


def missing_weights(settings: ModelSettings, found: FoundWeights) -> MissingWeights | None:
    """What to tell the user where a model has no trained weights; None if both have."""
    missing: dict[str, str | None] = {}  # name for people -> published file
    if found.gpt is None:
        size, grid = settings.image_size, settings.grid
        name = f"{settings.gpt_model} for {size} px in {grid} x {grid} tokens"
        missing[name] = gpt_file_name(settings.gpt_model, size, settings.downsample_size)
    if found.vq is None:
        missing[settings.vq_model] = vq_file_name(settings.vq_model)
    if not missing:
        return None
    return MissingWeights(tuple(missing), settings.seed, tuple(_ways_to_weights(settings, missing)))


def _ways_to_weights(
    settings: ModelSettings, missing: dict[str, str | None]
) -> Iterator[tuple[str | SettingName, ...]]:
    if settings.random_weights:
        yield "leave out ", SettingName("random_weights"), " to use trained ones"
        return
    shipped = [name for name in (DEMO_GPT, DEMO_VQ) if name in missing.values()]
    published = [name for name in missing.values() if name is not None and name not in shipped]
    folder = settings.folders[0]
    if published:
        files = " and ".join(published)
        yield "get them with ", SettingName("download"), f", which puts {files} into {folder}"
    if shipped:
        files = " and ".join(shipped)
        here = folder == pretrained_folder() and in_checkout()
        fetch = "git checkout pretrained_models" if here else f"copy them into {folder}"
        yield (f"{files} ship with the program: {fetch}",)
    unpublished = " and ".join(name for name, file_name in missing.items() if file_name is None)
    if unpublished:
        sizes = [file.image_size for file in PUBLISHED_FILES if file.model == settings.gpt_model]
        others = f" (there are some for {' and '.join(map(str, sizes))} px)" if sizes else ""
        yield (
            f"none are published for {unpublished}{others}: give your own with ",
            SettingName("gpt_ckpt"),
        )
