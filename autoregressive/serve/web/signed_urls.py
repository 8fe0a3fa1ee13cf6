"""URLs of stored images that open in a browser, which sends no key: they are signed, and expire.

The signature is an HMAC over the name of the image and the time at which the URL expires. So a URL
can be checked without a list of those that were given out, by any process that has the key.
"""

import hashlib
import hmac
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from autoregressive.serve.web.api_errors import ApiError

FILES_PATH = "/v1/files/"
DEFAULT_LIFETIME = 3600  # seconds, as of OpenAI's


class UrlSigner:
    """Signs URLs, and lets in requests for signed ones.

    Args:
        key: processes and services with the same key accept the URLs of each other.
        lifetime: seconds after which a URL expires.
        clock: gives Unix time.
    """

    def __init__(self, key: str, lifetime: int, clock: Callable[[], float] = time.time) -> None:
        self._key, self._lifetime, self._clock = key.encode(), lifetime, clock

    def signed(self, url: str) -> str:
        """The URL of an image, from the one that needs a key."""
        expires = str(int(self._clock()) + self._lifetime)
        return f"{url}?expires={expires}&signature={self._sign(url.rsplit('/', 1)[1], expires)}"

    def admits(self, scope: Any) -> bool:
        """Whether a request is for a signed URL, and so needs nothing else.

        Args:
            scope: of the ASGI request.

        Raises:
            ApiError: the signature is wrong, or the URL has expired.
        """
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if not scope["path"].startswith(FILES_PATH) or "signature" not in query:
            return False
        # Of two values the route would read another one than the one that is checked here.
        given = [*query.get("expires", []), *query["signature"]]
        expires, signature = given if len(given) == 2 else ("", "")
        expected = self._sign(scope["path"].removeprefix(FILES_PATH), expires)
        # first, so that nobody learns anything about a URL that was not given out
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            raise ApiError(403, "the signature of this URL is wrong", "invalid_signature")
        if self.seconds_left(expires) <= 0:
            raise ApiError(403, "this URL has expired: ask for the image again", "expired_url")
        return True

    def seconds_left(self, expires: str) -> int:
        """Until a URL expires whose signature is right."""
        return int(expires) - int(self._clock())

    def _sign(self, name: str, expires: str) -> str:
        return hmac.new(self._key, f"{name}\n{expires}".encode(), hashlib.sha256).hexdigest()
