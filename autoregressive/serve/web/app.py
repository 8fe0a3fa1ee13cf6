"""The service as an ASGI application: routes, the page, the guards around them."""

from collections.abc import Sequence
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from autoregressive.serve.web.api_errors import ApiError, internal_error
from autoregressive.serve.web.app_state import AppState
from autoregressive.serve.web.authentication import Authentication, check_host
from autoregressive.serve.web.description import RELATIVE_SERVER, add_docs, complete_description
from autoregressive.serve.web.generation import ClientLeft
from autoregressive.serve.web.guards import App, Guards, Receive, RequestLog, Scope, Send
from autoregressive.serve.web.openai_routes import add_openai_routes
from autoregressive.serve.web.page_routes import add_page_routes
from autoregressive.serve.web.schema import (
    ClassesAnswer,
    ErrorAnswer,
    ModelData,
    ModelsAnswer,
    StatusAnswer,
    VersionAnswer,
)
from autoregressive.serve.web.static_files import add_file, add_folder, has_already
from autoregressive.serve.web.store import MEDIA_TYPES
from autoregressive.serve.web.strict_route import StrictRoute

PAGE = Path(__file__).parent / "static"
# These need no key, nor does what is below a path that ends in a slash.
_OPEN_PATHS = ("/", "/health", "/ready", "/static/")
_DOCS_PATHS = ("/docs", "/openapi.json", "/docs-assets/")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src "
    "'self' data: blob:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors "
    "'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "Accept-Ranges": "none",
}
_WRONG: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorAnswer, "description": "The key is missing or wrong."},
    429: {"model": ErrorAnswer, "description": "Too many wrong keys came from this address."},
}
_NO_MODEL: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorAnswer, "description": "No such model."}
}
_ANYWHERE: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in (
        (400, "A parameter is unknown or out of range, or the request is not HTTP/1.1."),
        (413, "The body is too large."),
        (421, "The service has no key, and does not answer to this name."),
        (431, "The headers are too large."),
        (500, "A bug; the log has it."),
    )
}


def build_app(
    state: AppState,
    *,
    version: str,
    docs: bool,
    api_keys: Sequence[str],
    public_host: str | None = None,
) -> App:
    """The whole service.

    Args:
        state: the objects that the routes work with.
        version: of the program.
        docs: whether /docs and /openapi.json are there.
        api_keys: clients send one of them. Without keys, every client may use the service as
            localhost or `public_host`.
        public_host: the name that clients use, where it is not this machine's own.
    """
    open_paths = (*_OPEN_PATHS, *(_DOCS_PATHS if docs else ()))

    def is_open(path: str) -> bool:
        folders = tuple(one for one in open_paths if one.endswith("/") and one != "/")
        return path in open_paths or path.startswith(folders)

    app = build_routes(state, version=version, docs=docs)
    complete_description(app, state.model, lambda path: bool(api_keys) and not is_open(path))
    # A key keeps other sites out, so any host will do.
    by_host = partial(check_host, public=public_host)
    check_access = Authentication(api_keys, is_open).check if api_keys else by_host
    logged = RequestLog(Guards(app, check_access, state.turns), state.broker.count, api_keys)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await (logged if scope["type"] == "http" else app)(scope, receive, send)

    return answer


def build_routes(state: AppState, *, version: str, docs: bool) -> FastAPI:
    """The routes, without the guards around them; arguments as of `build_app`."""
    app = FastAPI(
        title="LlamaGen",
        version=version,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if docs else None,
        responses=_ANYWHERE,
        servers=RELATIVE_SERVER,
        redirect_slashes=False,  # a redirect would name the host that the request names
    )
    app.router.route_class = StrictRoute
    add_openai_routes(app, state)
    add_page_routes(app, state)
    _add_facts(app, state, version)
    if state.store is not None:
        _add_stored_images(app, state)
    _add_state(app, state)
    add_file(app, "/", PAGE / "index.html", _PAGE_HEADERS)
    add_folder(app, "/static", PAGE, _PAGE_HEADERS)
    if docs:
        add_docs(app, _PAGE_HEADERS)
    _add_errors(app)
    return app


