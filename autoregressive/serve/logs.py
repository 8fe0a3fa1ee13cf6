"""The log of the service and of the processes that it starts: lines of JSON on stderr. No process
waits for them to be read.

`service_logs` makes stderr of the service's process a pipe to itself, which the processes that it
starts inherit. A thread reads it, so that what a library, the interpreter or a dying process prints
becomes a JSON line, too. Another thread writes all lines to where stderr led before. It is the only
one that waits while the lines are not read.
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
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

_WAITING_BYTES = 4 * 2**20  # of lines that are not written yet; further lines are dropped
_PIPE_BYTES = 2**20  # of stderr's pipe, or less where the system allows less
_LONGEST_LINE_BYTES = 256 * 2**10  # of what others print
_LAST_LINES_SECONDS = 1.0  # for waiting lines to be written when the process ends
# A line of stderr's pipe: the lines after it are for people, and are passed on unchanged.
_PLAIN = b"\x00plain\x00"
_log = logging.getLogger("llamagen.service")


def _line(level: str, logger: str, message: str, created: float, **fields: object) -> str:
    moment = datetime.fromtimestamp(created, tz=UTC).isoformat(timespec="milliseconds")
    told = {"time": moment.replace("+00:00", "Z"), "level": level, "logger": logger}
    return json.dumps(told | {"message": message} | fields, default=str)


class JsonFormatter(logging.Formatter):
    """Formats time, level, logger, message and the record's `fields` as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Writes a record as one line of JSON."""
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        level = record.levelname.lower()
        return _line(level, record.name, record.getMessage(), record.created, **fields)


class LineWriter:
    """Writes lines to a descriptor, in a thread of its own, so that `put` never waits.

    Lines are dropped, and counted, if too many wait for a reader, or if they cannot be written.

    Args:
        report: makes a line from the number of dropped ones; it is written once lines can be
            written again.

    Attributes:
        dropped: lines that were dropped so far.
    """

    def __init__(self, descriptor: int, report: Callable[[int], bytes] | None = None) -> None:
        self._descriptor, self._report = descriptor, report
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0  # the line that is being written included
        self.dropped = self._reported = 0
        self._torn = False  # the last line was written in part
        self._changed = threading.Condition()
        threading.Thread(target=self._write, name=f"lines to {descriptor}", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Queues a line that has its end already."""
        with self._changed:
            if self._waiting_bytes + len(line) > _WAITING_BYTES:
                self.dropped += 1
                return
            self._lines.append(line)
            self._waiting_bytes += len(line)
            self._changed.notify_all()

    def write(self, text: str) -> None:
        """Queues a line, as `logging.StreamHandler` has it."""
        self.put(text.encode())

    def drain(self, timeout: float = _LAST_LINES_SECONDS) -> bool:
        """Waits until all lines are written, at most `timeout` seconds; returns whether they
        are.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting_bytes == 0, timeout)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                line = self._lines.popleft()
                dropped = self.dropped - self._reported
            if dropped and self._report is not None and self._write_line(self._report(dropped)):
                self._reported += dropped
            written = self._write_line(line)
            with self._changed:
                self.dropped += not written
                self._waiting_bytes -= len(line)
                self._changed.notify_all()

    def _write_line(self, line: bytes) -> bool:
        """Waits until the line is written; returns whether it could be."""
        left = b"\n" + line if self._torn else line
        whole = len(left)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process has made the terminal or pipe non-blocking
                select.select([], [self._descriptor], [])
            except OSError:  # the reader has gone, or the disk is full
                self._torn |= len(left) < whole
                return False
        self._torn = False
        return True


def _report_dropped(count: int) -> bytes:
    message = f"{count} lines of the log were dropped: they could not be written"
    return f"{_line('warning', 'llamagen.logs', message, time.time(), dropped=count)}\n".encode()


