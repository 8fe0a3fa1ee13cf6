"""The service's flags, where their values come from, and what they mean together.

The command line counts before the environment, that before the file that --config names, that
before the defaults.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch
import yaml

from autoregressive.cli.command import OneLineParser
from autoregressive.cli.flags import add_model_flags, model_options
from autoregressive.errors import UserError, shortened, tell
from autoregressive.folders import command_line
from autoregressive.serve.engine.config import SCHEDULING_POLICIES, EngineConfig, SchedulingPolicy
from autoregressive.serve.engine_flags import add_engine_flags, engine_config
from autoregressive.serve.web.addresses import is_loopback
from autoregressive.serve.web.clients import check_forwarded_allow_ips
from autoregressive.serve.web.descriptors import connection_limit
from autoregressive.serve.web.dispatcher import Patience
from autoregressive.serve.web.pictures import largest_picture_bytes
from autoregressive.serve.web.service_links import is_service_link
from autoregressive.weights.choice import ModelChoice, resolve_model

COMMAND = "autoregressive/serve/api_server.py"
ENVIRONMENT = "LLAMAGEN_"  # and the flag's name in capitals: LLAMAGEN_MAX_NUM_SEQS
_PURPOSE = """\
Serves a model over HTTP: an API that OpenAI's clients speak, and a page.
Every flag may also be given in the environment (LLAMAGEN_MAX_NUM_SEQS=64) or in the YAML file that
--config names (max-num-seqs: 64); the command line counts first, then the environment, then the
file."""
_HOST, _PORT, _QUEUE, _LEVELS = "127.0.0.1", 8000, 256, ("debug", "info", "warning", "error")
_STORED = 1000
_LEAST_KEY = 16  # characters of a key, where others can reach the service
_MAKES_A_KEY = 'this makes one: python -c "import secrets; print(secrets.token_hex(16))"'
_BUFFERED_MIB = 256
_LONGEST_NAME = 200  # of the model, as in a request
_LONGEST_MESSAGE = 500
_MOST_CONFIG_BYTES = 65536
_LONGEST_WAIT = 10.0**9
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
_PATIENCE = Patience()
_POLICY: SchedulingPolicy = "fair"


@dataclass(frozen=True)
class ServerSettings:
    """Everything that the service was asked to be."""

    choice: ModelChoice
    engine: EngineConfig
    engines: int
    fronts: int  # processes that answer HTTP
    name: str  # of the model, for clients
    host: str
    port: int
    api_keys: tuple[str, ...]  # clients send one of them; none: everybody may use the service
    max_queue_size: int
    forwarded_allow_ips: str | None  # proxies whose X-Forwarded-For counts; None: nobody's
    max_connections: int  # of each process that answers HTTP
    max_buffered_bytes: int  # likewise
    patience: Patience
    store: Path | None
    stored_images: int
    stored_bytes: int | None  # None: no limit
    public_url: str | None  # None: where the service listens
    docs: bool
    log_level: str

    @property
    def public_host(self) -> str | None:
        """The name in `public_url`."""
        return None if self.public_url is None else _host_of(self.public_url)


class _LayerParser(OneLineParser):
    """Says in its errors where the value came from."""

    origin = ""

    def error(self, message: str) -> NoReturn:
        """Raises what becomes one line."""
        raise UserError(
            f"{self.origin}{shortened(message, _LONGEST_MESSAGE)} (--help shows the options)"
        )


def build_server_parser() -> _LayerParser:
    """The service's flags, the engine's and the model's."""
    parser = _LayerParser(
        description=_PURPOSE,
        usage=f"{command_line(COMMAND)} [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=110
        ),
        allow_abbrev=False,
    )
    _add_service_flags(parser.add_argument_group("service"))
    _add_patience_flags(parser.add_argument_group("patience"))
    add_model_flags(
        parser, if_none="the service does not start, unless told to with --random-weights"
    )
    add_engine_flags(parser, max_num_seqs=str(EngineConfig.max_num_seqs))
    return parser


