"""Serves a model over HTTP: OpenAI's images API, codes, metrics, and a page to draw with."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NoReturn

from autoregressive.common.errors import UserError, run_command, slow_imports, tell

with slow_imports(__name__):
    import torch

    from autoregressive.common.results import generation_record
    from autoregressive.common.weights import FoundWeights, find_weights, untrained_warning
    from autoregressive.serve.engine.request import SamplingParams
    from autoregressive.serve.heap import settle_heap
    from autoregressive.serve.web.connections import Connections
    from autoregressive.serve.web.descriptors import raise_descriptor_limit
    from autoregressive.serve.web.dispatcher import Dispatcher
    from autoregressive.serve.web.ending import Ending
    from autoregressive.serve.web.front import FrontRecipe
    from autoregressive.serve.web.hub import Hub
    from autoregressive.serve.web.logs import write_logs
    from autoregressive.serve.web.served_model import ServedModel
    from autoregressive.serve.web.server import Server
    from autoregressive.serve.web.service import Share, build_service_app, start_dispatcher
    from autoregressive.serve.web.settings import ServerSettings, read_arguments, resolve_server_settings
    from autoregressive.serve.worker.process import SIGNALS, EngineRecipe, MakeEngine, StartProcess, signals_held, start_process

_SEND_BUFFER_BYTES = 128 * 2**10  # of the system's, a connection: what a stalled reader can hold


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags and serves until a signal; the status to end with.

    Raises:
        UserError: anything that the user can mend.
    """
    settings = resolve_server_settings(read_arguments(sys.argv[1:] if argv is None else argv, os.environ))
    with listen(settings) as listeners:  # before any long work
        model, recipe = prepare(settings)
        return asyncio.run(serve(settings, model, recipe, listeners))


def prepare(settings: ServerSettings) -> tuple[ServedModel, Callable[[int], MakeEngine]]:
    """Finds the weights: what clients are told of the model, and how each of the engines is built.

    Raises:
        UserError: there are no trained weights, and untrained ones were not asked for.
    """
    model = settings.choice.model
    found = find_weights(model)
    if not found.trained and not model.random_weights:
        ways = (untrained_warning(model, found) or "").splitlines()[2:]
        more = "; ".join(way.strip() for way in ways)
        what = f"no trained weights for {model.gpt_model} at {model.image_size} px"
        raise UserError(f"{what}: {more}; or --random-weights, for noise")
    if settings.choice.note is not None:
        tell(settings.choice.note)

    defaults = settings.choice.defaults
    typical = SamplingParams(
        cfg_scale=defaults.cfg_scale,
        cfg_interval=defaults.cfg_interval,
        top_k=min(defaults.top_k, model.codebook_size),
        top_p=defaults.top_p,
    )

    def recipe(index: int) -> MakeEngine:
        device = torch.device("cuda", index) if settings.engines > 1 else model.device
        return EngineRecipe(replace(model, device=device), found, settings.engine, typical)

    return served_model(settings, found), recipe


