"""The service as a Ray Serve deployment: as many replicas, on as many machines, as
docs/ray_serve.yaml says.

    .venv/bin/pip install "ray[serve]==2.60.0"
    serve run docs/ray_serve.yaml

Each replica is one whole service with its own engine, its own queue and its own metrics; Ray's
proxy spreads requests over them and replaces a replica whose engine is lost. The flags come from
the environment (LLAMAGEN_GPT_MODEL=GPT-XL), which the YAML file sets.
"""

import os

from ray import serve
from starlette.types import Receive, Scope, Send

from autoregressive.errors import UserError
from autoregressive.serve.lifecycle import prepare
from autoregressive.serve.logs import log_our_loggers
from autoregressive.serve.web.app import ServiceApp, build_service_app, start_dispatcher
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.server_flags import read_arguments
from autoregressive.serve.web.server_settings import resolve_server_settings
from autoregressive.serve.web.store import StoreClaim


class ReplicaApp:
    """An ASGI application whose engine starts with the first thing that the server's loop asks of
    it.
    """

    def __init__(self) -> None:
        self._service: tuple[ServiceApp, Dispatcher] | None = None

    @property
    def failure(self) -> object:
        """Why the replica has to be replaced; None while it works."""
        if self._service is None:
            return None
        _, dispatcher = self._service
        return dispatcher.failure or dispatcher.start_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the server's start and end."""
        if self._service is None:
            settings = resolve_server_settings(read_arguments([], os.environ))
            if settings.fronts > 1:
                raise UserError(
                    "LLAMAGEN_API_SERVER_COUNT: a replica is one process that answers HTTP; raise "
                    "num_replicas instead"
                )
            log_our_loggers(settings.log_level)
            model, recipe = prepare(settings)
            StoreClaim(settings.store)  # until this process ends
            dispatcher = start_dispatcher(settings, model, recipe)
            service = build_service_app(settings, model, dispatcher, "http://127.0.0.1:8000")
            self._service = service, dispatcher
        service, dispatcher = self._service
        if scope["type"] != "lifespan":
            await service.app(scope, receive, send)
            return
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        dispatcher.stop(at_once=False)
        service.close()
        await send({"type": "lifespan.shutdown.complete"})


replica_app = ReplicaApp()


@serve.deployment
@serve.ingress(lambda: replica_app)
class LlamaGen:
    """One replica."""

    def check_health(self) -> None:
        """Ray asks now and then; an exception has it replace the replica."""
        if replica_app.failure is not None:
            raise RuntimeError(str(replica_app.failure))


application = LlamaGen.bind()  # type: ignore[attr-defined]
