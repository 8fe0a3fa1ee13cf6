"""The model that is served, and what a request's body means for it."""

from dataclasses import dataclass
from typing import TypeVar

from autoregressive.errors import UserError
from autoregressive.models.classes import ClassNames
from autoregressive.models.defaults import ModelDefaults
from autoregressive.models.sampling import random_seed
from autoregressive.output.records import image_record
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.schema import (
    ClassData,
    CodesRequest,
    ModelData,
    SamplingDefaults,
    StreamRequest,
)
from autoregressive.serve.worker.messages import EngineRequest

_T = TypeVar("_T")
_LONGEST_NAME = 64  # characters


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

    @property
    def tokens_of_image(self) -> int:
        """Tokens of an image."""
        return self.grid**2

    @property
    def size(self) -> str:
        """The size of an image as OpenAI writes it."""
        return f"{self.image_size}x{self.image_size}"

    def described(self) -> ModelData:
        """The model as /v1/models has it."""
        return ModelData(
            id=self.name,
            created=self.created,
            image_size=self.image_size,
            grid=self.grid,
            tokens_per_image=self.tokens_of_image,
            codebook_size=self.codebook_size,
            num_classes=len(self.classes),
            trained=self.trained,
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
        if body.model is not None and body.model != self.name:
            raise self.no_such_model(body.model)
        if isinstance(body, StreamRequest) and body.size not in (None, "auto", self.size):
            raise ApiError(400, f"size must be {self.size} or auto", "invalid_value", "size")
        return EngineRequest(
            request_id=-1,
            class_label=self._class_label(body),
            n=_or(body.n, 1),
            params=self.defaults.sampling.updated(
                cfg_scale=body.cfg_scale,
                cfg_interval=body.cfg_interval,
                temperature=body.temperature,
                top_k=body.top_k,
                top_p=body.top_p,
                seed=_or(body.seed, random_seed()),
            ),
            pixels=pixels,
            client=client,
        )

    def record_of(self, request: EngineRequest, index: int) -> dict[str, object]:
        """How one image of a request was made: enough to make it again on the same machine."""
        label = request.class_label
        return image_record(
            self.record,
            request.params,
            label=label,
            class_name=self.classes[label],
            images=request.n,
            image=index,
        )

    def _class_label(self, body: CodesRequest) -> int:
        if body.class_label is not None:
            if body.class_label >= len(self.classes):
                raise ApiError(
                    400,
                    f"class_label must be 0 to {len(self.classes) - 1}",
                    "invalid_value",
                    "class_label",
                )
            return body.class_label
        if body.prompt is None:
            raise ApiError(
                400,
                "prompt is missing: a class, by name or id (see /v1/classes)",
                "missing_value",
                "prompt",
            )
        if len(body.prompt) > _LONGEST_NAME:  # a search for similar names would take long
            message = (
                "prompt must be the name or id of a class (see /v1/classes), not a description"
            )
            raise ApiError(400, message, "invalid_value", "prompt")
        try:
            return self.classes.resolve(body.prompt)
        except UserError as error:
            message = error.spelled(lambda setting: "/v1/classes")
            raise ApiError(400, message, "invalid_value", "prompt") from error


def _or(given: _T | None, otherwise: _T) -> _T:
    return otherwise if given is None else given
