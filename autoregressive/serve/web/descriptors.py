"""How many file descriptors this process may open, and how many connections fit below that."""

import logging
import resource

from autoregressive.errors import UserError

MOST_DESCRIPTORS = 65535  # more are not needed, and some systems allow a thousand million
_DEFAULT_CONNECTIONS = 4096
_LEAST_CONNECTIONS = 8
REFUSED_SOCKETS = 32  # so many refused connections stay open until their clients have the answer
# Beside connections: the standard streams, the event loop's own, listeners, stored files that are
# being written or read (eight at a time), libraries' files, and connections that have been closed
# in this turn of the event loop, or accepted in it, and refused ones.
_RESERVE = 64 + REFUSED_SOCKETS
_RESERVE_FOR_A_CHILD = 4  # a connection to it, its sentinel, and what starting it takes
_log = logging.getLogger("llamagen.connections")


def descriptor_limit() -> int:
    """The limit that `raise_descriptor_limit` sets, or finds."""
    soft, hard = (
        MOST_DESCRIPTORS if limit == resource.RLIM_INFINITY else limit for limit in _limits()
    )
    return max(soft, min(hard, MOST_DESCRIPTORS))


def raise_descriptor_limit() -> None:
    """Raises the soft limit of this process and of its children to the hard one, or to
    `MOST_DESCRIPTORS`; the log says so."""
    soft, hard = _limits()
    limit = descriptor_limit()
    if soft == resource.RLIM_INFINITY or limit <= soft:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (OSError, ValueError) as error:  # macOS allows fewer than its hard limit says
        _log.warning(
            "the limit of open files stays", extra={"fields": {"limit": soft, "reason": str(error)}}
        )
        return
    _log.info(
        "the limit of open files is raised", extra={"fields": {"before": soft, "limit": limit}}
    )


def connection_limit(asked: int | None, children: int) -> int:
    """How many connections a process that answers HTTP holds at most.

    Args:
        asked: the number that was asked for; None: the default, or as many as fit.
        children: processes that it may start.

    Raises:
        UserError: so many do not fit, or fewer than eight do.
    """
    limit = descriptor_limit()
    fit = limit - _RESERVE - _RESERVE_FOR_A_CHILD * children
    if fit < _LEAST_CONNECTIONS:
        raise UserError(
            f"the limit of open files is {limit}, which is too low: raise it (ulimit -n 1024)"
        )
    if asked is None:
        return min(fit, _DEFAULT_CONNECTIONS)
    if asked > fit:
        most = f"at most {fit} connections fit below the limit of {limit} open files"
        raise UserError(
            f"--max-connections {asked}: {most}; ask for fewer, or raise it (ulimit -n)"
        )
    return asked


def _limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)
