"""The service's flags, their defaults, and where their values come from.

The command line counts before the environment, the environment before the file that --config names,
and the file before the defaults.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml

from autoregressive.cli.command import OneLineParser, add_version_flag
from autoregressive.cli.flags import add_model_flags
from autoregressive.errors import SettingError, UserError, shortened, tell
from autoregressive.folders import command_line
from autoregressive.serve.engine.engine_config import SCHEDULING_POLICIES, EngineConfig
from autoregressive.serve.engine_flags import add_engine_flags
from autoregressive.serve.web.signed_urls import DEFAULT_LIFETIME
from autoregressive.serve.web.timeouts import Timeouts

COMMAND = "autoregressive/serve/api_server.py"
ENVIRONMENT = "LLAMAGEN_"  # and the flag's name in capitals: LLAMAGEN_MAX_NUM_SEQS
_PURPOSE = """\
Serves a model over HTTP: an API that OpenAI's clients speak, and a page.
Every flag may also be given in the environment (LLAMAGEN_MAX_NUM_SEQS=64) or in the YAML file that
--config names (max-num-seqs: 64); the command line counts first, then the environment, then the
file."""
_LEVELS = ("debug", "info", "warning", "error")
_LONGEST_MESSAGE = 500
_MOST_CONFIG_BYTES = 65536
_SWITCHES = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0", ""), False),
}
_NO_VALUES = ("help", "version")
# of variables that Kubernetes and Docker set
_SHAPES = (
    r"(\w+_)?SERVICE_HOST=.*",
    r"(\w+_)?SERVICE_PORT(_\w+)?=\d*",
    r"(\w+_)?PORT=(tcp|udp|sctp)://.*",
    r"(\w+_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*",
    r"(\w+_)?ENV_\w+=.*",
    r"NAME=/.*",  # nothing before it: LLAMAGEN_SERVED_MODEL_NAME=/models/x is a flag
)


@dataclass(frozen=True)
class ServerFlag:
    """A flag of the service itself: how --help shows it, and which values it takes."""

    metavar: str
    help: str
    default: Any = None
    type: type = str
    least: int = 0  # of a number
    most: int = 10**6
    choices: Sequence[str] | None = None
    several: bool = False  # one value or more, which become a list

    def add_to(self, group: argparse._ArgumentGroup, setting: str) -> None:
        """Adds the flag to a parser, which is told no default: what was said must be told from
        what was not.
        """
        default = f"{self.default:g}" if isinstance(self.default, float) else self.default
        keywords: dict[str, Any] = {"nargs": "+", "action": "extend"} if self.several else {}
        group.add_argument(
            f"--{setting.replace('_', '-')}",
            metavar=self.metavar,
            type=self.type,
            choices=self.choices,
            help=self.help if default is None else f"{self.help} (default: {default})",
            **keywords,
        )

    def resolve(self, setting: str, said: Any) -> Any:
        """The value that was said, or the default.

        Raises:
            SettingError: it is out of range.
        """
        value = self.default if said is None else said
        if isinstance(value, (int, float)) and not self.least <= value <= self.most:
            raise SettingError(
                setting,
                f"{value:g}" if isinstance(value, float) else value,
                f"must be {self.least} to {self.most}",
            )
        return value


def _seconds(text: str, default: float | None, least: int = 0) -> ServerFlag:
    return ServerFlag("SECONDS", text, default, float, least, most=10**9)


SERVICE_FLAGS = {
    "host": ServerFlag(
        "ADDRESS", "where to listen; beyond this machine only with a key", "127.0.0.1"
    ),
    "port": ServerFlag("N", "0: any that is free", 8000, int, 0, 65535),
    "uds": ServerFlag("PATH", "listen at this Unix socket instead of an address", type=Path),
    "ssl_certfile": ServerFlag("FILE.pem", "the certificate chain, for HTTPS", type=Path),
    "ssl_keyfile": ServerFlag(
        "FILE.pem", "the certificate's key, if it is not in --ssl-certfile", type=Path
    ),
    "root_path": ServerFlag("PATH", "the service is below it, behind a proxy; such as /images"),
    "allowed_origins": ServerFlag(
        "ORIGIN",
        "sites whose pages may use the service from a browser (CORS), such as "
        "https://app.example.org, or * (default: none)",
        several=True,
    ),
    "api_key": ServerFlag(
        "KEYS",
        "one or several, with commas between them; clients send one of them. "
        f"Better given as {ENVIRONMENT}API_KEY, which others do not see",
    ),
    "max_queue_size": ServerFlag(
        "N", "requests that may wait; more are refused with 429", 256, int
    ),
    "scheduling_policy": ServerFlag(
        "P",
        "fair: clients (told apart by key and address) share the queue and the engines equally; "
        "fcfs: first come, first served",
        "fair",
        choices=SCHEDULING_POLICIES,
    ),
    "forwarded_allow_ips": ServerFlag(
        "LIST",
        "addresses and networks of proxies whose X-Forwarded-For says where a client is, or * "
        "(default: none)",
    ),
    "max_connections": ServerFlag(
        "N",
        "of each process that answers HTTP (default: 4096, or what the limit of open files allows)",
        type=int,
        least=8,
    ),
    "max_buffered_mib": ServerFlag(
        "MIB",
        "of unread answers and unfinished requests, in each process that answers HTTP; above "
        "half of it drawings are refused, above it the slowest clients are dropped",
        256,
        int,
        16,
    ),
    "data_parallel_size": ServerFlag(
        "N", "engines, each on --tensor-parallel-size GPUs", 1, int, 1
    ),
    "api_server_count": ServerFlag(
        "N", "processes that answer HTTP (default: --data-parallel-size)", None, int, 1, 64
    ),
    "served_model_name": ServerFlag(
        "NAME",
        "what clients call the model; answers have the first name (default: --gpt-model's)",
        several=True,
    ),
    "store_dir": ServerFlag(
        "DIR", "keep images there for response_format url (default: none)", type=Path
    ),
    "store_images": ServerFlag(
        "N", "how many, the oldest are deleted; for --store-dir", 1000, int, 1
    ),
    "store_max_size": ServerFlag(
        "SIZE", "of them together, such as 500M or 10G; for --store-dir (default: no limit)"
    ),
    "url_signing_key": ServerFlag(
        "KEY",
        "signs the URLs of stored images, which then need no key of a client. Better given as "
        f"{ENVIRONMENT}URL_SIGNING_KEY (default: made at the start)",
    ),
    "url_lifetime": ServerFlag(
        "SECONDS", "until the URL of a stored image expires", DEFAULT_LIFETIME, int, 1, 10**9
    ),
    "public_url": ServerFlag(
        "URL", "what clients reach the service by (default: where it listens)"
    ),
    "default_response_format": ServerFlag(
        "F",
        "of requests that leave it out: b64_json or url; url goes with --store-dir",
        "b64_json",
        choices=("b64_json", "url"),
    ),
    "log_level": ServerFlag("L", ", ".join(_LEVELS), "info", choices=_LEVELS),
    "disable_access_log_for": ServerFlag(
        "PATH",
        "no lines in the log for requests of these paths that had no error, such as /health "
        "/metrics",
        several=True,
    ),
    "otlp_traces_endpoint": ServerFlag(
        "URL",
        "send spans of requests there, over HTTP, such as http://127.0.0.1:4318/v1/traces; needs "
        "the extra [otlp] (default: none)",
    ),
    "config": ServerFlag("FILE.yaml", "flags by name, without the dashes in front", type=Path),
}
SERVICE_SWITCHES = {
    "disable_docs": "no /docs and no /openapi.json",
    "ignore_unknown_fields": "of requests; the answer names them in a Warning header",
    "allow_any_size": "take requests for images of another size; the answer says which it has",
    "allow_any_model": "take requests for other models; the answer says which it is of",
}
TIMEOUT_FLAGS = {
    "queue_timeout": _seconds("waiting for its turn, then 503; 0: no limit", Timeouts.queue),
    "request_timeout": _seconds("being drawn, then 504; 0: no limit", Timeouts.run),
    "step_timeout": _seconds(
        "an engine not heard of for so long hangs: the command ends with status 1",
        Timeouts.step,
        1,
    ),
    "shutdown_timeout": _seconds(
        "after SIGTERM, for accepted requests to finish", Timeouts.shutdown
    ),
}


class ServerParser(OneLineParser):
    """Says in its errors where the value came from.

    Attributes:
        origin: of the values, as a message begins with it.
    """

    origin = ""

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError` that names the layer of the value, where argparse would exit."""
        raise UserError(
            f"{self.origin}{shortened(message, _LONGEST_MESSAGE)} (--help shows the options)"
        )


