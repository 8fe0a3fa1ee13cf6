"""The service without the server around it: engines, the application, and their end."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from autoregressive.serve.web.app import build_app
from autoregressive.serve.web.app_state import AppState, RequestBroker
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.guards import App
from autoregressive.serve.web.schema import ServedModel
from autoregressive.serve.web.server_settings import ServerSettings
from autoregressive.serve.web.store import Store, StoreClaim, largest_picture_bytes
from autoregressive.serve.worker.worker import MakeEngine, StartProcess, start_process
from autoregressive.version import program_version

_MOST_ENCODERS = 8  # threads that make pictures' files


@dataclass(frozen=True)
class Service:
    """Runs from `start_service` to `close`."""

    app: App
    dispatcher: Dispatcher
    encoders: ThreadPoolExecutor
    claim: StoreClaim

    def close(self) -> None:
        """Ends the engines, even those that hang; waits for their processes. Called in the event
        loop.
        """
        self.dispatcher.stop(at_once=False)
        self.encoders.shutdown(wait=False, cancel_futures=True)
        self.claim.close()


@dataclass(frozen=True)
class Share:
    """Which of several processes that answer HTTP this is."""

    index: int = 0
    count: int = 1


_ONLY = Share()


def start_service(
    settings: ServerSettings,
    model: ServedModel,
    recipe: Callable[[int], MakeEngine],
    address: str,
    start: StartProcess = start_process,
) -> Service:
    """Starts the engines, which take their time, and builds the application; called in the event
    loop.

    Args:
        recipe, start: as of `start_dispatcher`.
        address: as of `build_service_app`.

    Raises:
        UserError: as `StoreClaim`.
    """
    claim = StoreClaim(settings.store)
    dispatcher = start_dispatcher(settings, model, recipe, start)
    app, encoders = build_service_app(settings, model, dispatcher, address)
    return Service(app, dispatcher, encoders, claim)


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
    return Dispatcher(
        lambda index: start(recipe(index), f"engine-{index}"),
        settings.engines,
        settings.max_queue_size,
        settings.timeouts,
        model.tokens_of_image,
        settings.engine.scheduling_policy,
    )


def build_service_app(
    settings: ServerSettings,
    model: ServedModel,
    broker: RequestBroker,
    address: str,
    share: Share = _ONLY,
) -> tuple[App, ThreadPoolExecutor]:
    """The application, and the threads that make its pictures' files.

    Args:
        address: where clients reach it, if `settings` do not say.
    """
    threads = max(1, min(_MOST_ENCODERS, (os.cpu_count() or 1) // share.count))
    encoders = ThreadPoolExecutor(threads, thread_name_prefix="encoder")
    store = None
    if settings.store is not None:
        store = Store(
            settings.store,
            settings.stored_images,
            settings.public_url or address,
            share.index,
            share.count,
            most_bytes=settings.stored_bytes,
            picture_bytes=largest_picture_bytes(model.image_size),
        )
    app = build_app(
        AppState(model, broker, encoders, store),
        version=program_version(),
        docs=settings.docs,
        api_keys=settings.api_keys,
        public_host=settings.public_host,
    )
    if settings.forwarded_allow_ips is not None:
        app = cast(App, ProxyHeadersMiddleware(cast(Any, app), settings.forwarded_allow_ips))
    return app, encoders
