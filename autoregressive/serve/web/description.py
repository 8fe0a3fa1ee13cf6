"""The service's OpenAPI document, completed with facts that FastAPI cannot know, and its page."""

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from autoregressive.models.sampling_params import BOUNDS
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.schema import CodesRequest, ServedModel
from autoregressive.serve.web.static_files import add_folder

_KEY = "HTTPBearer"


def complete_description(
    app: FastAPI, model: ServedModel, wants_key: Callable[[str], bool]
) -> None:
    """Adds the key, examples that work and exact limits to the document, and removes the 422s.

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
            for field, kinds in schemas[name]["properties"].items():
                for kind in kinds.get("anyOf", ()):
                    _make_exact(kind, field)
        return document

    app.openapi = describe_completely  # type: ignore[method-assign]


def _make_exact(kind: dict[str, Any], field: str) -> None:
    """Makes the largest integer of a field one again: FastAPI's is a float, so 2**63 - 1 is cut."""
    most = BOUNDS[field].most if field in BOUNDS else None
    if kind.get("type") == "integer" and most is not None and kind.get("maximum") == float(most):
        kind["maximum"] = most


def examples(model: ServedModel) -> dict[str, list[dict[str, Any]]]:
    """Bodies that the served model draws, by the names of their schemas.

    The first one shows every setting.
    """
    drawn = {"prompt": _prompt(model), "n": 1, "seed": 7}
    sampling = model.described().defaults.model_dump()
    pictures = {"model": model.name, "size": model.size, "output_format": "png"}
    return {
        "CodesRequest": [{**drawn, "model": model.name, **sampling}, drawn],
        "StreamRequest": [{**drawn, **pictures, **sampling}, drawn],
        "ImageRequest": [
            {**drawn, **pictures, "response_format": "b64_json", **sampling},
            drawn,
            {**drawn, "stream": True, "partial_images": 2},
        ],
    }


def _prompt(model: ServedModel) -> str:
    """The name of the first class, or its id: several classes may bear that name."""
    name = model.classes[0]
    try:
        model.engine_request(CodesRequest.model_validate({"prompt": name}), pixels=False)
    except ApiError:
        return "0"
    return name


def add_docs(app: FastAPI, headers: Mapping[str, str]) -> None:
    """Adds the page /docs, which shows the document.

    Args:
        headers: of the service's pages; the page's own script is added to their policy.
    """
    add_folder(app, "/docs-assets", Path(fastapi_offline.__file__).parent / "static", headers)
    page = get_swagger_ui_html(  # links are relative: a proxy may have the service below a path
        openapi_url="openapi.json",
        title="LlamaGen",
        swagger_js_url="docs-assets/swagger-ui-bundle.js",
        swagger_css_url="docs-assets/swagger-ui.css",
        swagger_favicon_url="static/favicon.svg",
    )
    (script,) = re.findall(rb"<script>(.*?)</script>", page.body, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    policy = headers["Content-Security-Policy"].replace(
        "script-src 'self'", f"script-src 'self' 'sha256-{digest}'"
    )

    @app.get("/docs", include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        return HTMLResponse(page.body, headers={**headers, "Content-Security-Policy": policy})
