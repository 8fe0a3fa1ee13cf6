"""The service's settings: its flags, checked together and with their defaults."""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from autoregressive.cli.flags import model_options
from autoregressive.errors import SettingError, SettingName, UserError
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine_flags import engine_config
from autoregressive.serve.web.clients import is_loopback
from autoregressive.serve.web.connections import connection_limit
from autoregressive.serve.web.server_flags import ENVIRONMENT, SERVICE_FLAGS, TIMEOUT_FLAGS
from autoregressive.serve.web.store import largest_picture_bytes
from autoregressive.serve.web.timeouts import Timeouts
from autoregressive.weights.finding import ModelSettings, check_ranks, resolve_model

_LEAST_KEY = 16  # characters of a key, where others can reach the service
_MAKES_A_KEY = 'this makes one: python -c "import secrets; print(secrets.token_hex(16))"'
_LONGEST_NAME = 200  # of the model, as in a request


@dataclass(frozen=True)
class ServerSettings:
    """The service as its flags describe it."""

    model: ModelSettings
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
        return None if self.public_url is None else urlsplit(self.public_url).hostname


def resolve_server_settings(arguments: argparse.Namespace) -> ServerSettings:
    """Fills in defaults and checks everything that can be checked without loading weights.

    Raises:
        UserError: as `resolve_settings`, or others could use the service without a key.
    """
    model = resolve_model(model_options(arguments))
    said: dict[str, Any] = {
        setting: flag.resolve(setting, getattr(arguments, setting))
        for setting, flag in {**SERVICE_FLAGS, **TIMEOUT_FLAGS}.items()
    }
    host, folder, engines = said["host"], said["store_dir"], said["data_parallel_size"]
    keys = _resolve_keys(said["api_key"], host)
    _require(
        # whether the system can be asked for it
        host.isprintable() and host != "" and _parses(lambda name: name.encode("idna"), host),
        "host",
        host,
        "is neither an address nor a name; 0.0.0.0 is every IPv4 address, :: every IPv6 one",
    )
    _check_proxies(said["forwarded_allow_ips"])
    engine = replace(
        engine_config(arguments, EngineConfig.max_num_seqs),
        scheduling_policy=said["scheduling_policy"],
    )
    if engines > 1:
        _check_gpus(model, engines)
    check_ranks(model, engine.tensor_parallel_size, engines)
    _check_addresses(folder, said["public_url"], host)
    fronts = said["api_server_count"] or engines
    stored_bytes = _stored_bytes(arguments, model, said["store_images"], fronts)
    name = model.gpt_model if said["served_model_name"] is None else said["served_model_name"]
    _require(
        name.isprintable() and name.strip() and len(name) <= _LONGEST_NAME,
        "served_model_name",
        name,
        f"must be printable, not empty, and at most {_LONGEST_NAME} characters",
    )
    return ServerSettings(
        model=model,
        engine=engine,
        engines=engines,
        fronts=fronts,
        name=name,
        host=host,
        port=said["port"],
        api_keys=keys,
        max_queue_size=said["max_queue_size"],
        forwarded_allow_ips=said["forwarded_allow_ips"],
        max_connections=connection_limit(said["max_connections"], engines + fronts),
        max_buffered_bytes=said["max_buffered_mib"] * 2**20,
        timeouts=Timeouts(
            queue=said["queue_timeout"] or None,
            run=said["request_timeout"] or None,
            step=said["step_timeout"],
            shutdown=said["shutdown_timeout"],
        ),
        store=folder,
        stored_images=said["store_images"],
        stored_bytes=stored_bytes,
        public_url=said["public_url"],
        docs=not arguments.disable_docs,
        log_level=said["log_level"],
    )


def _require(holds: object, setting: str, said: object, *problem: str | SettingName) -> None:
    """Raises a `UserError` about a setting unless a condition holds.

    Args:
        said: its value; None: the message does not show it.
    """
    if not holds:
        raise UserError(SettingName(setting), ": " if said is None else f" {said}: ", *problem)