@contextmanager
def listen(settings: ServerSettings) -> Iterator[list[socket.socket]]:
    """A socket for each process that answers HTTP, all of one address; clients are answered once the service runs.

    Raises:
        UserError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    shared = settings.fronts > 1

    def open_socket(port: int, *, reuse_port: bool) -> socket.socket:
        listener = socket.create_server((settings.host, port), family=family, backlog=2048, reuse_port=reuse_port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # connections inherit it
        return stack.enter_context(listener)

    with ExitStack() as stack:
        try:
            # Not shared at first, so that a service that has the address already is noticed.
            listeners = [open_socket(settings.port, reuse_port=False)]
            if shared:
                port = listeners[0].getsockname()[1]
                listeners[0].close()
                listeners = [open_socket(port, reuse_port=True) for _ in range(settings.fronts)]
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) else None
            why = (os.strerror(number) if number is not None and number > 0 else str(error)).lower()
            where = f"{settings.host} port {settings.port}"
            raise UserError(f"cannot listen on {where}: {why}; choose another --port or --host") from error
        yield listeners


def served_model(settings: ServerSettings, found: FoundWeights) -> ServedModel:
    """What clients are told of the model."""
    choice, model = settings.choice, settings.choice.model
    return ServedModel(
        name=settings.name,
        created=int(time.time()),
        image_size=model.image_size,
        grid=model.grid,
        codebook_size=model.codebook_size,
        classes=choice.classes,
        defaults=choice.defaults,
        trained=found.trained,
        record=generation_record(model, found, loop="paged"),
    )


async def serve(
    settings: ServerSettings,
    model: ServedModel,
    recipe: Callable[[int], MakeEngine],
    listeners: Sequence[socket.socket],
    start: StartProcess = start_process,
) -> int:
    """Starts the engines and answers requests until a signal or the loss of an engine; the status to end with.

    Args:
        recipe, start: as `start_service`.
        listeners: where clients connect to; more than one: a process for each.

    Raises:
        UserError: an engine could not be built, for a reason that the user can mend.
    """
    write_logs(settings.log_level)
    raise_descriptor_limit()
    address = _url(listeners[0])
    dispatcher = start_dispatcher(settings, model, recipe, start)
    ending = Ending(dispatcher)
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, ending.signal)
    try:
        print(f"{model.name} is being loaded; it will be served at {address}", flush=True)
        run = _serve_here if len(listeners) == 1 else _serve_through_fronts
        failure = await run(settings, model, dispatcher, ending, address, listeners)
    finally:
        with signals_held():  # one that comes while the engines are being stopped must not keep them alive
            for number in SIGNALS:
                asyncio.get_running_loop().remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
        dispatcher.stop(at_once=ending.at_once)
    if dispatcher.unable is not None:
        raise UserError(dispatcher.unable)
    failure = dispatcher.failure or failure
    if failure is not None:
        tell(f"{failure}: the service has ended; start it again")
        return ending.status or 1
    return ending.status


async def _serve_here(
    settings: ServerSettings,
    model: ServedModel,
    dispatcher: Dispatcher,
    ending: Ending,
    address: str,
    listeners: Sequence[socket.socket],
) -> None:
    """HTTP in this process."""
    app, encoders = build_service_app(settings, model, dispatcher, address)
    connections = Connections(settings.max_connections, settings.max_buffered_bytes)
    dispatcher.metrics.connection_stats = lambda: connections.stats
    server = Server(app, ending, settings.patience.shutdown, connections)
    settle_heap()
    announcing = asyncio.create_task(_announce(lambda: dispatcher.ready, address))
    try:
        await server.serve(sockets=list(listeners))
    finally:
        announcing.cancel()
        encoders.shutdown(wait=False, cancel_futures=True)


async def _serve_through_fronts(
    settings: ServerSettings,
    model: ServedModel,
    dispatcher: Dispatcher,
    ending: Ending,
    address: str,
    listeners: Sequence[socket.socket],
) -> str | None:
    """HTTP in a process for each listener; how one of them was lost, if one was."""
    recipes = [
        FrontRecipe(settings, model, address, Share(index, len(listeners)), listener) for index, listener in enumerate(listeners)
    ]
    hub = Hub(dispatcher, ending, recipes)
    for listener in listeners:  # each has its process's copy now
        listener.close()
    settle_heap()
    announcing = asyncio.create_task(_announce(lambda: dispatcher.ready and hub.up, address))
    try:
        await hub.run()
    finally:
        announcing.cancel()
    return hub.failure


async def _announce(is_ready: Callable[[], bool], address: str) -> None:
    begun = time.monotonic()
    while not is_ready():
        await asyncio.sleep(0.05)
    print(f"ready after {time.monotonic() - begun:.1f} seconds: {address}", flush=True)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def command() -> NoReturn:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    command()