def _add_service_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        metavar="ADDRESS",
        help=f"where to listen; beyond this machine only with a key (default: {_HOST})",
    )
    group.add_argument(
        "--port", type=int, metavar="N", help=f"0: any that is free (default: {_PORT})"
    )
    group.add_argument(
        "--api-key",
        metavar="KEYS",
        help="one or several, with commas between them; clients send one of them. "
        f"Better given as {ENVIRONMENT}API_KEY, which others do not see",
    )
    group.add_argument(
        "--max-queue-size",
        type=int,
        metavar="N",
        help=f"requests that may wait; more are refused with 429 (default: {_QUEUE})",
    )
    group.add_argument(
        "--scheduling-policy",
        choices=SCHEDULING_POLICIES,
        metavar="P",
        help="fair: clients (told apart by key and address) share the queue and the engines "
        "equally; "
        f"fcfs: first come, first served (default: {_POLICY})",
    )
    group.add_argument(
        "--forwarded-allow-ips",
        metavar="LIST",
        help="addresses and networks of proxies whose X-Forwarded-For says where a client is, or * "
        "(default: none)",
    )
    group.add_argument(
        "--max-connections",
        type=int,
        metavar="N",
        help="of each process that answers HTTP "
        "(default: 4096, or what the limit of open files allows)",
    )
    group.add_argument(
        "--max-buffered-mib",
        type=int,
        metavar="MIB",
        help="of unread answers and unfinished requests, in each process that answers HTTP; above "
        "half of it drawings are refused, above it the slowest clients are dropped "
        f"(default: {_BUFFERED_MIB})",
    )
    group.add_argument(
        "--data-parallel-size", type=int, metavar="N", help="engines, one a GPU (default: 1)"
    )
    group.add_argument(
        "--api-server-count",
        type=int,
        metavar="N",
        help="processes that answer HTTP (default: --data-parallel-size)",
    )
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what clients call the model (default: --gpt-model's)",
    )
    group.add_argument(
        "--store-dir",
        type=Path,
        metavar="DIR",
        help="keep images there for response_format url (default: none)",
    )
    group.add_argument(
        "--store-images",
        type=int,
        metavar="N",
        help=f"how many, the oldest are deleted; for --store-dir (default: {_STORED})",
    )
    group.add_argument(
        "--store-max-size",
        metavar="SIZE",
        help="of them together, such as 500M or 10G; for --store-dir (default: no limit)",
    )
    group.add_argument(
        "--public-url",
        metavar="URL",
        help="what clients reach the service by (default: where it listens)",
    )
    group.add_argument("--disable-docs", action="store_true", help="no /docs and no /openapi.json")
    group.add_argument(
        "--log-level", choices=_LEVELS, metavar="L", help=f"{', '.join(_LEVELS)} (default: info)"
    )
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="flags by name, without the dashes in front",
    )


def _add_patience_flags(group: argparse._ArgumentGroup) -> None:
    def seconds(flag: str, text: str, default: float | None) -> None:
        group.add_argument(
            flag, type=float, metavar="SECONDS", help=f"{text} (default: {default:g})"
        )

    seconds("--queue-timeout", "waiting for its turn, then 503; 0: no limit", _PATIENCE.queue)
    seconds("--request-timeout", "being drawn, then 504; 0: no limit", _PATIENCE.run)
    seconds(
        "--step-timeout",
        "an engine not heard of for so long hangs: the service ends with status 1",
        _PATIENCE.step,
    )
    seconds(
        "--shutdown-timeout", "after SIGTERM, for accepted requests to finish", _PATIENCE.shutdown
    )


