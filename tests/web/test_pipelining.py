"""Requests that a client sends before it has read the answer to the one before."""

import asyncio
import socket
from functools import partial
from typing import Any

import uvicorn

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.web import http_protocol
from autoregressive.serve.web.app_state import context_of
from autoregressive.serve.web.connections import Connections, Phase
from autoregressive.serve.worker.messages import EngineRequest, ServedRequest

GET = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"
PICTURE = b"p" * 30_000  # less than what pauses the writing, more than what the system takes


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """A picture, or a word."""
    await receive()
    body = b"word"
    if scope["path"] == "/picture":
        request = EngineRequest(0, 0, 1, SamplingParams(), pixels=True)
        context_of(scope).served = ServedRequest(request, 0.0)
        body = PICTURE
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def test_a_picture_is_not_lost_to_a_request_behind_it() -> None:
    """Fails if a connection may be closed for another one while a picture waits in it, because
    another request has been answered behind the picture; or if that holds when it is read."""
    connections = Connections(most=1, most_bytes=2**40)
    protocol = partial(http_protocol.PatientProtocol, connections=connections)
    config = uvicorn.Config(answer, http=protocol, ws="none", lifespan="off", log_config=None)  # type: ignore[arg-type]

    def is_in(phase: Phase) -> bool:
        return len(connections._by_phase[phase]) == 1

    async def until(phase: Phase) -> None:
        async with asyncio.timeout(5):
            while not is_in(phase):
                await asyncio.sleep(0.01)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            serving = asyncio.create_task(server._serve([listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            await loop.sock_sendall(client, GET % b"picture" + GET % b"word")
            while server.server_state.total_requests < 2:
                await asyncio.sleep(0.01)
            assert is_in(Phase.ANSWER)
            assert not connections.make_room()
            received = b""
            while not received.endswith(b"word"):
                received += await loop.sock_recv(client, 2**16)
            assert received.count(PICTURE) == 1
            await until(Phase.IDLE)
            # A client that does not read words alone makes room.
            await loop.sock_sendall(client, (GET % b"word") * 400)
            await until(Phase.UNREAD)
            assert connections.make_room()
            server.should_exit = True
            await serving

    asyncio.run(run())