def _resolve_keys(given: str | None, host: str) -> tuple[str, ...]:
    """The keys. Where others can reach the service, they must be too long to be guessed."""
    others = not is_loopback(host)
    if given is None:
        _require(
            not others,
            "host",
            host,
            f"others can reach this address, so set a key ({ENVIRONMENT}API_KEY), or use "
            f"{SERVICE_FLAGS['host'].default}; {_MAKES_A_KEY}",
        )
        return ()
    keys = tuple(dict.fromkeys(key.strip() for key in given.split(",")))
    _require(
        _is_header_text(given) and "" not in keys,
        "api_key",
        None,
        "must be printable ASCII, not empty, and without spaces around it; commas separate several "
        "keys",
    )
    _require(
        not others or min(map(len, keys)) >= _LEAST_KEY,
        "api_key",
        None,
        f"others can reach {host}, so a key must have at least {_LEAST_KEY} characters; "
        f"{_MAKES_A_KEY}",
    )
    return keys


def _check_proxies(said: str | None) -> None:
    """Checks addresses of proxies: uvicorn takes a misspelt one for a name, and trusts no proxy."""
    networks = [] if said in (None, "*") else said.split(",")
    _require(
        all(_parses(ip_network, network.strip()) for network in networks),
        "forwarded_allow_ips",
        said,
        "must be addresses or networks, separated by commas, such as 10.0.0.7,10.1.0.0/16, or * "
        "alone",
    )


def _check_gpus(model: ModelSettings, engines: int) -> None:
    device, count, setting = model.device, torch.cuda.device_count(), "data_parallel_size"
    _require(
        device.type == "cuda",
        setting,
        engines,
        f"takes {engines} GPUs, and this is a CPU; leave it out",
    )
    _require(
        device.index in (None, 0),
        setting,
        engines,
        "takes GPUs from cuda:0 on; leave ",
        SettingName("device"),
        f" {device} out",
    )
    _require(count >= engines, setting, engines, f"there are {count} GPUs here")


def _check_addresses(folder: Path | None, url: str | None, host: str) -> None:
    _require(
        folder is None or os.path.isdir(folder),  # `StoreClaim` looks whether it can write
        "store_dir",
        None,
        f"there is no folder {folder}; make it first, or choose another",
    )
    if url is not None:
        _require(
            url.startswith(("http://", "https://")) and _is_header_text(url) and " " not in url,
            "public_url",
            url,
            "must begin with http:// or https://, and be ASCII without spaces",
        )
        _require(
            _parses(urlsplit, url) and urlsplit(url).hostname,
            "public_url",
            url,
            "names no host; such as https://pictures.example.org",
        )
    elif folder is not None:
        _require(
            host not in ("0.0.0.0", "::"),  # noqa: S104 -- compared with
            "store_dir",
            None,
            "at ",
            SettingName("host"),
            f" {host} the images' URLs need an address: give ",
            SettingName("public_url"),
        )


def _stored_bytes(
    arguments: argparse.Namespace, model: ModelSettings, images: int, fronts: int
) -> int | None:
    """How many bytes the stored images may have together, once all that is said about the store
    goes together.
    """
    _require(
        images >= fronts,
        "store_images",
        images,
        "must be at least ",
        SettingName("api_server_count"),
        f", {fronts}: each process keeps a share",
    )
    stored_bytes = None
    if (text := arguments.store_max_size) is not None:
        size = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text.upper(), re.ASCII)
        if size is None:
            raise SettingError(
                "store_max_size",
                text,
                "must be a number of bytes, or of K, M, G or T, such as 10G",
            )
        stored_bytes = int(size[1]) * 1024 ** " KMGT".index(size[2] or " ")
        least = fronts * largest_picture_bytes(model.image_size)
        _require(
            stored_bytes >= least,
            "store_max_size",
            text,
            f"must be at least {-(-least // 1024)}K: an image for each ",
            SettingName("api_server_count"),
        )
    for setting in ("store_images", "store_max_size"):
        if getattr(arguments, setting) is not None and arguments.store_dir is None:
            raise UserError(
                SettingName(setting),
                " goes with ",
                SettingName("store_dir"),
                ", the folder that images are stored in",
            )
    return stored_bytes


def _is_header_text(text: str) -> bool:
    """Whether it comes through an HTTP header as it is."""
    return text.isascii() and text.isprintable() and text == text.strip() != ""


def _parses(parse: Callable[[str], object], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True
