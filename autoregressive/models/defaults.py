"""The values that suit a family of models, for what the user leaves out: one table a family."""

from dataclasses import dataclass

from autoregressive.models.classes import DEMO, IMAGENET, ClassNames, numbered_classes
from autoregressive.models.sampling_params import SamplingParams

DEMO_MODEL = "GPT-demo"  # the transformer that ships with the repository


@dataclass(frozen=True)
class ModelDefaults:
    """The values that suit a family's published weights."""

    image_sizes: tuple[int, ...]  # pixels of a side that the family makes
    image_size: int
    vq_model: str  # brings its codebook and downsample size along
    classes: ClassNames
    class_labels: tuple[int, ...]
    sampling: SamplingParams

    @property
    def num_classes(self) -> int:
        """Classes of the data set."""
        return len(self.classes)

    def classes_of(self, count: int) -> ClassNames:
        """The names of a data set of so many classes."""
        return self.classes if count == self.num_classes else numbered_classes(count)


LLAMAGEN_DEFAULTS = ModelDefaults(
    image_sizes=(256, 384, 512),
    image_size=384,
    vq_model="VQ-16",
    classes=IMAGENET,
    class_labels=(207, 360, 387, 974, 88, 979, 417, 279),
    sampling=SamplingParams(cfg_scale=4.0, top_k=2000),
)
DEMO_DEFAULTS = ModelDefaults(
    image_sizes=(128,),
    image_size=128,
    vq_model="VQ-demo",
    classes=DEMO,
    class_labels=(0, 1, 2, 3, 4, 5, 6, 7),
    sampling=SamplingParams(cfg_scale=2.0, top_k=0),
)


def model_defaults(gpt_model: str) -> ModelDefaults:
    """The table of the family that a transformer belongs to."""
    return DEMO_DEFAULTS if gpt_model == DEMO_MODEL else LLAMAGEN_DEFAULTS
