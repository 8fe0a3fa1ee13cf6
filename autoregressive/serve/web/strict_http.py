"""HTTP/1.1 read more strictly than h11 does. It refuses bytes that h11 accepts leniently, and that
another program on the way may read differently.

Two programs that disagree about where a request ends can be made to take one client's request for
another's (request smuggling).
"""

import re

import h11
from h11._receivebuffer import ReceiveBuffer

# A request's line, its headers, and an empty line; or trailers. Once it is read, a header of four
# bytes takes a hundred times as much.
_MOST_LINES = 102
_MOST_CHUNK_LINE_BYTES = 256  # a chunk's size and its extensions, which are not used
# A line feed without a return before it, a return without a line feed behind it, and a header that
# goes on in the next line.
_LENIENT = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
# RFC 9112, section 7.1; h11 takes white space behind the size, and any byte but a line feed in an
# extension.
_CHUNK_LINE = re.compile(rb"[0-9A-Fa-f]{1,16}(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")


class StrictReceiveBuffer(ReceiveBuffer):
    """The bytes that are not read yet; refuses those that h11 would let pass."""

    _is_head = False  # whether headers are being taken out

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """A request's line and headers, or the trailers of a body in chunks."""
        self._is_head = True
        try:
            return super().maybe_extract_lines()
        finally:
            self._is_head = False

    def maybe_extract_next_line(self) -> bytearray | None:
        """The line before a chunk."""
        line = super().maybe_extract_next_line()
        if line is not None and (
            len(line) > _MOST_CHUNK_LINE_BYTES or not _CHUNK_LINE.fullmatch(line)
        ):
            raise h11.LocalProtocolError("malformed line before a chunk")
        return line

    def _extract(self, count: int) -> bytearray:
        taken = super()._extract(count)
        if self._is_head and _LENIENT.search(taken):
            raise h11.LocalProtocolError("a line does not end as it should, or is folded")
        if self._is_head and taken.count(b"\n") > _MOST_LINES:
            raise h11.LocalProtocolError("too many headers", error_status_hint=431)
        return taken


def read_strictly(connection: h11.Connection) -> None:
    """Puts the strict buffer into a new connection; h11 has no setting for it."""
    assert not connection._receive_buffer, "something has been read already"
    connection._receive_buffer = StrictReceiveBuffer()
