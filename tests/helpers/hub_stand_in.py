"""A stand-in of the hub on the loopback address: it describes one file, sends it, and breaks off
when told to.
"""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from autoregressive.weights.published import PUBLISHED_FILES

FILE = PUBLISHED_FILES[0]
CONTENT = bytes(range(256)) * 2000


@dataclass
class Hub:
    """What the stand-in serves, and what it was asked for."""

    endpoint: str = ""
    content: bytes = CONTENT
    stated_etag: str = ""
    cut_at: int | None = None  # close the connection after so many bytes of content
    cut_after: int | None = None  # close each connection after so many bytes of content
    ranges: bool = True
    shift: int = 0  # send what begins so many bytes later than asked for
    stated_size: int = 0
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range

    def describe(self, content: bytes) -> None:
        """States this file, whatever is sent."""
        self.stated_etag, self.stated_size = (
            f'"{hashlib.sha256(content).hexdigest()}"',
            len(content),
        )

    def downloads(self) -> list[str | None]:
        return [
            asked
            for method, path, asked in self.requests
            if method == "GET" and path.startswith("/cdn/")
        ]


def make_handler(hub: Hub, storage_address: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.respond(with_content=False)

        def do_GET(self) -> None:
            self.respond(with_content=True)

        def respond(self, with_content: bool) -> None:
            asked = self.headers["Range"]
            hub.requests.append((self.command, self.path, asked))
            if self.path == f"/FoundationVision/LlamaGen/resolve/main/{FILE.file_name}":
                # Large files: the hub describes them and sends the client elsewhere for the
                # content.
                self.send_response(302)
                self.send_header("Location", f"{storage_address[0]}/cdn/content")
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("X-Linked-Etag", hub.stated_etag)
                self.send_header("X-Linked-Size", str(hub.stated_size))
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif self.path.startswith("/cdn/"):
                self.send_content(asked if hub.ranges else None, with_content)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def send_content(self, asked: str | None, with_content: bool) -> None:
            match = re.fullmatch(r"bytes=(\d+)-", asked or "")
            first = int(match[1]) + hub.shift if match else 0
            self.send_response(206 if match else 200)
            if match:
                self.send_header(
                    "Content-Range", f"bytes {first}-{len(hub.content) - 1}/{len(hub.content)}"
                )
            self.send_header("Content-Length", str(len(hub.content) - first))
            self.end_headers()
            if with_content:
                end = hub.cut_at if hub.cut_after is None else first + hub.cut_after
                self.wfile.write(hub.content[first:end])
                self.close_connection = end is not None

    return Handler


@contextmanager
def running_hub(content: bytes = CONTENT) -> Iterator[Hub]:
    """Two servers: the hub, and where it keeps content."""
    hub, storage_address = Hub(content=content), [""]
    hub.describe(content)
    handler = make_handler(hub, storage_address)
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.endpoint, storage_address[0] = (
        f"http://127.0.0.1:{server.server_port}" for server in servers
    )
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
