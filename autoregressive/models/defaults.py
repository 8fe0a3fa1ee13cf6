"""What a command assumes for flags that were not typed, per family of models: one table each; and
what no value may exceed.
"""

from dataclasses import dataclass

from autoregressive.models.classes import DEMO, IMAGENET, ClassNames

DEMO_MODEL = "GPT-demo"  # the transformer that ships with the repository
LARGEST_SCALE = 1000.0  # of guidance; logits stay finite in float32
LARGEST_TEMPERATURE = 1e38  # finite in float32; all tokens are equally likely long before


@dataclass(frozen=True)
class ModelDefaults:
    """The values that suit a family's published weights."""

    image_sizes: tuple[int, ...]  # pixels of a side that the family makes
    image_size: int
    vq_model: str  # brings its codebook and downsample size along
    classes: ClassNames
    class_labels: tuple[int, ...]
    cfg_scale: float
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def num_classes(self) -> int:
        """Classes of the data set."""
        return len(self.classes)


LLAMAGEN_DEFAULTS = ModelDefaults(
    image_sizes=(256, 384, 512),
    image_size=384,
    vq_model="VQ-16",
    classes=IMAGENET,
    class_labels=(207, 360, 387, 974, 88, 979, 417, 279),
    cfg_scale=4.0,
    top_k=2000,
)
DEMO_DEFAULTS = ModelDefaults(
    image_sizes=(128,),
    image_size=128,
    vq_model="VQ-demo",
    classes=DEMO,
    class_labels=(0, 1, 2, 3, 4, 5, 6, 7),
    cfg_scale=2.0,
)


def model_defaults(gpt_model: str) -> ModelDefaults:
    """The table of the family that a transformer belongs to."""
    return DEMO_DEFAULTS if gpt_model == DEMO_MODEL else LLAMAGEN_DEFAULTS
