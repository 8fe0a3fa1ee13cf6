"""The life of the service: it listens, builds its engines, answers, and ends."""

import argparse
import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from autoregressive.devices import rank_devices
from autoregressive.errors import tell
from autoregressive.output.records import generation_record
from autoregressive.serve.logs import ServiceLogs, service_logs
from autoregressive.serve.signals import SignalWatch
from autoregressive.serve.web.app import build_service_app, start_dispatcher
from autoregressive.serve.web.connections import Connections, raise_descriptor_limit
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.listeners import address_of, listen
from autoregressive.serve.web.schema import ServedModel
from autoregressive.serve.web.server import Server, ShutdownPolicy
from autoregressive.serve.web.server_settings import ServerSettings, resolve_server_settings
from autoregressive.serve.web.store import StoreClaim
from autoregressive.serve.worker.process import settle_heap
from autoregressive.serve.worker.worker import MakeEngine, StartProcess, build_engine, start_process
from autoregressive.weights.finding import FoundWeights, find_weights, missing_weights

_log = logging.getLogger("llamagen.service")


def run(arguments: argparse.Namespace, watch: SignalWatch | None = None) -> int:
    """Serves until a signal; returns the exit status.

    Args:
        arguments: as `read_arguments` gives them.
        watch: as of `serve`.

    Raises:
        UserError: any error that the user can mend.
    """
    settings = resolve_server_settings(arguments)
    with listen(settings) as listeners:  # before any long work
        model, recipe = prepare(settings)
        return serve(settings, model, recipe, listeners, watch=watch)


def prepare(settings: ServerSettings) -> tuple[ServedModel, Callable[[int], MakeEngine]]:
    """Finds the weights; returns the model as clients see it, and how each engine is built.

    Raises:
        UserError: there are no trained weights, and untrained ones were not asked for.
    """
    model = settings.model
    found = find_weights(model)
    missing = missing_weights(model, found)
    if missing is not None and not model.random_weights:
        raise missing
    if model.note is not None:
        tell(model.note)

    ranks = settings.engine.tensor_parallel_size
    first_devices = rank_devices(model.device, settings.engines * ranks)[::ranks]
    engine = replace(settings.engine, engines_on_cpu=settings.engines)

    def recipe(index: int) -> MakeEngine:
        return partial(
            build_engine,
            replace(model, device=first_devices[index]),
            found,
            engine,
            model.defaults.sampling,
        )

    return served_model(settings, found), recipe


def served_model(settings: ServerSettings, found: FoundWeights) -> ServedModel:
    """The model as clients see it."""
    model = settings.model
    return ServedModel(
        name=settings.names[0],
        aliases=settings.names[1:],
        created=int(time.time()),
        image_size=model.image_size,
        grid=model.grid,
        codebook_size=model.codebook_size,
        classes=model.classes,
        defaults=model.defaults,
        trained=found.trained,
        record=generation_record(
            model,
            found,
            loop="paged",
            quantization=settings.engine.quantization,
            kv_cache_dtype=settings.engine.kv_cache_dtype,
            tensor_parallel_size=settings.engine.tensor_parallel_size,
        ),
    )


def serve(
    settings: ServerSettings,
    model: ServedModel,
    recipe: Callable[[int], MakeEngine],
    listeners: Sequence[socket.socket],
    start: StartProcess = start_process,
    watch: SignalWatch | None = None,
) -> int:
    """Starts the engines and answers requests until a signal or the loss of a process; returns the
    exit status.

    Args:
        recipe, start: as `start_dispatcher`.
        listeners: clients connect to them; if there are several, each gets a process.
        watch: of the signals; None: made here.

    Raises:
        UserError: an engine could not be built, or the store's folder is another service's.
    """
    watch = watch or SignalWatch()
    with service_logs(settings.log_level) as logs:
        raise_descriptor_limit()
        return asyncio.run(_serve(settings, model, recipe, listeners, start, watch, logs))


async def _serve(
    settings: ServerSettings,
    model: ServedModel,
    recipe: Callable[[int], MakeEngine],
    listeners: Sequence[socket.socket],
    start: StartProcess,
    watch: SignalWatch,
    logs: ServiceLogs,
) -> int:
    claim = StoreClaim(settings.store)
    dispatcher = start_dispatcher(settings, model, recipe, start)
    dispatcher.metrics.dropped_lines = lambda: logs.writer.dropped
    policy = ShutdownPolicy(dispatcher, logs.announce)
    loop = asyncio.get_running_loop()

    def take_signal() -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(policy.signal)

    watch.hand_over(take_signal)
    fronts = None
    try:
        address = address_of(listeners[0], settings)
        shown = f"{address}{settings.root_path}"
        logs.announce(f"{model.name} is being loaded; it will be served at {shown}")
        if len(listeners) > 1:
            from autoregressive.serve.web.fronts import FrontSupervisor

            fronts = FrontSupervisor(settings, model, address, listeners, dispatcher, policy)
            settle_heap()
            serving = fronts.run()
        else:
            serving = _answer(settings, model, dispatcher, policy, listeners[0])

        async def announce() -> None:
            begun = time.monotonic()
            while not (dispatcher.ready and (fronts is None or fronts.up)):
                await asyncio.sleep(0.05)
            logs.announce(f"ready after {time.monotonic() - begun:.1f} seconds: {shown}")

        announcing = asyncio.create_task(announce())
        await serving
        announcing.cancel()
        failure = dispatcher.failure or (None if fronts is None else fronts.failure)
        watch.status = policy.status or int(failure is not None)
    finally:
        dispatcher.stop(at_once=policy.at_once)
        claim.close()
    if dispatcher.start_failure is not None:
        raise dispatcher.start_failure
    if failure is not None:
        _log.critical("%s: the service has ended; start it again", failure)
    return watch.status


async def _answer(
    settings: ServerSettings,
    model: ServedModel,
    dispatcher: Dispatcher,
    policy: ShutdownPolicy,
    listener: socket.socket,
) -> None:
    """Answers HTTP in this process until the end is due."""
    service = build_service_app(settings, model, dispatcher, address_of(listener, settings))
    connections = Connections(settings.max_connections, settings.max_buffered_bytes)
    dispatcher.metrics.connection_stats = lambda: connections.stats
    server = Server(
        service.app, settings.timeouts.shutdown, connections, policy.due, settings.certificate
    )
    policy.hurry = lambda: server.finish(at_once=True)
    settle_heap()
    try:
        await server.serve(sockets=[listener])
    finally:
        service.close()
