"""The files of weights that LlamaGen's authors have published, and of those that ship with the
repository, as data. Nothing here imports torch, or touches the network or the disk.
"""

from dataclasses import dataclass
from pathlib import Path

HUB_REPOSITORY = "FoundationVision/LlamaGen"
DEMO_GPT, DEMO_VQ = "demo_gpt.safetensors", "demo_vq.safetensors"  # ship with the repository

# The messages that say this answer a request for weights that do not exist.
UNPUBLISHED = "images of 512 px, and GPT-XL and above at 256 px, have no published weights"


@dataclass(frozen=True)
class PublishedFile:
    """One file of weights: at the root of the hub repository, or shipped."""

    file_name: str
    model: str  # a name of GPT_SHAPES or VQ_CONFIGS
    # pixels of a side that the transformer makes; None for a tokenizer, which takes any size
    image_size: int | None = None
    downsample_size: int = 16  # of the tokenizer that the transformer goes with


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
SHIPPED_FILES = (
    PublishedFile(DEMO_GPT, "GPT-demo", 128, downsample_size=8),
    PublishedFile(DEMO_VQ, "VQ-demo"),
)
_ALL_FILES = (*PUBLISHED_FILES, *SHIPPED_FILES)


def published_file(
    model: str, image_size: int | None = None, downsample_size: int = 16
) -> PublishedFile | None:
    """The file of a model's weights; None if there is none. The sizes are a transformer's."""
    files = {(file.model, file.image_size, file.downsample_size): file for file in _ALL_FILES}
    return files.get((model, image_size, downsample_size))


def published_as(path: Path | None) -> PublishedFile | None:
    """The file that a path is named after, whatever its suffix; None for any other name."""
    stems = {Path(file.file_name).stem: file for file in _ALL_FILES}
    return None if path is None else stems.get(path.stem)
