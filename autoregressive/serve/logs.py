"""The log of the service and of the processes that it starts: a JSON object a line on stderr.
Nobody waits for it to be read.

`service_logs` makes stderr of the service's process a pipe to itself, which the processes that it
starts inherit. A thread reads it, so that what a library, the interpreter or a dying process prints
becomes a JSON line, too. Another thread writes all lines to where stderr led before; it alone waits
if nobody reads them.
"""

import atexit
import contextlib
import faulthandler
import fcntl
import json
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import TracebackType

_WAITING_BYTES = 4 * 2**20  # of lines that are not written yet; what comes beyond that is dropped
_PIPE_BYTES = 2**20  # of stderr's pipe, or less where the system allows less
_READ_BYTES = 64 * 2**10
_LONGEST_LINE_BYTES = 256 * 2**10  # of what others print
_LAST_LINES_SECONDS = 1.0  # for waiting lines to be written when the process ends
_PLAIN = (
    b"\x00plain\x00"  # a line of stderr's pipe: what follows is for people, and passes as it is
)
_log = logging.getLogger("llamagen.service")


def _line(level: str, logger: str, message: str, created: float, **fields: object) -> str:
    """A line of the log without its end."""
    moment = (
        datetime.fromtimestamp(created, tz=UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )
    return json.dumps(
        {"time": moment, "level": level, "logger": logger, "message": message} | fields, default=str
    )


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, and what the record has in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Writes a record as one line of JSON."""
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        return _line(
            record.levelname.lower(), record.name, record.getMessage(), record.created, **fields
        )


class LineWriter:
    """Writes lines to a descriptor, in a thread of its own. Who puts a line never waits.

    Lines are dropped, and counted, if too many wait because nobody reads, or if they cannot be
    written.

    Args:
        report: the line that is written once lines can be written again, from how many were
            dropped.
    """

    def __init__(self, descriptor: int, report: Callable[[int], bytes] | None = None) -> None:
        self._descriptor, self._report = descriptor, report
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0  # the line that is being written included
        self._dropped = self._reported = 0
        self._torn = False  # the last line was written in part
        self._changed = threading.Condition()
        threading.Thread(target=self._write, name=f"lines to {descriptor}", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Queues a line, which has its end already."""
        with self._changed:
            if self._waiting_bytes + len(line) > _WAITING_BYTES:
                self._dropped += 1
                return
            self._lines.append(line)
            self._waiting_bytes += len(line)
            self._changed.notify_all()

    @property
    def dropped(self) -> int:
        """Lines that were dropped so far."""
        return self._dropped

    def flush(self, timeout: float) -> bool:
        """Waits until all lines are written, at most `timeout` seconds; whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting_bytes == 0, timeout)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines.popleft()
                dropped = self._dropped - self._reported
            if dropped and self._report is not None and self._write_line(self._report(dropped)):
                self._reported += dropped
            written = self._write_line(line)
            with self._changed:
                self._dropped += not written
                self._waiting_bytes -= len(line)
                self._changed.notify_all()

    def _write_line(self, line: bytes) -> bool:
        """Waits until the line is written; whether it could be."""
        left = b"\n" + line if self._torn else line
        whole = len(left)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except (
                BlockingIOError
            ):  # another process has made the same terminal or pipe non-blocking
                select.select([], [self._descriptor], [])
            except OSError:  # the reader has gone, or the disk is full
                self._torn |= len(left) < whole
                return False
        self._torn = False
        return True


class _LineHandler(logging.Handler):
    """Hands records to a `LineWriter`."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Formats it here, for what it refers to may change."""
        try:
            self._writer.put(f"{self.format(record)}\n".encode())
        except Exception:
            self.handleError(record)


def _report_dropped(count: int) -> bytes:
    message = f"{count} lines of the log were dropped: they could not be written"
    return f"{_line('warning', 'llamagen.logs', message, time.time(), dropped=count)}\n".encode()


def _set_levels(level: str) -> None:
    logging.getLogger("llamagen").setLevel(level.upper())
    # What uvicorn warns of is in the line of the request: "Invalid HTTP request received.",
    # "Unsupported upgrade request."
    logging.getLogger("uvicorn").setLevel("ERROR")


def log_our_loggers(level: str) -> None:
    """Only the service's loggers and uvicorn's, in a process that is not the service's own."""
    handler = _LineHandler(LineWriter(sys.stderr.fileno(), _report_dropped))
    for name in ("llamagen", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    _set_levels(level)


def log_everything(descriptor: int, level: str) -> LineWriter:
    """Logs what all loggers, warnings and uncaught exceptions of this process say, as JSON."""
    writer = LineWriter(descriptor, _report_dropped)
    root = logging.getLogger()
    root.handlers = [_LineHandler(writer)]
    root.setLevel("WARNING")
    _set_levels(level)
    logging.captureWarnings(True)

    def log_uncaught(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        _log.critical("the process has ended by an error", exc_info=(kind, error, traceback))

    def log_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and args.exc_type is not SystemExit:
            name = args.thread.name if args.thread is not None else "unknown"
            _log.error(
                "thread %s has ended by an error",
                name,
                exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
            )

    def log_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        message = unraisable.err_msg or "an exception was ignored in"
        error = unraisable.exc_value
        traceback = (type(error), error, unraisable.exc_traceback) if error is not None else None
        _log.error("%s: %r", message, unraisable.object, exc_info=traceback)

    sys.excepthook, threading.excepthook, sys.unraisablehook = (
        log_uncaught,
        log_of_thread,
        log_unraisable,
    )
    return writer


def log_in_child(level: str) -> LineWriter:
    """`log_everything` in a process that the service has started; what it prints on stdout goes the
    same way.
    """
    os.dup2(2, 1)
    faulthandler.enable()
    return log_everything(2, level)


class ServiceLogs:
    """The log, and what the service tells people on stdout. Made by `service_logs`."""

    def __init__(self, level: str) -> None:
        self._stderr = _duplicate(2)
        self._stdout = LineWriter(_duplicate(1))
        source, sink = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.dup2(sink, 2)
        os.close(sink)
        self._source = source
        self._writer = log_everything(self._stderr, level)
        # The last words of a fault like SIGSEGV are plain text: the thread that reads the pipe ends
        # with the process.
        faulthandler.enable(self._stderr)
        self._reading = threading.Thread(target=self._read, name="stderr", daemon=True)
        self._reading.start()
        atexit.register(self._end)

    @property
    def dropped(self) -> int:
        """Lines of the log that were dropped so far."""
        return self._writer.dropped

    def announce(self, message: str) -> None:
        """Tells people, on stdout."""
        # there is none if stdout is closed
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self._stdout.put(f"{message}\n".encode(encoding, errors="backslashreplace"))

    def end_json(self) -> None:
        """What this process prints from now on is for people: an error that they can mend."""
        os.write(2, b"\n" + _PLAIN + b"\n")

    def _end(self) -> None:
        """Writes what waits, unless nobody reads it. The processes that the service started have
        ended.
        """
        with contextlib.suppress(OSError):
            if sys.stderr is not None:
                sys.stderr.flush()
        faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)  # ends the pipe
        os.close(nowhere)
        deadline = time.monotonic() + _LAST_LINES_SECONDS
        self._reading.join(_LAST_LINES_SECONDS)
        if self._writer.flush(max(0.0, deadline - time.monotonic())):
            os.dup2(self._stderr, 2)
        self._stdout.flush(max(0.0, deadline - time.monotonic()))

    def _read(self) -> None:
        unfinished, plain = b"", False
        while chunk := os.read(self._source, _READ_BYTES):
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            if len(unfinished) > _LONGEST_LINE_BYTES:
                lines.append(unfinished)
                unfinished = b""
            for line in lines:
                plain = plain or line == _PLAIN
                self._pass_on(line, plain)
        if unfinished:
            self._pass_on(unfinished, plain)

    def _pass_on(self, line: bytes, plain: bool) -> None:
        if line == _PLAIN or (not plain and not line.strip()):
            return
        if not plain and not _is_json_object(line):
            line = _line(
                "warning", "stderr", line.decode(errors="backslashreplace"), time.time()
            ).encode()
        self._writer.put(line + b"\n")


def _duplicate(descriptor: int) -> int:
    """Another descriptor for the same, which processes that are started do not inherit."""
    try:
        return os.dup(descriptor)
    except OSError:  # it is closed
        return os.open(os.devnull, os.O_WRONLY)


def _is_json_object(line: bytes) -> bool:
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@contextlib.contextmanager
def service_logs(level: str) -> Iterator[ServiceLogs]:
    """While this lasts, every line on stderr is a JSON object; afterwards also those of uncaught
    exceptions.

    Used once in a process.
    """
    logs = ServiceLogs(level)
    try:
        yield logs
    finally:
        logs.end_json()
