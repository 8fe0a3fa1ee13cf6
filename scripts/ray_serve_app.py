"""The service as a Ray Serve deployment: as many replicas, on as many machines, as
docs/ray_serve.yaml says.

    .venv/bin/pip install "ray[serve]==2.60.0"
    serve run docs/ray_serve.yaml

Each replica is one whole service with its own engine, its own queue and its own metrics; Ray's
proxy spreads requests over them and replaces a replica whose engine is lost. The flags come from
the environment (LLAMAGEN_GPT_MODEL=GPT-XL), which the YAML file sets.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ray import serve

from autoregressive.errors import UserError
from autoregressive.serve.lifecycle import prepare
from autoregressive.serve.logs import log_our_loggers
from autoregressive.serve.web.config_layers import read_arguments
from autoregressive.serve.web.server_settings import resolve_server_settings
from autoregressive.serve.web.service import Service, start_service

_Message = MutableMapping[str, Any]


class ReplicaApp:
    """An ASGI application whose engine starts with the first thing that the server's loop asks of
    it.
    """

    def __init__(self) -> None:
        self._service: Service | None = None

    @property
    def failure(self) -> str | None:
        """Why the replica has to be replaced; None while it works."""
        if self._service is None:
            return None
        dispatcher = self._service.dispatcher
        problem = dispatcher.failure or dispatcher.start_failure
        return None if problem is None else str(problem)

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
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
            self._service = start_service(
                settings, model, recipe, settings.public_url or "http://127.0.0.1:8000"
            )
        if scope["type"] != "lifespan":
            await self._service.app(scope, receive, send)
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self._service.close()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return


replica_app = ReplicaApp()


@serve.deployment
@serve.ingress(lambda: replica_app)
class LlamaGen:
    """One replica."""

    def check_health(self) -> None:
        """Ray asks now and then; an exception has it replace the replica."""
        if replica_app.failure is not None:
            raise RuntimeError(replica_app.failure)


application = LlamaGen.bind()  # type: ignore[attr-defined]
