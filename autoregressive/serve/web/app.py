"""The service without the server around it: the application with its routes, the page and the
guards around them, and the start of its engines.
"""

import os
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from autoregressive.serve.web.api_errors import ApiError, described, internal_error, invalid
from autoregressive.serve.web.app_state import AppState, RequestBroker
from autoregressive.serve.web.checks import Authentication, StrictRoute, check_host
from autoregressive.serve.web.description import add_docs, complete_description
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.guards import BelowPrefix, Guards, RequestLog, Trace, use_whole_url
from autoregressive.serve.web.openai_routes import ClientLeft, add_openai_routes
from autoregressive.serve.web.page_routes import add_page_routes
from autoregressive.serve.web.schema import (
    ClassesAnswer,
    ModelData,
    ModelsAnswer,
    ServedModel,
    StatusAnswer,
    VersionAnswer,
)
from autoregressive.serve.web.server_settings import ServerSettings
from autoregressive.serve.web.signed_urls import FILES_PATH, UrlSigner
from autoregressive.serve.web.static_files import add_file, add_folder, has_already
from autoregressive.serve.web.store import MEDIA_TYPES, Store, largest_picture_bytes
from autoregressive.serve.worker.worker import MakeEngine, StartProcess, start_process
from autoregressive.version import program_version

if TYPE_CHECKING:  # it needs packages of an extra
    from autoregressive.serve.web.traces import RequestTraces

_YEAR_SECONDS = 365 * 24 * 3600
_MOST_ENCODERS = 8  # threads that make pictures' files
PAGE = Path(__file__).parent / "static"
# These need no key, nor does what is below a path that ends in a slash.
_OPEN_PATHS = ("/", "/health", "/ping", "/ready", "/static/")
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
# A key is a header like any other here, and no browser adds it by itself: no credentials.
_CROSS_ORIGIN: dict[str, Any] = {
    "allow_methods": ("DELETE", "GET", "HEAD", "POST"),
    "allow_headers": ("*",),
    "expose_headers": ("Retry-After", "Warning", "X-Request-Id"),
}
_WRONG = described(
    {
        401: "The key is missing or wrong.",
        429: "Too many wrong keys came from this address.",
    }
)
_ANYWHERE = described(
    {
        400: "A parameter is unknown or out of range, or the request is not HTTP/1.1.",
        413: "The body is too large.",
        421: "The service has no key, and does not answer to this name.",
        431: "The headers are too large.",
        500: "A bug; the log has it.",
    }
)
_NOT_READ = ApiError(503, "the image cannot be read now: try again later", "store_failed", None, 10)
# What a value must do, by pydantic's type of the error.
_MUST = {
    "bool_type": "be a valid boolean",
    "finite_number": "be a finite number",
    "float_type": "be a valid number",
    "greater_than": "be greater than {gt}",
    "greater_than_equal": "be greater than or equal to {ge}",
    "int_parsing": "be a valid integer",
    "int_parsing_size": "be a valid integer",
    "int_type": "be a valid integer",
    "less_than_equal": "be less than or equal to {le}",
    "literal_error": "be {expected}",
    "string_too_long": "have at most {max_length} characters",
    "string_type": "be a valid string",
    "string_unicode": "be a valid string",
}
_HTTP_ERRORS = {
    404: ("there is no such path", "not_found"),
    405: ("this path does not take this method", "method_not_allowed"),
}


def start_dispatcher(
    settings: ServerSettings,
    model: ServedModel,
    recipe: Callable[[int], MakeEngine],
    start: StartProcess = start_process,
) -> Dispatcher:
    """Starts the engines; called in the event loop.

    Args:
        recipe: which of the engines -> how it is built.
        start: gives an engine a process.
    """
    dispatcher = Dispatcher(
        lambda index: start(recipe(index), f"engine-{index}"),
        settings.engines,
        settings.max_queue_size,
        settings.timeouts,
        model.tokens_of_image,
        settings.engine.scheduling_policy,
    )
    dispatcher.metrics.model_name = model.name
    return dispatcher


@dataclass(frozen=True)
class ServiceApp:
    """The application of one process, with the threads that work for it."""

    app: ASGIApp
    encoders: ThreadPoolExecutor  # that make its images' files
    traces: "RequestTraces | None"

    def close(self) -> None:
        """Ends the threads. Spans that wait are sent, for a second at most."""
        self.encoders.shutdown(wait=False, cancel_futures=True)
        if self.traces is not None:
            self.traces.close()


