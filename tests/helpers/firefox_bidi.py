#!/usr/bin/env python3
"""Debian's Firefox for Playwright, which starts this program in its place.

Playwright drives a Firefox that is not its own build by WebDriver BiDi. For every context it sends
a command that Firefox ESR does not know, and gives up. This program starts Firefox, stands between
the two, and answers that command itself. The rest passes as it is.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

UNKNOWN = b'"method":"emulation.setMediaFeaturesOverride"'
LISTENING = re.compile(rb"(WebDriver BiDi listening on ws://127\.0\.0\.1:)(\d+)")


class Frames:
    """WebSocket frames from a socket."""

    def __init__(self, source: socket.socket) -> None:
        self._file = source.makefile("rb")

    def head(self) -> bytes:
        """The HTTP head that the frames follow."""
        lines = [self._read_line()]
        while lines[-1] not in (b"\r\n", b""):
            lines.append(self._read_line())
        return b"".join(lines)

    def _read_line(self) -> bytes:
        return self._file.readline()

    def next_frame(self) -> tuple[bytes, bytes]:
        """The bytes of a frame, and its content; nothing at the end."""
        start = self._file.read(2)
        if len(start) < 2:
            return b"", b""
        length, more = start[1] & 127, b""
        if length >= 126:
            more = self._file.read(2 if length == 126 else 8)
            length = int.from_bytes(more)
        mask = self._file.read(4) if start[1] & 128 else b""
        content = masked = self._file.read(length)
        if mask:
            key = int.from_bytes((mask * (length // 4 + 1))[:length])
            content = (int.from_bytes(masked) ^ key).to_bytes(length)
        return start + more + mask + masked, content


def text_frame(text: bytes) -> bytes:
    assert len(text) < 126
    return bytes([0x81, len(text)]) + text


def pass_on(client: socket.socket, port: int) -> None:
    """Passes a connection on to Firefox until one side closes it."""
    firefox = socket.create_connection(("127.0.0.1", port))
    sending = threading.Lock()  # an answer of ours does not cut a frame of Firefox's in two

    def to_client() -> None:
        frames = Frames(firefox)
        client.sendall(frames.head())
        while frame := frames.next_frame()[0]:
            with sending:
                client.sendall(frame)
        client.close()

    frames = Frames(client)
    host = f"Host: 127.0.0.1:{port}".encode()
    firefox.sendall(re.sub(rb"(?i)host: [^\r]*", host, frames.head(), count=1))
    threading.Thread(target=to_client, daemon=True).start()
    while True:
        frame, content = frames.next_frame()
        if not frame:
            break
        if UNKNOWN in content:
            answer = {"type": "success", "id": json.loads(content)["id"], "result": {}}
            with sending:
                client.sendall(text_frame(json.dumps(answer).encode()))
        else:
            firefox.sendall(frame)
    firefox.close()


def main() -> int:
    command = shutil.which("firefox-esr")
    assert command is not None
    firefox = subprocess.Popen([command, *sys.argv[1:]], stderr=subprocess.PIPE)
    signal.signal(signal.SIGTERM, lambda *_: firefox.terminate())
    listener = socket.create_server(("127.0.0.1", 0))
    assert firefox.stderr is not None

    def serve(port: int) -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=pass_on, args=(client, port), daemon=True).start()

    for line in firefox.stderr:
        if (found := LISTENING.search(line)) is not None:
            threading.Thread(target=serve, args=(int(found[2]),), daemon=True).start()
            ours = str(listener.getsockname()[1]).encode()
            line = LISTENING.sub(rb"\g<1>" + ours, line)
        os.write(2, line)
    return firefox.wait()


if __name__ == "__main__":
    sys.exit(main())
