"""The service's settings: its flags, checked together and with their defaults."""

import argparse
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from autoregressive.cli.flags import model_options
from autoregressive.errors import SettingError, SettingName, UserError
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine_flags import engine_config
from autoregressive.serve.web.address_settings import (
    check_host_name,
    check_proxies,
    check_public_url,
    check_socket_path,
    check_store_has_urls,
    check_traces_endpoint,
    checked_certificate,
    checked_origins,
    checked_root_path,
    is_header_text,
    require,
)
from autoregressive.serve.web.clients import is_loopback
from autoregressive.serve.web.connections import connection_limit
from autoregressive.serve.web.server_flags import ENVIRONMENT, SERVICE_FLAGS, TIMEOUT_FLAGS
from autoregressive.serve.web.store import largest_picture_bytes
from autoregressive.serve.web.timeouts import Timeouts
from autoregressive.serve.web.tolerance import Tolerance
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
    names: tuple[str, ...]  # of the model, for clients; answers have the first
    host: str
    port: int
    socket_path: Path | None  # of a Unix socket, instead of host and port
    # The file of the chain, and that of its key unless it is in the same; None: HTTP.
    certificate: tuple[Path, Path | None] | None
    root_path: str  # what the service is below, without a slash at the end
    allowed_origins: tuple[str, ...]  # sites whose pages may use the service
    api_keys: tuple[str, ...]  # clients send one of them; none: every client may use the service
    max_queue_size: int
    forwarded_allow_ips: str | None  # proxies whose X-Forwarded-For counts; None: none
    max_connections: int  # of each process that answers HTTP
    max_buffered_bytes: int  # likewise
    timeouts: Timeouts
    store: Path | None
    stored_images: int
    stored_bytes: int | None  # None: no limit
    url_key: str  # signs the URLs of stored images, in all processes
    url_lifetime: int  # seconds
    public_url: str | None  # None: where the service listens
    docs: bool
    tolerance: Tolerance
    log_level: str
    traces_endpoint: str | None  # the whole URL of a collector; None: nothing is traced
    quiet_paths: frozenset[str]  # whose requests have a line in the log only after an error

    def base_url(self, address: str) -> str:
        """What the URLs of stored images begin with.

        Args:
            address: where the service listens.
        """
        url = (self.public_url or address).rstrip("/")
        return url if urlsplit(url).path.endswith(self.root_path) else url + self.root_path

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
    keys = _resolve_keys(said["api_key"], "localhost" if said["uds"] else host)
    check_host_name(host)
    check_socket_path(said["uds"])
    check_proxies(said["forwarded_allow_ips"])
    engine = replace(
        engine_config(arguments, EngineConfig.max_num_seqs),
        scheduling_policy=said["scheduling_policy"],
    )
    if engines > 1:
        _check_gpus(model, engines)
    check_ranks(model, engine.tensor_parallel_size, engines)
    check_public_url(said["public_url"])
    check_traces_endpoint(said["otlp_traces_endpoint"])
    if folder is not None:
        # `StoreClaim` looks whether it can write
        why = f"there is no folder {folder}; make it first, or choose another"
        require(os.path.isdir(folder), "store_dir", None, why)
        check_store_has_urls(said["public_url"], host, said["uds"])
    elif said["default_response_format"] == "url":
        raise UserError(
            SettingName("default_response_format"), " url goes with ", SettingName("store_dir")
        )
    fronts = said["api_server_count"] or engines
    stored_bytes = _stored_bytes(arguments, model, said["store_images"], fronts)
    return ServerSettings(
        model=model,
        engine=engine,
        engines=engines,
        fronts=fronts,
        names=_checked_names(said["served_model_name"] or [model.gpt_model]),
        host=host,
        port=said["port"],
        socket_path=said["uds"],
        certificate=checked_certificate(said["ssl_certfile"], said["ssl_keyfile"]),
        root_path=checked_root_path(said["root_path"]),
        allowed_origins=checked_origins(said["allowed_origins"]),
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
        url_key=_checked_url_key(said["url_signing_key"]),
        url_lifetime=said["url_lifetime"],
        public_url=said["public_url"],
        docs=not arguments.disable_docs,
        tolerance=Tolerance(
            ignore_unknown_fields=arguments.ignore_unknown_fields,
            allow_any_size=arguments.allow_any_size,
            allow_any_model=arguments.allow_any_model,
            response_format=said["default_response_format"],
        ),
        log_level=said["log_level"],
        traces_endpoint=said["otlp_traces_endpoint"],
        quiet_paths=_checked_paths(said["disable_access_log_for"] or []),
    )


def _checked_url_key(said: str | None) -> str:
    require(
        said is None or (is_header_text(said) and len(said) >= _LEAST_KEY),
        "url_signing_key",
        None,
        f"must be printable ASCII of at least {_LEAST_KEY} characters; {_MAKES_A_KEY}",
    )
    return said or secrets.token_hex(32)


def _checked_names(said: Sequence[str]) -> tuple[str, ...]:
    for name in said:
        require(
            name.isprintable() and name.strip() and len(name) <= _LONGEST_NAME,
            "served_model_name",
            name,
            f"must be printable, not empty, and at most {_LONGEST_NAME} characters",
        )
    return tuple(dict.fromkeys(said))


def _checked_paths(said: Sequence[str]) -> frozenset[str]:
    for path in said:
        require(
            path.startswith("/") and is_header_text(path) and "," not in path,
            "disable_access_log_for",
            path,
            "must be a path of the service, such as /health; spaces separate several",
        )
    return frozenset(said)


def _resolve_keys(given: str | None, host: str) -> tuple[str, ...]:
    """The keys. Where others can reach the service, they must be too long to be guessed."""
    others = not is_loopback(host)
    if given is None:
        require(
            not others,
            "host",
            host,
            f"others can reach this address, so set a key ({ENVIRONMENT}API_KEY), or use "
            f"{SERVICE_FLAGS['host'].default}; {_MAKES_A_KEY}",
        )
        return ()
    keys = tuple(dict.fromkeys(key.strip() for key in given.split(",")))
    require(
        is_header_text(given) and "" not in keys,
        "api_key",
        None,
        "must be printable ASCII, not empty, and without spaces around it; commas separate several "
        "keys",
    )
    require(
        not others or min(map(len, keys)) >= _LEAST_KEY,
        "api_key",
        None,
        f"others can reach {host}, so a key must have at least {_LEAST_KEY} characters; "
        f"{_MAKES_A_KEY}",
    )
    return keys


def _check_gpus(model: ModelSettings, engines: int) -> None:
    device, count, setting = model.device, torch.cuda.device_count(), "data_parallel_size"
    if device.type == "cpu":
        return
    require(
        device.index in (None, 0),
        setting,
        engines,
        "takes GPUs from cuda:0 on; leave ",
        SettingName("device"),
        f" {device} out",
    )
    require(count >= engines, setting, engines, f"there are {count} GPUs here")


def _stored_bytes(
    arguments: argparse.Namespace, model: ModelSettings, images: int, fronts: int
) -> int | None:
    """How many bytes the stored images may have together, once all that is said about the store
    goes together.
    """
    require(
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
        require(
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