def _add_facts(app: FastAPI, state: AppState, version: str) -> None:
    model = state.model

    @app.get("/v1/models", response_model=ModelsAnswer, responses=_WRONG, tags=["facts"])
    async def list_models() -> ModelsAnswer:
        """The served model."""
        return ModelsAnswer(data=[model.described()])

    @app.get(
        "/v1/models/{model_id:path}",
        response_model=ModelData,
        responses={**_WRONG, **_NO_MODEL},
        tags=["facts"],
    )
    async def describe_model(
        model_id: str = PathParameter(openapi_examples={"served": {"value": model.name}}),
    ) -> ModelData:
        """The served model, by its name."""
        if model_id != model.name:
            raise model.no_such_model(model_id)
        return model.described()

    @app.get("/v1/classes", response_model=ClassesAnswer, responses=_WRONG, tags=["facts"])
    async def list_classes(
        search: str = Query(
            "", max_length=200, description="Part of a name, or the beginning of an id."
        ),
        limit: int = Query(1000, ge=1, le=100_000, description="How many at most."),
    ) -> ClassesAnswer:
        """The classes that can be drawn."""
        found = model.search(search)
        return ClassesAnswer(data=found[:limit], total=len(found))

    @app.get("/version", response_model=VersionAnswer, responses=_WRONG, tags=["facts"])
    async def tell_version() -> VersionAnswer:
        """The version of the program."""
        return VersionAnswer(version=version)


def _add_stored_images(app: FastAPI, state: AppState) -> None:
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {media_type: {} for media_type in MEDIA_TYPES.values()}},
        304: {"description": "The client has it already."},
        404: {"model": ErrorAnswer, "description": "There is no such image."},
        503: {"model": ErrorAnswer, "description": "The disk does not give it now."},
    }

    @app.get(
        "/v1/files/{name}",
        response_class=Response,
        responses={**_WRONG, **answers},
        tags=["images"],
    )
    async def fetch_image(name: str, request: Request) -> Response:
        """A stored image."""
        picture = await state.stored(name)
        if picture is None:
            raise ApiError(404, "there is no such image, or not any more", "not_found")
        headers = {
            "ETag": picture.etag,
            "Last-Modified": formatdate(picture.modified, usegmt=True),
            # what a name stands for never changes
            "Cache-Control": "private, max-age=31536000, immutable",
            "X-Content-Type-Options": "nosniff",
            "Accept-Ranges": "none",
        }
        if has_already(request, picture.etag):
            return Response(status_code=304, headers=headers)
        return Response(picture.content, media_type=picture.media_type, headers=headers)


def _add_state(app: FastAPI, state: AppState) -> None:
    broker = state.broker

    @app.get(
        "/health",
        response_model=StatusAnswer,
        responses={503: {"model": ErrorAnswer}},
        tags=["state"],
    )
    async def tell_health() -> StatusAnswer:
        """Whether the service is alive; 503 once one of its processes is lost, and while one does
        not respond.
        """
        if (why := broker.unhealthy) is not None:
            raise ApiError(503, why, "engine_lost", None, 10)
        return StatusAnswer(status="alive")

    @app.get(
        "/ready",
        response_model=StatusAnswer,
        responses={503: {"model": ErrorAnswer}},
        tags=["state"],
    )
    async def tell_ready() -> StatusAnswer:
        """Whether requests are accepted."""
        broker.require_ready()
        return StatusAnswer(status="ready")

    text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {}}},
        **_WRONG,
        503: {"model": ErrorAnswer, "description": "The process that counts does not respond."},
    }

    @app.get("/metrics", response_class=Response, responses=text, tags=["state"])
    async def tell_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(await broker.metrics_text(), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def tell_api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def tell_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        invalid = _as_api_error(error.errors())
        return JSONResponse(invalid.body, status_code=invalid.status)

    @app.exception_handler(ClientLeft)
    async def tell_nobody(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)

    # starlette raises it again behind this answer, and the log gets it
    @app.exception_handler(Exception)
    async def tell_internal_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(internal_error().body, status_code=500)

    @app.exception_handler(HTTPException)
    async def tell_http_error(request: Request, error: HTTPException) -> JSONResponse:
        words = {
            404: ("there is no such path", "not_found"),
            405: ("this path does not take this method", "method_not_allowed"),
        }
        message, code = words.get(
            error.status_code, ("the request cannot be answered", "bad_request")
        )
        body = ApiError(error.status_code, message, code).body
        headers = dict(error.headers or {})
        if "GET" in headers.get("Allow", ""):
            headers["Allow"] = "GET, HEAD"  # FastAPI's routes do not know that they take HEAD
        return JSONResponse(body, status_code=error.status_code, headers=headers)


def _as_api_error(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's findings."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = place[0] if place else None
    what = first["msg"].removeprefix("Input should be ").removeprefix("String should ").rstrip(".")
    if param is None:
        return ApiError(
            400, "the body must be a JSON object, sent as application/json", "invalid_body"
        )
    return ApiError(
        400,
        f"{param} must be {what}" if what != first["msg"] else f"{param}: {what}",
        "invalid_value",
        param,
    )
