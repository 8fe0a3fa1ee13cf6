"""Bodies of requests and answers, and what a request's body means for the model that is served.
Names and shapes are OpenAI's where OpenAI has them.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoregressive.errors import UserError
from autoregressive.models.classes import DEMO, ClassNames
from autoregressive.models.defaults import ModelDefaults
from autoregressive.models.sampling_params import BOUNDS, random_seed
from autoregressive.output.records import image_record
from autoregressive.serve.web.api_errors import ApiError, invalid
from autoregressive.serve.worker.messages import EngineRequest

_LONGEST_NAME = 64  # characters of a class
_LONGEST_KEEP_SECONDS = 300
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


class CodesRequest(BaseModel):
    """What to draw, and how."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    prompt: str | None = Field(None, max_length=1000, description="A class, by name or id.")
    class_label: int | None = Field(
        None, ge=0, description="A class by id; counts before `prompt`."
    )
    model: str | None = Field(
        None, max_length=200, description="The served model's name, or nothing."
    )
    n: int | None = Field(None, ge=1, le=10, description="How many images.")
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


class PictureRequest(CodesRequest):
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


class StreamRequest(PictureRequest):
    """The page's request for images."""

    keep_seconds: float | None = Field(
        None,
        ge=0,
        le=_LONGEST_KEEP_SECONDS,
        allow_inf_nan=False,
        description="How long the drawing goes on after the reader of its events has left. Until "
        "then its events can be followed again by its id. Default: 0.",
    )


class ImageRequest(PictureRequest):
    """OpenAI's request for images, with the sampling parameters as extra fields."""

    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url: where the service stores images."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Previews of each image, with `stream`."
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
    class_pictures: str | None = Field(
        description="The address of one picture of all classes, 16 in a row, if there is one."
    )
    defaults: SamplingDefaults


class ModelsAnswer(BaseModel):
    """The one model that is served, under each of its names."""

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


@dataclass(frozen=True)
class ServedModel:
    """The model as clients see it, against which requests are checked."""

    name: str
    created: int  # Unix time of the start
    image_size: int  # pixels of a side
    grid: int  # tokens of a side
    codebook_size: int
    classes: ClassNames
    defaults: ModelDefaults
    trained: bool
    # how every picture is made, as `generation_record` has it, without the sampling parameters
    record: dict[str, object]
    aliases: tuple[str, ...] = ()  # other names that clients may use

    @property
    def names(self) -> tuple[str, ...]:
        """All its names; answers have the first."""
        return (self.name, *self.aliases)

    @property
    def tokens_of_image(self) -> int:
        """Tokens of an image."""
        return self.grid**2

    @property
    def size(self) -> str:
        """The size of an image as OpenAI writes it."""
        return f"{self.image_size}x{self.image_size}"

    def described(self, name: str | None = None) -> ModelData:
        """The model as /v1/models has it, under one of its names."""
        return ModelData(
            id=name or self.name,
            created=self.created,
            image_size=self.image_size,
            grid=self.grid,
            tokens_per_image=self.tokens_of_image,
            codebook_size=self.codebook_size,
            num_classes=len(self.classes),
            trained=self.trained,
            class_pictures="static/demo_classes.webp" if self.classes == DEMO else None,
            defaults=SamplingDefaults.model_validate(self.defaults.sampling, from_attributes=True),
        )

    def no_such_model(self, name: str) -> ApiError:
        """The error for a client that asks for another model."""
        return ApiError(
            404,
            f"the model '{name}' does not exist: this service has {self.name}",
            "model_not_found",
            "model",
        )

    def search(self, word: str) -> list[ClassData]:
        """Classes whose name contains the word, or whose id begins with it; names that begin with
        it come first.
        """
        word = " ".join(word.lower().split())
        found = [
            ClassData(id=label, name=name)
            for label, name in enumerate(self.classes.names)
            if word in name.lower() or str(label).startswith(word)
        ]
        return sorted(
            found,
            key=lambda one: (str(one.id) != word, not one.name.lower().startswith(word), one.id),
        )

    def engine_request(
        self, body: CodesRequest, *, pixels: bool, client: str = ""
    ) -> EngineRequest:
        """The request to the engine; the dispatcher fills in its id and its deadlines.

        Raises:
            ApiError: no such model, class or size.
        """
        if body.model is not None and body.model not in self.names:
            raise self.no_such_model(body.model)
        if isinstance(body, PictureRequest) and body.size not in (None, "auto", self.size):
            raise invalid(f"size must be {self.size} or auto", "size")
        return EngineRequest(
            request_id=-1,
            class_label=self._class_label(body),
            n=body.n or 1,
            params=self.defaults.sampling.updated(
                cfg_scale=body.cfg_scale,
                cfg_interval=body.cfg_interval,
                temperature=body.temperature,
                top_k=body.top_k,
                top_p=body.top_p,
                seed=random_seed() if body.seed is None else body.seed,
            ),
            pixels=pixels,
            client=client,
        )

    def record_of(self, request: EngineRequest, index: int) -> dict[str, object]:
        """How one image of a request was made: enough to make it again on the same machine."""
        return image_record(
            self.record,
            request.params,
            label=request.class_label,
            class_name=self.classes[request.class_label],
            images=request.n,
            image=index,
        )

    def _class_label(self, body: CodesRequest) -> int:
        label, prompt = body.class_label, body.prompt
        if label is not None and label < len(self.classes):
            return label
        if label is not None:
            raise invalid(f"class_label must be 0 to {len(self.classes) - 1}", "class_label")
        if prompt is None:
            raise ApiError(
                400,
                "prompt is missing: a class, by name or id (see /v1/classes)",
                "missing_value",
                "prompt",
            )
        if len(prompt) > _LONGEST_NAME:  # a search for similar names would take long
            raise invalid(
                "prompt must be the name or id of a class (see /v1/classes), not a description",
                "prompt",
            )
        try:
            return self.classes.resolve(prompt)
        except UserError as error:
            raise invalid(error.spelled(lambda setting: "/v1/classes"), "prompt") from error
