"""The files of weights that LlamaGen's authors have published, and of those that ship with the
repository, as data. Nothing here imports torch, or touches the network or the disk.
"""

from dataclasses import dataclass
from pathlib import Path

from autoregressive.models.defaults import DEMO_DEFAULTS, DEMO_MODEL
from tokenizer.tokenizer_image.config import VQ_CONFIGS

HUB_REPOSITORY = "FoundationVision/LlamaGen"
DEMO_GPT, DEMO_VQ = "demo_gpt.safetensors", "demo_vq.safetensors"  # ship with the repository

# The messages that say this answer a request for weights that do not exist.
UNPUBLISHED = "images of 512 px, and GPT-XL and above at 256 px, have no published weights"

_PUBLISHED_DOWNSAMPLE = 16  # of the tokenizer that every published transformer goes with


@dataclass(frozen=True)
class PublishedFile:
    """One file at the root of the hub repository."""

    file_name: str
    model: str  # a name of GPT_SHAPES or VQ_CONFIGS
    # pixels of a side that the transformer makes; None for a tokenizer, which takes any size
    image_size: int | None = None


PUBLISHED_FILES: tuple[PublishedFile, ...] = (
    PublishedFile("vq_ds16_c2i.pt", "VQ-16"),
    PublishedFile("vq_ds8_c2i.pt", "VQ-8"),
    PublishedFile("c2i_B_256.pt", "GPT-B", 256),
    PublishedFile("c2i_L_256.pt", "GPT-L", 256),
    PublishedFile("c2i_B_384.pt", "GPT-B", 384),
    PublishedFile("c2i_L_384.pt", "GPT-L", 384),
    PublishedFile("c2i_XL_384.pt", "GPT-XL", 384),
    PublishedFile("c2i_XXL_384.pt", "GPT-XXL", 384),
    PublishedFile("c2i_3B_384.pt", "GPT-3B", 384),
)


def gpt_file_name(gpt_model: str, image_size: int, downsample_size: int) -> str | None:
    """The file that a transformer's weights for images of that size are published in, or shipped
    in; None if there is none.
    """
    if gpt_model == DEMO_MODEL:
        shipped = (DEMO_DEFAULTS.image_size, VQ_CONFIGS[DEMO_DEFAULTS.vq_model].downsample_size)
        return DEMO_GPT if (image_size, downsample_size) == shipped else None
    return _file_name(gpt_model, image_size) if downsample_size == _PUBLISHED_DOWNSAMPLE else None


def vq_file_name(vq_model: str) -> str | None:
    """The file that a tokenizer's weights are published in, or shipped in; None if there
    is none.
    """
    return DEMO_VQ if vq_model == DEMO_DEFAULTS.vq_model else _file_name(vq_model, None)


def published_as(path: Path) -> PublishedFile | None:
    """The published file that a path is named after, whatever its suffix; None for any
    other name.
    """
    return next((file for file in PUBLISHED_FILES if Path(file.file_name).stem == path.stem), None)


def _file_name(model: str, image_size: int | None) -> str | None:
    wanted = (model, image_size)
    files = (file for file in PUBLISHED_FILES if (file.model, file.image_size) == wanted)
    return next((file.file_name for file in files), None)
