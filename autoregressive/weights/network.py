"""The environment's variables by which libraries find proxies, certificates and the hub, checked
before a download.

A library that reads a malformed one raises an error of any kind, some libraries at import, and does
not name the variable.
"""

import os
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx2

_PROXY_ADVICE = (
    "is no proxy that can be used; give http://, https://, socks5:// or "
    "socks5h://HOST:PORT, or unset it"
)
_ADDRESS_ADVICE = "is no web address; give one such as https://huggingface.co"

_MOST_DIGITS = 9  # of seconds; a socket takes no timeout of ten digits
_SECONDS_ADVICE = (
    f"must be a whole number of seconds, of at most {_MOST_DIGITS} digits; correct it, or unset it"
)


def unusable_variable(endpoint: str | None) -> str | None:
    """The first variable that no download can work with, and what to do; None: there is none.

    The message has no value in it: a proxy's address may hold a password.

    Args:
        endpoint: the hub's address, where it was given as a flag.
    """
    if endpoint is not None and not _is_address(endpoint):
        return f"--endpoint: {_ADDRESS_ADVICE}"
    for name, is_usable, advice in _CHECKS:
        value = os.environ.get(name)
        overruled = is_usable is _is_proxy and name.isupper() and name.lower() in os.environ
        if value and not overruled and not is_usable(value):
            return f"{name}: {advice}"
    return None


def _is_proxy(value: str) -> bool:
    address = value if "://" in value else f"http://{value}"
    try:
        httpx2.Proxy(address)  # knows which schemes there are
        return bool(urlsplit(address).hostname) and urlsplit(address).port != 0
    except (ValueError, httpx2.InvalidURL):
        return False


def _is_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and _is_header_text(value)
        )
    except ValueError:
        return False


def _has_certificates(value: str) -> bool:
    try:
        ssl.create_default_context(cafile=value)
    except OSError:  # also OpenSSL's own errors
        return False
    return True


def _has_folder(value: str) -> bool:
    # OpenSSL passes over the others
    return any(os.path.isdir(folder) for folder in value.split(os.pathsep))


def _is_seconds(value: str) -> bool:
    return value.isdecimal() and len(value) <= _MOST_DIGITS and int(value) > 0


def _is_header_text(value: str) -> bool:
    return value.isascii() and value.isprintable() and " " not in value


_CHECKS: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    *((name, _is_proxy, _PROXY_ADVICE) for name in ("http_proxy", "https_proxy", "all_proxy")),
    *((name, _is_proxy, _PROXY_ADVICE) for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")),
    (
        "SSL_CERT_FILE",
        _has_certificates,
        "names no file with certificates; correct it, or unset it",
    ),
    ("SSL_CERT_DIR", _has_folder, "names no folder; correct it, or unset it"),
    ("HF_ENDPOINT", _is_address, _ADDRESS_ADVICE),
    ("HF_HUB_ETAG_TIMEOUT", _is_seconds, _SECONDS_ADVICE),
    ("HF_HUB_DOWNLOAD_TIMEOUT", _is_seconds, _SECONDS_ADVICE),
    ("HF_HUB_USER_AGENT_ORIGIN", _is_header_text, "must be ASCII without spaces"),
)
