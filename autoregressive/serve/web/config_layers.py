"""Where the values of the service's flags come from.

The command line counts before the environment, the environment before the file that --config names,
and the file before the defaults.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from autoregressive.errors import UserError, shortened, tell
from autoregressive.serve.web.server_flags import ENVIRONMENT, LONGEST_MESSAGE, build_server_parser

_MOST_CONFIG_BYTES = 65536
_SWITCHES = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
    "": False,
}
# of variables that Kubernetes and Docker set
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


def read_arguments(argv: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Reads all layers; returns the value that counts of each flag.

    Raises:
        UserError: a flag is unknown or has a wrong value; the message says in which layer.
    """
    typed = build_server_parser().parse_args(argv)
    from_environment = _parse_layer(_environment_tokens(environment), "environment: ")
    config = typed.config or from_environment.config
    layers = [typed, from_environment]
    if config is not None:
        layers.append(_parse_layer(_file_tokens(config), f"{config}: "))
    merged = argparse.Namespace()
    for name, value in vars(typed).items():
        values = [
            None if value is False else value,
            *(getattr(layer, name) for layer in layers[1:]),
        ]
        setattr(merged, name, next((one for one in values if one is not None), value))
    return merged


def _parse_layer(tokens: list[str], origin: str) -> argparse.Namespace:
    parser = build_server_parser()
    parser.origin = origin
    for flag, action in list(parser._option_string_actions.items()):
        if action.nargs == 0:  # here a switch may also be off, in spite of the layers below
            action.default = None
            parser.add_argument(
                _off(flag),
                dest=action.dest,
                action="store_const",
                const=False,
                help=argparse.SUPPRESS,
            )
    return parser.parse_args(tokens)


def _off(flag: str) -> str:
    return f"--not-{flag.lstrip('-')}"


def _environment_tokens(environment: Mapping[str, str]) -> list[str]:
    """The flags that the environment gives.

    Other programs use the environment too, so a variable that is not one of the service's flags
    causes a warning and no error.
    """
    flags = {
        action.dest.upper()
        for action in build_server_parser()._actions
        if action.dest not in ("help", "version")
    }
    tokens = []
    for variable, value in environment.items():
        name = variable.removeprefix(ENVIRONMENT)
        if name == variable or is_service_link(name, value):
            continue
        if name in flags:
            tokens += _tokens(name.lower(), value, f"environment: {variable}")
        else:
            near = get_close_matches(name, flags, n=1)
            hint = (
                f"; did you mean {ENVIRONMENT}{near[0]}?" if near else " (--help shows the flags)"
            )
            tell(f"warning: environment: {variable} is ignored: there is no such flag{hint}")
    return tokens


def _config_text(path: Path) -> str:
    """The text of a short file. A pipe or a device could go on for ever, and PyYAML takes some ten
    seconds for a megabyte.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"--config {path}: cannot be read (it is no file)")
    with path.open("rb") as stream:
        content = stream.read(_MOST_CONFIG_BYTES + 1)
    if len(content) > _MOST_CONFIG_BYTES:
        raise UserError(
            f"--config {path}: has more than {_MOST_CONFIG_BYTES} bytes; flags and their values "
            "take a few hundred"
        )
    return content.decode()


def _file_tokens(path: Path) -> list[str]:
    try:
        # all is text as written: safe_load reads 010 as 8, no as False
        content = yaml.load(_config_text(path), yaml.BaseLoader)  # noqa: S506 -- it makes text only
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--config {path}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        # the error itself quotes the line, which may be that of the key
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"--config {path}: is not YAML{where}") from error
    if content in (None, ""):
        return []
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must be flags and their values, such as port: 8000")
    names = [str(name).replace("_", "-") for name in content]
    for name in names:
        if name == "config" or names.count(name) > 1:
            why = "belongs on the command line" if name == "config" else "is there twice"
            raise UserError(f"{path}: {shortened(name, 100)} {why}")
    return [
        token
        for name, value in content.items()
        for token in _tokens(str(name), value, f"{path}: {name}")
    ]


def _tokens(name: str, value: Any, origin: str) -> list[str]:
    """A flag as the command line has it. The value of a switch says whether it is there."""
    flag = f"--{name.replace('_', '-')}"
    action = build_server_parser()._option_string_actions.get(flag)
    if action is None or flag in ("--help",):
        origin, flag = shortened(origin, LONGEST_MESSAGE), shortened(flag, 100)
        raise UserError(f"{origin}: there is no flag {flag} (--help shows the options)")
    if action.nargs == 0:
        switch = _SWITCHES.get(str(value).lower())
        if switch is None:
            raise UserError(f"{origin}: must be true or false")
        return [flag if switch else _off(flag)]
    if not isinstance(value, str):
        raise UserError(f"{origin}: must be one value")
    if value in ("", "~", "null"):
        raise UserError(f"{origin}: has no value; leave it out for the default")
    return [f"{flag}={value}"]


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable has the form of those that Kubernetes and Docker set for a container's
    neighbours.

    A Service named `llamagen` gives every pod of its namespace LLAMAGEN_SERVICE_HOST=10.0.0.5,
    LLAMAGEN_PORT=tcp://10.0.0.5:8000, LLAMAGEN_PORT_8000_TCP and more; one named `llamagen-page`
    gives LLAMAGEN_PAGE_SERVICE_HOST and so on. A container that Docker links by such a name gives
    the same, and LLAMAGEN_NAME and LLAMAGEN_ENV_*.

    Args:
        name: without the prefix that all of the service's variables have.
        value: what it is set to; LLAMAGEN_PORT=8000 is a flag, LLAMAGEN_PORT=tcp://10.0.0.5:8000 is
            not.
    """
    return any(shape.fullmatch(f"{name}={value}") for shape in _SHAPES)