def read_arguments(argv: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """What was given, wherever: of each flag the value that counts.

    Raises:
        UserError: an unknown flag or a value that is none; the message says in which layer.
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

    The environment is not the user's alone, so a variable that is none of the service's flags is a
    warning and no error.
    """
    flags = {
        action.dest.upper() for action in build_server_parser()._actions if action.dest != "help"
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
    """The file's text. A pipe or a device could go on for ever, and PyYAML reads a megabyte in some
    ten seconds.
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
        content = yaml.load(_config_text(path), yaml.BaseLoader)
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
    """A flag as the command line has it; of those without a value, whether it is there."""
    flag = f"--{name.replace('_', '-')}"
    action = build_server_parser()._option_string_actions.get(flag)
    if action is None or flag in ("--help",):
        origin, flag = shortened(origin, _LONGEST_MESSAGE), shortened(flag, 100)
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


def resolve_server_settings(arguments: argparse.Namespace) -> ServerSettings:
    """Fills in what was not given and checks everything that can be checked without loading
    weights.

    Raises:
        UserError: as `resolve_settings`, or a service that should not be: open to others without a
            key.
    """
    choice = resolve_model(model_options(arguments))
    host = _or(arguments.host, _HOST)
    keys = _resolve_keys(arguments.api_key, host)
    if not _is_host(host):
        raise UserError(
            f"--host {host}: is neither an address nor a name; 0.0.0.0 is every IPv4 address, :: "
            "every IPv6 one"
        )
    if arguments.forwarded_allow_ips is not None:
        check_forwarded_allow_ips(arguments.forwarded_allow_ips)
    engines = _at_least(arguments, "data_parallel_size", 1, 1)
    if engines > 1:
        _check_gpus(choice, engines)
    if arguments.store_dir is not None and not os.path.isdir(
        arguments.store_dir
    ):  # `StoreClaim` sees whether it can write there
        raise UserError(
            f"--store-dir: there is no folder {arguments.store_dir}; make it first, or choose "
            "another"
        )
    url = arguments.public_url
    if url is not None and not (
        url.startswith(("http://", "https://")) and _is_header_text(url) and " " not in url
    ):
        raise UserError(
            f"--public-url {url}: must begin with http:// or https://, and be ASCII without spaces"
        )
    if url is not None and not _host_of(url):
        raise UserError(f"--public-url {url}: names no host; such as https://pictures.example.org")
    if arguments.store_dir is not None and url is None and host in ("0.0.0.0", "::"):
        raise UserError(
            f"--store-dir: at --host {host} the images' URLs need an address: give --public-url"
        )
    fronts = _at_least(arguments, "api_server_count", engines, 1, 64)
    stored = _at_least(arguments, "store_images", _STORED, 1)
    if stored < fronts:
        raise UserError(
            f"--store-images {stored}: must be at least --api-server-count, {fronts}: each process "
            "keeps a share"
        )
    stored_bytes = _stored_bytes(arguments.store_max_size, choice, fronts)
    for flag, value in (
        ("--store-images", arguments.store_images),
        ("--store-max-size", arguments.store_max_size),
    ):
        if value is not None and arguments.store_dir is None:
            raise UserError(f"{flag} goes with --store-dir, the folder that images are stored in")
    name = _or(arguments.served_model_name, choice.model.gpt_model)
    if not name.isprintable() or not name.strip() or len(name) > _LONGEST_NAME:
        raise UserError(
            f"--served-model-name {name}: must be printable, not empty, and at most "
            f"{_LONGEST_NAME} characters"
        )
    return ServerSettings(
        choice=choice,
        engine=replace(
            engine_config(arguments, EngineConfig.max_num_seqs),
            scheduling_policy=_or(arguments.scheduling_policy, _POLICY),
        ),
        engines=engines,
        fronts=fronts,
        name=name,
        host=host,
        port=_at_least(arguments, "port", _PORT, 0, 65535),
        api_keys=keys,
        max_queue_size=_at_least(arguments, "max_queue_size", _QUEUE, 0),
        forwarded_allow_ips=arguments.forwarded_allow_ips,
        max_connections=connection_limit(_asked(arguments, "max_connections", 8), engines + fronts),
        max_buffered_bytes=_at_least(arguments, "max_buffered_mib", _BUFFERED_MIB, 16) * 2**20,
        patience=_resolve_patience(arguments),
        store=arguments.store_dir,
        stored_images=stored,
        stored_bytes=stored_bytes,
        public_url=url,
        docs=not arguments.disable_docs,
        log_level=_or(arguments.log_level, "info"),
    )


def _stored_bytes(text: str | None, choice: ModelChoice, fronts: int) -> int | None:
    if text is None:
        return None
    size = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text.upper(), re.ASCII)
    if size is None:
        raise UserError(
            f"--store-max-size {text}: must be a number of bytes, or of K, M, G or T, such as 10G"
        )
    bytes_there = int(size[1]) * 1024 ** " KMGT".index(size[2] or " ")
    if bytes_there < (least := fronts * largest_picture_bytes(choice.model.image_size)):
        raise UserError(
            f"--store-max-size {text}: must be at least {-(-least // 1024)}K: an image for each "
            "--api-server-count"
        )
    return bytes_there


def _resolve_keys(given: str | None, host: str) -> tuple[str, ...]:
    """The keys, where others can reach the service long enough not to be guessed."""
    others = not is_loopback(host)
    if given is None:
        if others:
            way = f"set a key ({ENVIRONMENT}API_KEY), or use {_HOST}"
            why = f"--host {host}: others can reach this address"
            raise UserError(f"{why}, so {way}; {_MAKES_A_KEY}")
        return ()
    keys = tuple(dict.fromkeys(key.strip() for key in given.split(",")))
    if not _is_header_text(given) or "" in keys:
        what = "--api-key: must be printable ASCII, not empty, and without spaces around it"
        raise UserError(f"{what}; commas separate several keys")
    if others and min(map(len, keys)) < _LEAST_KEY:
        why = f"--api-key: others can reach {host}"
        what = f"a key must have at least {_LEAST_KEY} characters"
        raise UserError(f"{why}, so {what}; {_MAKES_A_KEY}")
    return keys


def _resolve_patience(arguments: argparse.Namespace) -> Patience:
    def seconds(name: str, default: float, least: float = 0) -> float:
        value = _or(getattr(arguments, name), default)
        if not least <= value <= _LONGEST_WAIT:
            raise UserError(
                f"--{name.replace('_', '-')} {value:g}: must be {least:g} to {_LONGEST_WAIT:.0f}"
            )
        return value

    assert _PATIENCE.queue is not None
    assert _PATIENCE.run is not None
    return Patience(
        queue=seconds("queue_timeout", _PATIENCE.queue) or None,
        run=seconds("request_timeout", _PATIENCE.run) or None,
        step=seconds("step_timeout", _PATIENCE.step, 1),
        shutdown=seconds("shutdown_timeout", _PATIENCE.shutdown),
    )


def _check_gpus(choice: ModelChoice, engines: int) -> None:
    device = choice.model.device
    if device.type != "cuda":
        raise UserError(
            f"--data-parallel-size {engines}: takes {engines} GPUs, and this is a CPU; leave it out"
        )
    if device.index not in (None, 0):
        raise UserError(
            f"--data-parallel-size {engines}: takes GPUs from cuda:0 on; leave --device {device} "
            "out"
        )
    if torch.cuda.device_count() < engines:
        raise UserError(
            f"--data-parallel-size {engines}: there are {torch.cuda.device_count()} GPUs here"
        )


def _at_least(
    arguments: argparse.Namespace, name: str, default: int, least: int, most: int = 10**6
) -> int:
    value = _or(getattr(arguments, name), default)
    if not least <= value <= most:
        raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} to {most}")
    return value


def _asked(arguments: argparse.Namespace, name: str, least: int) -> int | None:
    return None if getattr(arguments, name) is None else _at_least(arguments, name, least, least)


def _is_header_text(text: str) -> bool:
    """Whether it comes through an HTTP header as it is."""
    return text.isascii() and text.isprintable() and text == text.strip() != ""


def _is_host(host: str) -> bool:
    """Whether the system can be asked for it."""
    try:
        return host.isprintable() and host.encode("idna") != b""
    except UnicodeError:  # a name with an empty or an endless part
        return False


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # half an IPv6 address
        return None


def _or(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given
