"""The service's settings: its flags, checked together and with their defaults."""

import argparse
import os
import re
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from autoregressive.cli.flags import model_options
from autoregressive.errors import UserError
from autoregressive.serve.engine.config import EngineConfig
from autoregressive.serve.engine_flags import engine_config
from autoregressive.serve.web.clients import is_loopback
from autoregressive.serve.web.connections import connection_limit
from autoregressive.serve.web.pictures import largest_picture_bytes
from autoregressive.serve.web.server_flags import (
    BUFFERED_MIB,
    ENVIRONMENT,
    HOST,
    POLICY,
    PORT,
    QUEUE_SIZE,
    STORED_IMAGES,
    TIMEOUTS,
)
from autoregressive.serve.web.timeouts import Timeouts
from autoregressive.weights.choice import ModelChoice, resolve_model

_LEAST_KEY = 16  # characters of a key, where others can reach the service
_MAKES_A_KEY = 'this makes one: python -c "import secrets; print(secrets.token_hex(16))"'
_LONGEST_NAME = 200  # of the model, as in a request
_LONGEST_WAIT = 10.0**9


@dataclass(frozen=True)
class ServerSettings:
    """The service as its flags describe it."""

    choice: ModelChoice
    engine: EngineConfig
    engines: int
    fronts: int  # processes that answer HTTP
    name: str  # of the model, for clients
    host: str
    port: int
    api_keys: tuple[str, ...]  # clients send one of them; none: every client may use the service
    max_queue_size: int
    forwarded_allow_ips: str | None  # proxies whose X-Forwarded-For counts; None: none
    max_connections: int  # of each process that answers HTTP
    max_buffered_bytes: int  # likewise
    timeouts: Timeouts
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


def resolve_server_settings(arguments: argparse.Namespace) -> ServerSettings:
    """Fills in defaults and checks everything that can be checked without loading weights.

    Raises:
        UserError: as `resolve_settings`, or others could use the service without a key.
    """
    choice = resolve_model(model_options(arguments))
    host = _or(arguments.host, HOST)
    keys = _resolve_keys(arguments.api_key, host)
    if not _is_host(host):
        raise UserError(
            f"--host {host}: is neither an address nor a name; 0.0.0.0 is every IPv4 address, :: "
            "every IPv6 one"
        )
    if arguments.forwarded_allow_ips is not None:
        _check_forwarded_allow_ips(arguments.forwarded_allow_ips)
    engines = _at_least(arguments, "data_parallel_size", 1, 1)
    if engines > 1:
        _check_gpus(choice, engines)
    _check_addresses(arguments.store_dir, arguments.public_url, host)
    fronts = _at_least(arguments, "api_server_count", engines, 1, 64)
    stored, stored_bytes = _resolve_store(arguments, choice, fronts)
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
            scheduling_policy=_or(arguments.scheduling_policy, POLICY),
        ),
        engines=engines,
        fronts=fronts,
        name=name,
        host=host,
        port=_at_least(arguments, "port", PORT, 0, 65535),
        api_keys=keys,
        max_queue_size=_at_least(arguments, "max_queue_size", QUEUE_SIZE, 0),
        forwarded_allow_ips=arguments.forwarded_allow_ips,
        max_connections=connection_limit(_asked(arguments, "max_connections", 8), engines + fronts),
        max_buffered_bytes=_at_least(arguments, "max_buffered_mib", BUFFERED_MIB, 16) * 2**20,
        timeouts=_resolve_timeouts(arguments),
        store=arguments.store_dir,
        stored_images=stored,
        stored_bytes=stored_bytes,
        public_url=arguments.public_url,
        docs=not arguments.disable_docs,
        log_level=_or(arguments.log_level, "info"),
    )


def _check_forwarded_allow_ips(text: str) -> None:
    """Checks addresses of proxies: uvicorn takes a misspelt one for a name, and trusts no proxy."""
    for item in [] if text == "*" else text.split(","):
        try:
            ip_network(item.strip())
        except ValueError as error:
            what = (
                "must be addresses or networks, separated by commas, such as "
                "10.0.0.7,10.1.0.0/16, or * alone"
            )
            raise UserError(f"--forwarded-allow-ips {text}: {what}") from error


def _check_addresses(folder: Path | None, url: str | None, host: str) -> None:
    """Checks where images are stored and which URLs they get."""
    if folder is not None and not os.path.isdir(folder):  # `StoreClaim` looks whether it can write
        raise UserError(
            f"--store-dir: there is no folder {folder}; make it first, or choose another"
        )
    if url is not None:
        has_scheme = url.startswith(("http://", "https://"))
        if not has_scheme or not _is_header_text(url) or " " in url:
            what = "must begin with http:// or https://, and be ASCII without spaces"
            raise UserError(f"--public-url {url}: {what}")
        if not _host_of(url):
            raise UserError(
                f"--public-url {url}: names no host; such as https://pictures.example.org"
            )
    elif folder is not None and host in ("0.0.0.0", "::"):  # noqa: S104 -- a comparison
        raise UserError(
            f"--store-dir: at --host {host} the images' URLs need an address: give --public-url"
        )


def _resolve_store(
    arguments: argparse.Namespace, choice: ModelChoice, fronts: int
) -> tuple[int, int | None]:
    """How many images are kept, and how many bytes they may have together; None: no limit."""
    stored = _at_least(arguments, "store_images", STORED_IMAGES, 1)
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
    return stored, stored_bytes


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
    """The keys. Where others can reach the service, they must be too long to be guessed."""
    others = not is_loopback(host)
    if given is None:
        if others:
            way = f"set a key ({ENVIRONMENT}API_KEY), or use {HOST}"
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


def _resolve_timeouts(arguments: argparse.Namespace) -> Timeouts:
    def seconds(name: str, default: float | None, least: float = 0) -> float:
        value: float = _or(getattr(arguments, name), default)
        if not least <= value <= _LONGEST_WAIT:
            raise UserError(
                f"--{name.replace('_', '-')} {value:g}: must be {least:g} to {_LONGEST_WAIT:.0f}"
            )
        return value

    return Timeouts(
        queue=seconds("queue_timeout", TIMEOUTS.queue) or None,
        run=seconds("request_timeout", TIMEOUTS.run) or None,
        step=seconds("step_timeout", TIMEOUTS.step, 1),
        shutdown=seconds("shutdown_timeout", TIMEOUTS.shutdown),
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