def build_service_app(
    settings: ServerSettings,
    model: ServedModel,
    broker: RequestBroker,
    address: str,
    index: int = 0,
    count: int = 1,
) -> ServiceApp:
    """The application of this process.

    Args:
        address: where clients reach it, if `settings` do not say.
        index, count: which of so many processes that answer HTTP this is.
    """
    threads = max(1, min(_MOST_ENCODERS, (os.cpu_count() or 1) // count))
    encoders = ThreadPoolExecutor(threads, thread_name_prefix="encoder")
    store = None
    if settings.store is not None:
        store = Store(
            settings.store,
            settings.stored_images,
            settings.base_url(address),
            index,
            count,
            most_bytes=settings.stored_bytes,
            picture_bytes=largest_picture_bytes(model.image_size),
        )
    traces = None
    if settings.traces_endpoint is not None:
        from autoregressive.serve.web.traces import RequestTraces

        traces = RequestTraces(settings.traces_endpoint, model.name)
    app = build_app(
        AppState(
            model,
            broker,
            encoders,
            store,
            signer=UrlSigner(settings.url_key, settings.url_lifetime),
            tolerance=settings.tolerance,
        ),
        version=program_version(),
        docs=settings.docs,
        api_keys=settings.api_keys,
        public_host=settings.public_host,
        allowed_origins=settings.allowed_origins,
        root_path=settings.root_path,
        quiet_paths=settings.quiet_paths,
        trace=None if traces is None else traces.record,
    )
    if settings.forwarded_allow_ips is not None:
        app = cast(ASGIApp, ProxyHeadersMiddleware(cast(Any, app), settings.forwarded_allow_ips))
    return ServiceApp(app, encoders, traces)


def build_app(
    state: AppState,
    *,
    version: str,
    docs: bool,
    api_keys: Sequence[str],
    public_host: str | None = None,
    allowed_origins: Sequence[str] = (),
    root_path: str = "",
    quiet_paths: Container[str] = (),
    trace: Trace | None = None,
) -> ASGIApp:
    """The whole service.

    Args:
        state: the objects that the routes work with.
        version: of the program.
        docs: whether /docs and /openapi.json are there.
        api_keys: clients send one of them. Without keys, every client may use the service as
            localhost or `public_host`.
        public_host: the name that clients use, where it is not this machine's own.
        allowed_origins: sites whose pages may use the service.
        root_path: what the service is below, without a slash at the end.
        quiet_paths, trace: as of `RequestLog`.
    """
    docs_paths = _DOCS_PATHS if docs else ()
    open_paths = (*_OPEN_PATHS, *docs_paths, *([root_path] if root_path else ()))

    def is_open(path: str) -> bool:
        folders = tuple(one for one in open_paths if one.endswith("/") and one != "/")
        return path in open_paths or path.startswith(folders)

    app = build_routes(state, version=version, docs=docs, root_path=root_path)
    complete_description(app, state.model, lambda path: bool(api_keys) and not is_open(path))
    # A key keeps other sites out, so any host will do.
    check_access = (
        Authentication(api_keys, is_open).check
        if api_keys
        else partial(check_host, public=public_host)
    )

    def check_signed(scope: Scope) -> None:
        if not state.signer.admits(scope):
            check_access(scope)

    guarded: ASGIApp = Guards(app, check_signed, state.turns)
    if allowed_origins:  # around the guards: a browser's first question has no key
        guarded = CORSMiddleware(guarded, allowed_origins, **_CROSS_ORIGIN)
    logged = RequestLog(guarded, state.broker.count, api_keys, quiet_paths, trace)
    below = BelowPrefix(logged, root_path) if root_path else logged

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        use_whole_url(scope)
        await below(scope, receive, send)

    return answer


def build_routes(state: AppState, *, version: str, docs: bool, root_path: str = "") -> FastAPI:
    """The routes, without the guards around them; arguments as of `build_app`."""
    app = FastAPI(
        title="LlamaGen",
        version=version,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if docs else None,
        responses=_ANYWHERE,
        # where the document itself is: behind a proxy the service may be below a path
        servers=[{"url": "."}],
        redirect_slashes=False,  # a redirect would name the host that the request names
        exception_handlers=dict.fromkeys(
            # starlette raises others again behind the answer, and the log gets them
            (ApiError, RequestValidationError, HTTPException, ClientLeft, Exception),
            _tell_error,
        ),
    )
    app.router.route_class = StrictRoute
    if root_path:
        _add_way_to_page(app, root_path)
    app.state.adapt = partial(state.tolerance.adapt, model=state.model)
    add_openai_routes(app, state)
    add_page_routes(app, state)
    if state.store is not None:
        _add_stored_images(app, state, state.store)
    _add_facts(app, state.model, version)
    _add_state(app, state.broker)
    add_file(app, "/", PAGE / "index.html", _PAGE_HEADERS)
    add_folder(app, "/static", PAGE, _PAGE_HEADERS)
    if docs:
        add_docs(app, _PAGE_HEADERS)
    return app


def _add_way_to_page(app: FastAPI, root_path: str) -> None:
    """Leads from the prefix without its slash to the page, whose links would lead out of the prefix
    there.
    """

    async def lead_to_page(request: Request) -> Response:
        settings = request.url.query  # of the page
        return RedirectResponse(f"{root_path}/{settings and '?'}{settings}", 308)

    app.add_route(root_path, lead_to_page, include_in_schema=False)


def _add_facts(app: FastAPI, model: ServedModel, version: str) -> None:
    @app.get("/v1/models", response_model=ModelsAnswer, responses=_WRONG, tags=["facts"])
    async def list_models() -> ModelsAnswer:
        """Lists the names of the one model that is served, as OpenAI lists its models."""
        return ModelsAnswer(data=[model.described(name) for name in model.names])

    @app.get(
        "/v1/models/{model_id:path}",
        response_model=ModelData,
        responses={**_WRONG, **described({404: "No such model."})},
        tags=["facts"],
    )
    async def describe_model(
        model_id: str = PathParameter(openapi_examples={"served": {"value": model.name}}),
    ) -> ModelData:
        """The served model, by one of its names."""
        if model_id not in model.names:
            raise model.no_such_model(model_id)
        return model.described(model_id)

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


def _add_state(app: FastAPI, broker: RequestBroker) -> None:
    unavailable = described({503: "Service Unavailable"})

    @app.get("/health", response_model=StatusAnswer, responses=unavailable, tags=["state"])
    async def tell_health() -> StatusAnswer:
        """Whether the service is alive; 503 once one of its processes is lost, and while one does
        not respond.
        """
        if (why := broker.unhealthy) is not None:
            raise ApiError(503, why, "engine_lost", None, 10)
        return StatusAnswer(status="alive")

    @app.get("/ping", response_model=StatusAnswer, responses=unavailable, tags=["state"])
    async def ping() -> StatusAnswer:
        """The same as /health, for services that ask here (SageMaker)."""
        return await tell_health()

    @app.get("/ready", response_model=StatusAnswer, responses=unavailable, tags=["state"])
    async def tell_ready() -> StatusAnswer:
        """Whether requests are accepted."""
        broker.require_ready()
        return StatusAnswer(status="ready")

    @app.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {}}},
            **_WRONG,
            **described({503: "The process that counts does not respond."}),
        },
        tags=["state"],
    )
    async def tell_metrics() -> Response:
        """Returns the metrics in the text format of Prometheus."""
        return Response(await broker.metrics_text(), media_type=CONTENT_TYPE_LATEST)


