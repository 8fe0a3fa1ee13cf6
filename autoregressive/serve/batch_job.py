"""The life of a batch: the service's application and its engines answer a file of requests, without
a server and a network between.

Each body goes to the very application that answers HTTP, so that a request means here what it means
there, and its answer is the same.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import httpx2

from autoregressive.errors import tell
from autoregressive.progress import Bar, progress_bar
from autoregressive.serve.batch_files import (
    AnswerFile,
    BatchRequest,
    check_requests,
    read_requests,
)
from autoregressive.serve.engine_flags import MOST_ROWS
from autoregressive.serve.lifecycle import prepare
from autoregressive.serve.web.api_errors import invalid
from autoregressive.serve.web.app import build_service_app, start_dispatcher
from autoregressive.serve.web.app_state import IMAGES_PATH, new_request_id
from autoregressive.serve.web.dispatcher import Dispatcher
from autoregressive.serve.web.schema import ServedModel
from autoregressive.serve.web.server_flags import build_server_parser
from autoregressive.serve.web.server_settings import ServerSettings, resolve_server_settings
from autoregressive.serve.worker.worker import MakeEngine

_ADDRESS = "http://127.0.0.1"  # of no server; requests have to name one
_IS_JSON = {"Content-Type": "application/json"}
_SPARE_IMAGES = 64  # that are decoded, become files or are written, while others are sampled
_MOST_ROWS_OF_IMAGE = 2
_TRIES = 10  # of a request that is told to try again
_POLL_SECONDS = 0.05
# By the field of a request that asks for what an answer in a file cannot be.
_NEEDS_SERVICE = {
    "stream": invalid("stream must be false: an answer in a file comes whole", "stream"),
    "response_format": invalid(
        "response_format must be b64_json: an answer in a file holds its images", "response_format"
    ),
}
# What is said of a service's queue and clients. Here one client asks for a bounded number of images
# at a time, and it waits as long as need be.
_OF_ONE_CLIENT = {
    "api_server_count": 1,
    "disable_docs": True,
    "max_queue_size": 10**6,
    "queue_timeout": 0,
    "request_timeout": 0,
    "scheduling_policy": "fcfs",
}


class EngineLost(Exception):
    """An engine's process has died, or hangs."""


def run(arguments: argparse.Namespace) -> int:
    """Answers all requests that have no answer yet; returns the exit status.

    Args:
        arguments: as `build_batch_parser` gives them.

    Raises:
        UserError: anything that the user can mend.
        KeyboardInterrupt: of Ctrl-C; stderr says how to go on.
    """
    images = check_requests(arguments.requests)
    answers = AnswerFile(arguments.answers, arguments.requests, images)
    try:
        left = sum(count for name, count in images.items() if name not in answers.answered)
        if left == 0:
            print(f"all {len(images)} requests have an answer: {answers.path}")
            return 0
        if arguments.max_num_seqs is None:
            arguments.max_num_seqs = min(_MOST_ROWS_OF_IMAGE * left, MOST_ROWS)
        settings = settings_of(arguments)
        model, recipe = prepare(settings)
        tell(f"{model.name} is being loaded")
        job = BatchJob(settings, model, answers)
        try:
            asyncio.run(job.run(arguments.requests, left, recipe))
        except (KeyboardInterrupt, EngineLost) as ending:
            tell(
                f"{len(answers.answered)} of {len(images)} requests have an answer in "
                f"{answers.path}: run the same command again to go on"
            )
            if isinstance(ending, KeyboardInterrupt):
                raise
            tell(f"{os.path.basename(sys.argv[0])}: error: {ending}")
            return 1
    finally:
        answers.close()
    print(job.summary())
    return 0


def settings_of(arguments: argparse.Namespace) -> ServerSettings:
    """The settings of a service with these flags, and with nobody else to serve.

    Raises:
        UserError: a value cannot be used.
    """
    unsaid = vars(build_server_parser().parse_args([]))
    said = {setting: value for setting, value in vars(arguments).items() if setting in unsaid}
    return resolve_server_settings(argparse.Namespace(**unsaid | said | _OF_ONE_CLIENT))


