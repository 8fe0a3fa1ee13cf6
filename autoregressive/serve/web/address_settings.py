"""What the flags say about where the service is: its address, its certificate, the URLs that
clients use, the proxies before it, and the sites that may use it.
"""

import re
import ssl
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from pathlib import Path
from urllib.parse import urlsplit

from autoregressive.errors import SettingName, UserError, missing_extra

_MOST_SOCKET_BYTES = 107  # of a Unix socket's path, on Linux
_ROOT_PATH = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+")
# What the service's own paths begin with. Below one of these, nobody could tell whether a proxy has
# removed the prefix.
OWN_PATHS = frozenset(
    {
        "docs",
        "docs-assets",
        "health",
        "metrics",
        "openapi.json",
        "ping",
        "ready",
        "static",
        "v1",
        "version",
    }
)
# Browsers leave out the port that a scheme has anyway.
_ORIGIN = re.compile(
    r"(?!http:.*:80$|https:.*:443$)https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
)


def require(holds: object, setting: str, said: object, *problem: str | SettingName) -> None:
    """Raises a `UserError` about a setting unless a condition holds.

    Args:
        said: its value; None: the message does not show it.
    """
    if not holds:
        raise UserError(SettingName(setting), ": " if said is None else f" {said}: ", *problem)


def is_header_text(text: str) -> bool:
    """Whether it comes through an HTTP header as it is."""
    return text.isascii() and text.isprintable() and text == text.strip() != ""


def parses(parse: Callable[[str], object], text: str) -> bool:
    """Whether a function takes a text."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _port(url: str) -> int | None:
    return urlsplit(url).port


def check_host_name(host: str) -> None:
    """Checks whether the system can be asked for it.

    Raises:
        UserError: it is neither an address nor a name.
    """
    require(
        host.isprintable() and host != "" and parses(lambda name: name.encode("idna"), host),
        "host",
        host,
        "is neither an address nor a name; 0.0.0.0 is every IPv4 address, :: every IPv6 one",
    )


def check_socket_path(path: Path | None) -> None:
    """Checks the place of a Unix socket.

    Raises:
        UserError: no socket can be there.
    """
    if path is None:
        return
    require(path.parent.is_dir(), "uds", path, f"there is no folder {path.parent}; make it first")
    require(not path.is_dir(), "uds", path, "is a folder; name a socket in it")
    require(
        len(bytes(path)) <= _MOST_SOCKET_BYTES,
        "uds",
        path,
        f"the path of a Unix socket has at most {_MOST_SOCKET_BYTES} bytes",
    )


def checked_certificate(
    certificate: Path | None, key: Path | None
) -> tuple[Path, Path | None] | None:
    """The files for HTTPS; None: HTTP.

    Raises:
        UserError: they cannot be read, or do not belong together.
    """
    if certificate is None:
        if key is not None:
            raise UserError(SettingName("ssl_keyfile"), " goes with ", SettingName("ssl_certfile"))
        return None
    for setting, file in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        require(file is None or file.is_file(), setting, file, "there is no such file")
    try:
        # without the empty password, a key that has one would wait at the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
    except (OSError, ValueError) as error:
        raise UserError(
            SettingName("ssl_certfile"),
            f" {certificate}: cannot be used ({getattr(error, 'reason', None) or error}); it must "
            "be a chain of certificates in PEM, with the key in it or in ",
            SettingName("ssl_keyfile"),
            ", and no password",
        ) from error
    return certificate, key


def checked_root_path(said: str | None) -> str:
    """The path that the service is below, without a slash at its end; empty: none.

    Raises:
        UserError: it is no such path.
    """
    path = (said or "").rstrip("/")
    require(
        path == "" or _ROOT_PATH.fullmatch(path),
        "root_path",
        said,
        "must be the beginning of a path, of letters, digits and -._~, such as /images",
    )
    begins = path[1:].split("/")[0]
    require(
        begins not in OWN_PATHS,
        "root_path",
        said,
        f"/{begins} is a path of the service itself; take another, such as /images",
    )
    return path


def checked_origins(said: Sequence[str] | None) -> tuple[str, ...]:
    """The sites whose pages may use the service.

    Raises:
        UserError: one of them is not written as browsers send it.
    """
    for origin in said or ():
        require(
            origin == "*" or (_ORIGIN.fullmatch(origin) and parses(_port, origin)),
            "allowed_origins",
            origin,
            "must be as browsers send it, https://app.example.org or http://localhost:3000, in "
            "small letters and without a path or the usual port, or *",
        )
    return tuple(dict.fromkeys(said or ()))


def check_proxies(said: str | None) -> None:
    """Checks addresses of proxies: uvicorn takes a misspelt one for a name, and trusts no proxy.

    Raises:
        UserError: one of them is no address.
    """
    networks = [] if said in (None, "*") else said.split(",")
    require(
        all(parses(ip_network, network.strip()) for network in networks),
        "forwarded_allow_ips",
        said,
        "must be addresses or networks, separated by commas, such as 10.0.0.7,10.1.0.0/16, or * "
        "alone",
    )


def check_url(setting: str, url: str | None, example: str) -> None:
    """Checks a URL of HTTP.

    Raises:
        UserError: it is none.
    """
    if url is None:
        return
    require(
        url.startswith(("http://", "https://")) and is_header_text(url) and " " not in url,
        setting,
        url,
        "must begin with http:// or https://, and be ASCII without spaces",
    )
    require(
        parses(_port, url) and urlsplit(url).hostname,
        setting,
        url,
        f"names no host, or no right port; such as {example}",
    )


def check_public_url(url: str | None) -> None:
    """Checks what the URLs of stored images begin with.

    Raises:
        UserError: it is no URL, or a path behind it would not be one.
    """
    check_url("public_url", url, "https://pictures.example.org")
    require(
        url is None or not {"?", "#"} & set(url),
        "public_url",
        url,
        "must have no ? and no #, because paths follow it",
    )


def check_traces_endpoint(url: str | None) -> None:
    """Checks the URL that traces are sent to, and whether the packages that send them are there.

    Raises:
        UserError: it is no URL, or a package is missing.
    """
    check_url("otlp_traces_endpoint", url, "http://127.0.0.1:4318/v1/traces")
    if url is None:
        return
    try:
        import autoregressive.serve.web.traces  # noqa: F401 -- whether it can be
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        raise UserError(SettingName("otlp_traces_endpoint"), ": ", *missing.parts) from error


def check_store_has_urls(url: str | None, host: str, socket_path: Path | None) -> None:
    """Checks that stored images can be given an address.

    Raises:
        UserError: nothing says which.
    """
    if url is not None:
        return
    where: tuple[str | SettingName, ...] = (SettingName("host"), f" {host}")
    if socket_path is not None:
        where = (SettingName("uds"),)
    require(
        socket_path is None and host not in ("0.0.0.0", "::"),  # noqa: S104 -- compared with
        "store_dir",
        None,
        "at ",
        *where,
        " the images' URLs need an address: give ",
        SettingName("public_url"),
    )