def _add_stored_images(app: FastAPI, state: AppState, store: Store) -> None:
    @app.get(
        FILES_PATH + "{name}",
        response_class=Response,
        responses={
            **_WRONG,
            200: {"content": {media_type: {} for media_type in MEDIA_TYPES.values()}},
            304: {"description": "The client has it already."},
            **described(
                {
                    403: "The URL has expired, or its signature is wrong.",
                    404: "There is no such image.",
                    503: "The disk does not give it now.",
                }
            ),
        },
        tags=["images"],
    )
    async def fetch_image(
        name: str,
        request: Request,
        expires: str = Query("", description="Unix time, in a signed URL."),
        signature: str = Query("", description="Of the name and of `expires`: no key is needed."),
    ) -> Response:
        """Returns an image that an earlier answer gave the address of."""
        picture = await state.on_disk(_NOT_READ, store.read, name)
        if picture is None:
            raise ApiError(404, "there is no such image, or not any more", "not_found")
        kept_seconds = state.signer.seconds_left(expires) if signature else _YEAR_SECONDS
        headers = {
            "ETag": picture.etag,
            "Last-Modified": formatdate(picture.modified, usegmt=True),
            # what a name stands for never changes
            "Cache-Control": f"private, max-age={kept_seconds}, immutable",
            "X-Content-Type-Options": "nosniff",
            "Accept-Ranges": "none",
        }
        if has_already(request, picture.etag):
            return Response(status_code=304, headers=headers)
        return Response(picture.content, media_type=picture.media_type, headers=headers)


async def _tell_error(request: Request, error: Exception) -> Response:
    match error:
        case ClientLeft():
            return Response(status_code=499)
        case ApiError():
            found = error
        case RequestValidationError():
            found = _invalid(error.errors()[0])
        case HTTPException(status_code=status):
            found = ApiError(
                status,
                *_HTTP_ERRORS.get(status, ("the request cannot be answered", "bad_request")),
            )
        case _:
            found = internal_error()
    headers = dict(getattr(error, "headers", None) or {})
    if "GET" in headers.get("Allow", ""):
        headers["Allow"] = "GET, HEAD"  # FastAPI's routes do not know that they take HEAD
    return JSONResponse(found.body, status_code=found.status, headers=headers)


def _invalid(finding: Mapping[str, Any]) -> ApiError:
    """One of pydantic's findings as an error."""
    place = [str(part) for part in finding["loc"] if part not in ("body", "query", "path")]
    if not place:
        return ApiError(
            400, "the body must be a JSON object, sent as application/json", "invalid_body"
        )
    if finding["type"] not in _MUST:
        return invalid(f"{place[0]}: {finding['msg'].rstrip('.')}", place[0])
    limits = finding.get("ctx", {}).items()
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in limits}
    return invalid(f"{place[0]} must {_MUST[finding['type']].format(**shown)}", place[0])