class BatchJob:
    """Requests that are answered by one application, many at a time.

    Args:
        answers: where each answer goes as soon as it is ready.
    """

    def __init__(self, settings: ServerSettings, model: ServedModel, answers: AnswerFile) -> None:
        self._settings, self._model, self._answers = settings, model, answers
        self._images = self._requests = self._failed = 0
        self._seconds = 0.0

    def summary(self) -> str:
        """What was done, and how fast."""
        speed = self._images / self._seconds if self._seconds > 0 else math.inf
        told = (
            f"{self._images} images of {self._requests} requests in {self._seconds:.1f} seconds, "
            f"{speed:.2f} images/s: {self._answers.path}"
        )
        if self._failed:
            told += f"\nrequests without images: {self._failed}; their answers say why"
        return told

    async def run(self, requests: Path, images: int, recipe: Callable[[int], MakeEngine]) -> None:
        """Answers the requests that have no answer yet.

        Args:
            images: that they ask for.
            recipe: as of `start_dispatcher`.

        Raises:
            UserError: an engine could not be built, or the disk takes no more answers.
            EngineLost: an engine has died, or hangs.
        """
        dispatcher = start_dispatcher(self._settings, self._model, recipe)
        service = build_service_app(self._settings, self._model, dispatcher, _ADDRESS)
        complete = False
        try:
            await _until_ready(dispatcher)
            transport = httpx2.ASGITransport(cast(Any, service.app), raise_app_exceptions=False)
            begun = time.monotonic()
            with progress_bar("images", " images", images) as bar:
                async with httpx2.AsyncClient(transport=transport, base_url=_ADDRESS) as client:
                    await self._answer_all(requests, dispatcher, client, bar)
            self._seconds = time.monotonic() - begun
            complete = True
        finally:
            dispatcher.stop(at_once=not complete)
            service.close()

    async def _answer_all(
        self, requests: Path, dispatcher: Dispatcher, client: httpx2.AsyncClient, bar: Bar
    ) -> None:
        # Unguided images take one row each, and then as many run as there are rows.
        rows = self._settings.engines * self._settings.engine.max_num_seqs
        room = asyncio.Semaphore(rows + _SPARE_IMAGES)

        async def answer(request: BatchRequest) -> None:
            await self._answer(request, dispatcher, client)
            bar.update(request.images)
            for _ in range(request.images):
                room.release()

        try:
            async with asyncio.TaskGroup() as group:
                for request in read_requests(requests):
                    if request.custom_id not in self._answers.answered:
                        for _ in range(request.images):
                            await room.acquire()
                        group.create_task(answer(request))
        except ExceptionGroup as errors:  # the others are cancelled
            raise errors.exceptions[0] from None

    async def _answer(
        self, request: BatchRequest, dispatcher: Dispatcher, client: httpx2.AsyncClient
    ) -> None:
        """Writes the answer to one request."""
        self._requests += 1
        if request.error is not None:
            self._failed += 1
            self._answers.refuse(request.custom_id, request.error)
        elif request.needs_service is not None:
            self._failed += 1
            error = _NEEDS_SERVICE[request.needs_service]
            answer = json.dumps(error.body).encode()
            self._answers.answer(request.custom_id, error.status, new_request_id(), answer)
        else:
            response = await _ask(client, request.body, dispatcher)
            drawn = response.status_code == 200
            self._failed += not drawn
            self._images += request.images if drawn else 0
            self._answers.answer(
                request.custom_id,
                response.status_code,
                response.headers["X-Request-Id"],
                response.content,
            )


async def _ask(client: httpx2.AsyncClient, body: bytes, dispatcher: Dispatcher) -> httpx2.Response:
    """The service's answer to a body. If it says when to try again, that is done.

    Raises:
        EngineLost: there will be no answer.
    """
    for last in (*(False,) * (_TRIES - 1), True):
        response = await client.post(IMAGES_PATH, content=body, headers=_IS_JSON)
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # the answer is that the service stops
            raise asyncio.CancelledError
        if response.status_code == 503 and dispatcher.failure is not None:
            raise EngineLost(dispatcher.failure)
        again = response.headers.get("Retry-After")
        if again is None or last:
            break
        await asyncio.sleep(float(again))
    return response


async def _until_ready(dispatcher: Dispatcher) -> None:
    """Waits until the engines take requests.

    Raises:
        UserError: one could not be built.
        EngineLost: one has died.
    """
    while not dispatcher.ready:
        if dispatcher.start_failure is not None:
            raise dispatcher.start_failure
        if dispatcher.failure is not None:
            raise EngineLost(dispatcher.failure)
        await asyncio.sleep(_POLL_SECONDS)