def _log_to(descriptor: int, level: str, loggers: Sequence[str]) -> LineWriter:
    """Logs what these loggers say. Records are formatted in the thread that logs, because the
    objects in them may change."""
    writer = LineWriter(descriptor, _report_dropped)
    handler = logging.StreamHandler(writer)
    handler.setFormatter(JsonFormatter())
    for name in loggers:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger("llamagen").setLevel(level.upper())
    # uvicorn's warnings are in the line of the request, too: "Invalid HTTP request received.",
    # "Unsupported upgrade request."
    logging.getLogger("uvicorn").setLevel("ERROR")
    return writer


def log_our_loggers(level: str) -> None:
    """Logs what the service's loggers and uvicorn's say, in a process that is not the service's
    own.
    """
    _log_to(sys.stderr.fileno(), level, ("llamagen", "uvicorn"))


def log_everything(descriptor: int, level: str) -> LineWriter:
    """Logs what all loggers, warnings and uncaught exceptions of this process say, as JSON."""
    writer = _log_to(descriptor, level, ("",))  # the root of all loggers
    logging.getLogger().setLevel("WARNING")
    logging.captureWarnings(True)

    def log_uncaught(kind: type[BaseException], error: BaseException, _: object) -> None:
        _log.critical("the process has ended by an error", exc_info=error)

    def log_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            name = args.thread.name if args.thread is not None else "unknown"
            _log.error("thread %s has ended by an error", name, exc_info=args.exc_value)

    def log_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        message = unraisable.err_msg or "an exception was ignored in"
        _log.error("%s: %r", message, unraisable.object, exc_info=unraisable.exc_value)

    sys.excepthook, threading.excepthook = log_uncaught, log_of_thread
    sys.unraisablehook = log_unraisable
    return writer


class ServiceLogs:
    """The log, and the messages for people on stdout. Made by `service_logs`.

    Attributes:
        writer: of the log's lines.
    """

    def __init__(self, level: str) -> None:
        self._stderr = _duplicate(2)
        self._stdout = LineWriter(_duplicate(1))
        self._source, sink = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.dup2(sink, 2)
        os.close(sink)
        self.writer = log_everything(self._stderr, level)
        # A fault like SIGSEGV is reported in plain text, because the thread that reads the pipe
        # ends with the process.
        faulthandler.enable(self._stderr)
        self._reading = threading.Thread(target=self._read, name="stderr", daemon=True)
        self._reading.start()
        atexit.register(self._end)

    def announce(self, message: str) -> None:
        """Prints a message for people on stdout."""
        # there is none if stdout is closed
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self._stdout.put(f"{message}\n".encode(encoding, errors="backslashreplace"))

    def _end(self) -> None:
        """Writes the waiting lines, if they are read. The processes that the service started have
        ended.
        """
        with contextlib.suppress(OSError):
            if sys.stderr is not None:
                sys.stderr.flush()
        faulthandler.disable()
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # ends the pipe
        deadline = time.monotonic() + _LAST_LINES_SECONDS
        self._reading.join(_LAST_LINES_SECONDS)
        if self.writer.drain(max(0.0, deadline - time.monotonic())):
            os.dup2(self._stderr, 2)
        self._stdout.drain(max(0.0, deadline - time.monotonic()))

    def _read(self) -> None:
        plain = False
        with open(self._source, "rb", buffering=64 * 2**10) as source:
            while line := source.readline(_LONGEST_LINE_BYTES):
                line = line.removesuffix(b"\n")
                if line == _PLAIN:
                    plain = True
                elif plain or _is_json_object(line):
                    self.writer.put(line + b"\n")
                elif line.strip():
                    message = line.decode(errors="backslashreplace")
                    self.writer.write(_line("warning", "stderr", message, time.time()) + "\n")


def _duplicate(descriptor: int) -> int:
    """Another descriptor for the same file, which child processes do not inherit."""
    try:
        return os.dup(descriptor)
    except OSError:  # it is closed
        return os.open(os.devnull, os.O_WRONLY)


def _is_json_object(line: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    return False


@contextlib.contextmanager
def service_logs(level: str) -> Iterator[ServiceLogs]:
    """Makes every line on stderr a JSON object, until the end of the context; used once in a
    process.
    """
    try:
        yield ServiceLogs(level)
    finally:  # later lines are passed on unchanged: they are errors that people can mend
        os.write(2, b"\n" + _PLAIN + b"\n")
