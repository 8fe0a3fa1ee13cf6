"""Serves a model over HTTP: OpenAI's images API, codes, metrics, and a page to draw with."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NoReturn

from autoregressive.common.errors import UserError, run_command, slow_imports, tell

with slow_imports(__name__):
    import torch

    from autoregressive.common.results import generation_record
    from autoregressive.common.weights import FoundWeights, find_weights, untrained_warning
    from autoregressive.serve.heap import freeze_heap
    from autoregressive.serve.web.dispatcher import Dispatcher
    from autoregressive.serve.web.logs import write_logs
    from autoregressive.serve.web.served_model import ServedModel
    from autoregressive.serve.web.server import Server
    from autoregressive.serve.web.service import start_service
    from autoregressive.serve.web.settings import ServerSettings, read_arguments, resolve_server_settings
    from autoregressive.serve.worker.process import EngineRecipe, MakeEngine, start_process

_SEND_BUFFER_BYTES = 128 * 2**10  # of the system's, a connection: what a stalled reader can hold


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the flags and serves until a signal; the status to end with.

    Raises:
        UserError: anything that the user can mend.
    """
    settings = resolve_server_settings(read_arguments(sys.argv[1:] if argv is None else argv, os.environ))
    with listen(settings) as listener:  # before any long work
        model, recipe = prepare(settings)
        return asyncio.run(serve(settings, model, recipe, listener))


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

    def recipe(index: int) -> MakeEngine:
        device = torch.device("cuda", index) if settings.engines > 1 else model.device
        return EngineRecipe(replace(model, device=device), found, settings.engine)

    return served_model(settings, found), recipe


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that clients can connect to; they are answered once the service runs.

    Raises:
        UserError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # connections inherit it
        return listener
    except OSError as error:
        why = (os.strerror(error.errno) if error.errno is not None and error.errno > 0 else str(error)).lower()
        raise UserError(f"cannot listen on {settings.host} port {settings.port}: {why}; choose another --port or --host") from error


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
    listener: socket.socket,
    start: Callable[[MakeEngine, str], tuple[BaseProcess, Connection]] = start_process,
) -> int:
    """Starts the engines and answers requests until a signal or the loss of an engine; the status to end with.

    Args:
        recipe, start: as `start_service`.
        listener: where clients connect to.

    Raises:
        UserError: an engine could not be built, for a reason that the user can mend.
    """
    write_logs(settings.log_level)
    address = _url(listener)
    service = start_service(settings, model, recipe, address, start)
    dispatcher = service.dispatcher
    freeze_heap()
    server = Server(service.app, dispatcher)
    # What uvicorn puts back at its end: a signal that comes while the engines are being stopped must not keep them alive.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        print(f"{model.name} is being loaded; it will be served at {address}", flush=True)
        announcing = asyncio.create_task(_announce(dispatcher, address))
        await server.serve(sockets=[listener])
        announcing.cancel()
    finally:
        service.close(at_once=server.force_exit)
    if dispatcher.unable is not None:
        raise UserError(dispatcher.unable)
    if dispatcher.failure is not None:
        tell(f"{dispatcher.failure}: the service has ended; start it again")
    return server.status


async def _announce(dispatcher: Dispatcher, address: str) -> None:
    begun = time.monotonic()
    while not dispatcher.ready:
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