def build_server_parser() -> ServerParser:
    """The service's flags, the engine's and the model's."""
    parser = ServerParser(
        description=_PURPOSE,
        usage=f"{command_line(COMMAND)} [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=110
        ),
    )
    add_version_flag(parser)
    service = parser.add_argument_group("service")
    for setting, flag in SERVICE_FLAGS.items():
        flag.add_to(service, setting)
    for setting, text in SERVICE_SWITCHES.items():
        service.add_argument(f"--{setting.replace('_', '-')}", action="store_true", help=text)
    timeouts = parser.add_argument_group("timeouts")
    for setting, flag in TIMEOUT_FLAGS.items():
        flag.add_to(timeouts, setting)
    add_model_flags(
        parser, if_none="the service does not start, unless told to with --random-weights"
    )
    add_engine_flags(parser, max_num_seqs=str(EngineConfig.max_num_seqs))
    return parser


def read_arguments(argv: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Reads all layers; returns the value that counts of each flag.

    Raises:
        UserError: a flag is unknown or has a wrong value; the message says in which layer.
    """
    typed = _given(argv, "")
    exported = _read_layer(_exported_values(environment), "environment: ")
    config = typed.get("config") or exported.get("config")
    filed = {} if config is None else _read_layer(_filed_values(config), f"{config}: ")
    # a parser fills in only what is missing
    return build_server_parser().parse_args(
        [], argparse.Namespace(**{**filed, **exported, **typed})
    )


def _given(tokens: Sequence[str], origin: str) -> dict[str, Any]:
    """The values of the flags that are given, and of no others."""
    parser = build_server_parser()
    parser.origin = origin
    unsaid = vars(parser.parse_args([]))  # None, and False of switches
    return {
        setting: value
        for setting, value in vars(parser.parse_args(tokens)).items()
        if value != unsaid[setting]
    }


def _read_layer(values: Iterable[tuple[str, str, Any]], layer: str) -> dict[str, Any]:
    """The values that a layer gives, as the command line would read them. There a switch may also
    be off, in spite of the layers below.

    Args:
        values: where each is written, the name of its flag, and its text.
    """
    flags = {action.dest: action for action in build_server_parser()._actions}
    tokens: list[str] = []
    switches: dict[str, bool] = {}
    for origin, name, value in values:
        setting, flag = name.replace("-", "_"), f"--{name.replace('_', '-')}"
        if setting not in flags or setting in _NO_VALUES:
            raise UserError(
                f"{shortened(origin, _LONGEST_MESSAGE)}: there is no flag {shortened(flag, 100)} "
                "(--help shows the options)"
            )
        if flags[setting].nargs == 0:
            switch = _SWITCHES.get(str(value).lower())
            if switch is None:
                raise UserError(f"{origin}: must be true or false")
            switches[setting] = switch
        else:
            tokens += [f"{flag}={one}" for one in _values(origin, value, flags[setting].nargs)]
    return _given(tokens, layer) | switches


def _values(origin: str, value: Any, nargs: str | int | None) -> list[str]:
    """What is written for a flag, as a list; of a flag that takes one value, that value."""
    values = value if nargs == "+" and isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise UserError(f"{origin}: must be one value")
    if not values or any(one in ("", "~", "null") for one in values):
        raise UserError(f"{origin}: has no value; leave it out for the default")
    return values


def _exported_values(environment: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    """The flags that the environment gives.

    Other programs use the environment too, so a variable that is not one of the service's flags
    causes a warning and no error.
    """
    names = {
        action.dest.upper(): action
        for action in build_server_parser()._actions
        if action.dest not in _NO_VALUES
    }
    for variable, value in environment.items():
        name = variable.removeprefix(ENVIRONMENT)
        if name == variable or is_service_link(name, value):
            continue
        if name in names:
            several = names[name].nargs == "+" and value.split()  # spaces separate them
            yield f"environment: {variable}", name.lower(), several or value
        else:
            near = get_close_matches(name, names, n=1)
            hint = (
                f"; did you mean {ENVIRONMENT}{near[0]}?" if near else " (--help shows the flags)"
            )
            tell(f"warning: environment: {variable} is ignored: there is no such flag{hint}")


def _filed_values(path: Path) -> Iterator[tuple[str, str, Any]]:
    try:
        # all is text as written: safe_load reads 010 as 8, no as False
        content = yaml.load(_config_text(path), yaml.BaseLoader)  # noqa: S506 -- it makes text only
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingError("config", path, f"cannot be read ({why})") from error
    except (yaml.YAMLError, RecursionError) as error:
        # the error itself quotes the line, which may be that of the key
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise SettingError("config", path, f"is not YAML{where}") from error
    if content in (None, ""):
        return
    if not isinstance(content, dict):
        raise SettingError("config", path, "must be flags and their values, such as port: 8000")
    names = [str(name).replace("_", "-") for name in content]
    for name, value in zip(names, content.values(), strict=True):
        if name == "config" or names.count(name) > 1:
            why = "belongs on the command line" if name == "config" else "is there twice"
            raise UserError(f"{path}: {shortened(name, 100)} {why}")
        yield f"{path}: {name}", name, value


def _config_text(path: Path) -> str:
    """The text of a short file. A pipe or a device could go on for ever, and PyYAML takes some ten
    seconds for a megabyte.
    """
    if path.exists() and not path.is_file():
        raise SettingError("config", path, "cannot be read (it is no file)")
    with path.open("rb") as stream:
        content = stream.read(_MOST_CONFIG_BYTES + 1)
    if len(content) > _MOST_CONFIG_BYTES:
        raise SettingError(
            "config",
            path,
            f"has more than {_MOST_CONFIG_BYTES} bytes; flags and their values take a few hundred",
        )
    return content.decode()


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
    return any(re.fullmatch(shape, f"{name}={value}") for shape in _SHAPES)
