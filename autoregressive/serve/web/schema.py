"""Bodies of requests and answers. Names and shapes are OpenAI's where OpenAI has them."""

from numbers import Integral
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoregressive.models.sampling import BOUNDS

MOST_IMAGES = 10
MOST_PARTIAL_IMAGES = 3
OutputFormat = Literal["png", "jpeg", "webp"]
_Optional = Annotated[
    Any, Field(default=None, description="Accepted for OpenAI's clients; without effect.")
]


def _bounded(name: str, description: str) -> Any:
    """The field of a sampling parameter, within its bounds."""
    bounds = BOUNDS[name]
    limits: dict[str, Any] = {"gt" if bounds.above_least else "ge": bounds.least, "le": bounds.most}
    if bounds.kind is not Integral:
        limits["allow_inf_nan"] = False
    return Field(None, description=description, **limits)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class CodesRequest(_Body):
    """What to draw, and how."""

    prompt: str | None = Field(None, max_length=1000, description="A class, by name or id.")
    class_label: int | None = Field(
        None, ge=0, description="A class by id; counts before `prompt`."
    )
    model: str | None = Field(
        None, max_length=200, description="The served model's name, or nothing."
    )
    n: int | None = Field(None, ge=1, le=MOST_IMAGES, description="How many images.")
    seed: int | None = _bounded(
        "seed", "The same draws again, on the same machine. Left out: random."
    )
    cfg_scale: float | None = _bounded("cfg_scale", "Guidance; 1 and below: none.")
    cfg_interval: int | None = _bounded(
        "cfg_interval", "Guide the first N + 2 tokens only; -1: all."
    )
    temperature: float | None = _bounded("temperature", "0 takes the likeliest token.")
    top_k: int | None = _bounded(
        "top_k", "Draw from the N likeliest tokens; 0, or more than there are: from all."
    )
    top_p: float | None = _bounded(
        "top_p", "Draw from the likeliest tokens that make up this probability."
    )
    user: _Optional
    safety_identifier: _Optional


class StreamRequest(CodesRequest):
    """What to draw, and how, with the format of the files."""

    size: str | None = Field(
        None, max_length=20, description="WIDTHxHEIGHT of the served model, or auto."
    )
    output_format: OutputFormat | None = Field(None, description="Default: png.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp, 0 to 100."
    )
    background: _Optional
    complexity: _Optional
    frame_count: _Optional
    frame_duration_ms: _Optional
    moderation: _Optional
    quality: _Optional
    style: _Optional
    svg: _Optional

    @property
    def picture_format(self) -> OutputFormat:
        """The format of the files."""
        return self.output_format or "png"


class ImageRequest(StreamRequest):
    """OpenAI's request for images, with the sampling parameters as extra fields."""

    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url: where the service stores images."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=MOST_PARTIAL_IMAGES, description="Previews of each image, with `stream`."
    )


class TokenDetails(BaseModel):
    """Tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens: a class token an image in, an image's codes out."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails
    output_tokens_details: TokenDetails

    @classmethod
    def of(cls, images: int, tokens_of_image: int) -> "Usage":
        """The usage of so many finished images."""
        drawn = images * tokens_of_image
        return cls(
            input_tokens=images,
            output_tokens=drawn,
            total_tokens=images + drawn,
            input_tokens_details=TokenDetails(text_tokens=images, image_tokens=0),
            output_tokens_details=TokenDetails(text_tokens=0, image_tokens=drawn),
        )


class ImageData(BaseModel):
    """One image."""

    b64_json: str | None = None
    url: str | None = None


class ImagesAnswer(BaseModel):
    """OpenAI's answer, and the seed that was used."""

    created: int
    data: list[ImageData]
    size: str
    output_format: OutputFormat
    usage: Usage
    model: str
    seed: int


class CodesData(BaseModel):
    """The codes of one image, row by row."""

    codes: list[int]


class CodesAnswer(BaseModel):
    """Codes, for clients that have their own decoder."""

    created: int
    data: list[CodesData]
    grid: int
    codebook_size: int
    usage: Usage
    model: str
    seed: int


class SamplingDefaults(BaseModel):
    """The values of fields that a request leaves out."""

    cfg_scale: float
    cfg_interval: int
    temperature: float
    top_k: int
    top_p: float


class ModelData(BaseModel):
    """OpenAI's model, and what the page wants to know."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llamagen"
    image_size: int
    grid: int
    tokens_per_image: int
    codebook_size: int
    num_classes: int
    trained: bool
    defaults: SamplingDefaults


class ModelsAnswer(BaseModel):
    """The one model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelData]


class ClassData(BaseModel):
    """One class."""

    id: int
    name: str


class ClassesAnswer(BaseModel):
    """Classes whose name or id contains what was searched for."""

    object: Literal["list"] = "list"
    data: list[ClassData]
    total: int


class StatusAnswer(BaseModel):
    """The state of the service in one word."""

    status: str


class VersionAnswer(BaseModel):
    """The version of the program."""

    version: str


class ErrorDetail(BaseModel):
    """An error, and the field that it is about."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """OpenAI's error."""

    error: ErrorDetail
