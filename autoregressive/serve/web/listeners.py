"""The sockets that clients connect to."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from autoregressive.errors import UserError
from autoregressive.serve.web.server_settings import ServerSettings

_BACKLOG = 2048
# Connections inherit the options of their listener. This is what the system holds for a reader.
_SEND_BYTES = 128 * 2**10
# A client that vanishes without a word, as when its cable is pulled, is noticed within half a
# minute: by probes that it does not answer, or by data that it does not confirm. Without
# TCP_NODELAY the second part of an answer waits 40 ms for the client to confirm the first.
_TCP_OPTIONS = {
    "TCP_KEEPIDLE": 15,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 30_000,
    "TCP_NODELAY": 1,
}


@contextmanager
def listen(settings: ServerSettings) -> Iterator[list[socket.socket]]:
    """Opens a socket for each process that answers HTTP, all at one address. Clients may connect at
    once, and are answered when the service runs.

    Raises:
        UserError: the address is taken, or not this machine's.
    """
    with ExitStack() as stack:
        try:
            if settings.socket_path is None:
                listeners = _at_port(stack, settings)
            else:
                listeners = _at_path(stack, settings.socket_path, settings.fronts)
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) else None
            why = (os.strerror(number) if number is not None and number > 0 else str(error)).lower()
            where, others = f"{settings.host} port {settings.port}", "--port or --host"
            if settings.socket_path is not None:
                where, others = str(settings.socket_path), "--uds"
            raise UserError(f"cannot listen on {where}: {why}; choose another {others}") from error
        yield listeners


def address_of(listener: socket.socket, settings: ServerSettings) -> str:
    """Where clients reach a listener."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{settings.socket_path}"
    scheme = "http" if settings.certificate is None else "https"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _at_port(stack: ExitStack, settings: ServerSettings) -> list[socket.socket]:
    """Sockets of their own at one port, among which the kernel shares out the connections."""

    def open_socket(port: int, *, reuse_port: bool) -> socket.socket:
        listener = socket.create_server(
            (settings.host, port),
            family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET,
            backlog=_BACKLOG,
            reuse_port=reuse_port,
        )
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _TCP_OPTIONS.items():
            if hasattr(socket, name):  # the names are Linux's
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return stack.enter_context(listener)

    # Not shared at first, so that a service that has the address already is noticed.
    listeners = [open_socket(settings.port, reuse_port=False)]
    if settings.fronts > 1:
        port = listeners[0].getsockname()[1]
        listeners[0].close()
        listeners = [open_socket(port, reuse_port=True) for _ in range(settings.fronts)]
    return listeners


def _at_path(stack: ExitStack, path: Path, count: int) -> list[socket.socket]:
    """A Unix socket, and copies of it: only one can have the path. Every user who may look into its
    folder may connect, as every user of the machine may connect to a port.
    """
    _remove_abandoned(path)
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    stack.callback(_remove, path, path.lstat())
    path.chmod(0o666)
    listener.listen(_BACKLOG)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
    return [listener, *(stack.enter_context(listener.dup()) for _ in range(count - 1))]


def _remove_abandoned(path: Path) -> None:
    """Removes a socket that a killed process has left: nothing listens to it."""
    with suppress(FileNotFoundError, BlockingIOError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # or it would wait for a place where too many connect already
        found = path.lstat()
        if stat.S_ISSOCK(found.st_mode):
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                _remove(path, found)


def _remove(path: Path, found: os.stat_result) -> None:
    """Removes a file if it is still the one that was found there."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), found):
            path.unlink()
