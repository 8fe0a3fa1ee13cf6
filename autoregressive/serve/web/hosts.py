"""Checks which host a request is for."""

import re
from urllib.parse import unquote

from autoregressive.serve.web.addresses import is_loopback
from autoregressive.serve.web.errors import ApiError
from autoregressive.serve.web.guards import App, Receive, Scope, Send, answer

# An IPv6 address in brackets, or a name or an IPv4 address; with or without a port.
_HOST = re.compile(rb"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+?)\.?)(?::[0-9]*)?", re.IGNORECASE)
_URL = re.compile(rb"https?://([^/]*)(/.*)?", re.IGNORECASE)


class WholeUrls:
    """Accepts a whole URL in the place of the path (the "absolute form").

    The URL's host then replaces the Host header. RFC 9112, section 3.2.2, demands both of a server.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and (url := _URL.fullmatch(scope["raw_path"])) is not None:
            host, path = url[1], url[2] or b"/"
            scope["raw_path"], scope["path"] = path, unquote(path.decode("ascii"))
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope["headers"] = [(b"host", host), *others]
        await self._app(scope, receive, send)


class KnownHosts:
    """Answers requests for this machine's own names and for one other name, and refuses others.

    The owner of a web page can make its name resolve to 127.0.0.1. The browser then takes the
    service for a part of that page's site, and lets the page read answers (DNS rebinding). But it
    sends the page's name as Host. A client that sends no Host, such as a load balancer's probe in
    HTTP/1.0, is no browser, and is answered.

    starlette's `TrustedHostMiddleware` knows neither networks (127.0.0.0/8) nor this service's
    errors.

    Args:
        public: the other name.
    """

    def __init__(self, app: App, public: str | None) -> None:
        self._app, self._public = app, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or self._knows(scope):
            await self._app(scope, receive, send)
            return
        why = "without a key this service answers to localhost only"
        way = "start it with --api-key, or with --public-url and the URL that clients use"
        await answer(send, ApiError(421, f"{why}: {way}", "unknown_host"))

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1:
            return not given
        host = _HOST.fullmatch(given[0])
        if host is None:
            return False
        name = (host[1] or host[2]).decode("ascii").lower()
        return name == self._public or is_loopback(name)
