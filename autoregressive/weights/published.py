"""The checkpoints that LlamaGen's authors have published, as data; nothing here touches the network
or the disk.
"""

from dataclasses import dataclass

HUB_REPOSITORY = "FoundationVision/LlamaGen"

# Said to whoever asks for weights that do not exist.
UNPUBLISHED = "images of 512 px, and GPT-XL and above at 256 px, have no published weights"


@dataclass(frozen=True)
class PublishedFile:
    """One file at the root of the hub repository."""

    file_name: str
    model: str  # a name of GPT_SHAPES or VQ_CONFIGS
    image_size: int | None = (
        None  # pixels of a side that the transformer makes; None for a tokenizer, which takes any
    )


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


def published_gpt(model: str, image_size: int) -> PublishedFile | None:
    """The transformer's weights for images of that many pixels a side (at downsample 16); None if
    there are none.
    """
    return _find(model, image_size)


def published_vq(vq_model: str) -> PublishedFile | None:
    """The tokenizer's weights; None for a name that is not published."""
    return _find(vq_model, None)


def _find(model: str, image_size: int | None) -> PublishedFile | None:
    return next(
        (file for file in PUBLISHED_FILES if (file.model, file.image_size) == (model, image_size)),
        None,
    )
