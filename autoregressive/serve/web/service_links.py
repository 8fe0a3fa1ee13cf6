"""Tells the variables that Kubernetes and Docker set for a container's neighbours from the
service's own flags.

A Service named `llamagen` gives every pod of its namespace LLAMAGEN_SERVICE_HOST=10.0.0.5,
LLAMAGEN_PORT=tcp://10.0.0.5:8000, LLAMAGEN_PORT_8000_TCP and more; one named `llamagen-page` gives
LLAMAGEN_PAGE_SERVICE_HOST and so on. A container that Docker links by such a name gives the same,
and LLAMAGEN_NAME and LLAMAGEN_ENV_*.
"""

import re

_SHAPES = tuple(
    map(
        re.compile,
        (
            r"(\w+_)?SERVICE_HOST=.*",
            r"(\w+_)?SERVICE_PORT(_\w+)?=\d*",
            r"(\w+_)?PORT=(tcp|udp|sctp)://.*",
            r"(\w+_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*",
            r"(\w+_)?ENV_\w+=.*",
            r"NAME=/.*",  # nothing before it: LLAMAGEN_SERVED_MODEL_NAME=/models/x is a flag
        ),
    )
)


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable has the form of those that Kubernetes and Docker set.

    Args:
        name: without the prefix that all of the service's variables have.
        value: what it is set to; LLAMAGEN_PORT=8000 is a flag, LLAMAGEN_PORT=tcp://10.0.0.5:8000 is
            not.
    """
    return any(shape.fullmatch(f"{name}={value}") for shape in _SHAPES)
