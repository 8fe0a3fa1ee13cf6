"""The service's OpenAPI document: FastAPI's, and what FastAPI cannot know."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from autoregressive.serve.web.errors import ApiError
from autoregressive.serve.web.schema import CodesRequest
from autoregressive.serve.web.served_model import ServedModel

# where the document itself is: behind a proxy the service may be below a path of the proxy's
RELATIVE_SERVER = [{"url": "."}]
_KEY = "HTTPBearer"
_SEED = 7


def complete_description(
    app: FastAPI, model: ServedModel, wants_key: Callable[[str], bool]
) -> None:
    """Adds the key and examples that work to the document, and removes the 422s.

    FastAPI describes an invalid request as a 422; this service answers it with a 400.

    Args:
        wants_key: whether a path needs a key.
    """
    describe = app.openapi

    def describe_completely() -> dict[str, Any]:
        document = describe()
        schemas = document["components"]["schemas"]
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if wants_key(path):
                    operation["security"] = [{_KEY: []}]
                    document["components"]["securitySchemes"] = {
                        _KEY: {"type": "http", "scheme": "bearer"}
                    }
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for name, found in examples(model).items():
            schemas[name]["examples"] = found
        return document

    app.openapi = describe_completely  # type: ignore[method-assign]


def examples(model: ServedModel) -> dict[str, list[dict[str, Any]]]:
    """Bodies that the served model draws, by the names of their schemas.

    The first one shows every setting.
    """
    drawn = {"prompt": _prompt(model), "n": 1, "seed": _SEED}
    sampling = model.described().defaults.model_dump()
    pictures = {"model": model.name, "size": model.size, "output_format": "png"}
    streamed = {"stream": True, "partial_images": 2}
    return {
        "CodesRequest": [{**drawn, "model": model.name, **sampling}, drawn],
        "StreamRequest": [{**drawn, **pictures, **sampling}, drawn],
        "ImageRequest": [
            {**drawn, **pictures, "response_format": "b64_json", **sampling},
            drawn,
            {**drawn, **streamed},
        ],
    }


def _prompt(model: ServedModel) -> str:
    """The name of the first class, or its id: several classes may bear that name."""
    name = model.classes[0]
    try:
        model.order(CodesRequest.model_validate({"prompt": name}), pixels=False)
    except ApiError:
        return "0"
    return name
