"""OpenAI's batch format: a file of requests, and the file of their answers, which is only ever
appended to.

The answers file is also the record of what is done. If the process is killed, the file ends in a
line without its end at worst. The next run cuts that line off, and skips every request that has an
answer.
"""

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoregressive.errors import UserError, shortened
from autoregressive.serve.web.api_errors import ApiError
from autoregressive.serve.web.app_state import IMAGES_PATH
from autoregressive.serve.web.checks import read_json

_FIELDS = ("custom_id", "method", "url", "body")
_ANSWER_BEGINS = b'{"id": "batch_req_'  # every line that `AnswerFile` writes
_SHOWN_CHARACTERS = 100  # of a custom_id in a message
_READ_BYTES = 2**20


@dataclass(frozen=True)
class BatchError:
    """Why a line is no request to the route, as the field `error` of its answer has it."""

    code: str
    message: str


@dataclass(frozen=True)
class BatchRequest:
    """A line of the requests file."""

    custom_id: str
    body: bytes  # JSON, which only the service judges
    images: int  # that it asks for, or 1 where its body does not say so properly
    needs_service: str | None  # a field that asks for what an answer in a file cannot be
    error: BatchError | None


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """The requests of a file, one at a time, so that a long file takes no more memory than a short
    one. Blank lines are skipped.

    Raises:
        UserError: the file cannot be read, or a line could not be told from others by its answer.
            The message names the line.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _read_request(f"{path}: line {number}", line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def check_requests(path: Path) -> dict[str, int]:
    """Reads all requests before any work; the number of images of each, by its custom_id.

    Raises:
        UserError: as `read_requests`, or two requests share a custom_id, or there are none.
    """
    images: dict[str, int] = {}
    for request in read_requests(path):
        if request.custom_id in images:
            first, again = _lines_of(path, request.custom_id)
            raise UserError(
                f"{path}: line {again} has the custom_id {_shown(request.custom_id)} of line "
                f"{first}; give each request one of its own"
            )
        images[request.custom_id] = request.images
    if not images:
        raise UserError(f"{path}: there are no requests in this file")
    return images


def _read_request(place: str, line: bytes) -> BatchRequest:
    """A line as a request.

    Raises:
        UserError: it is not a JSON object, or it has no custom_id.
    """
    try:
        content = read_json(line)
    except ApiError as error:
        raise UserError(f"{place} {error.message.removeprefix('the body ')}") from error
    if not isinstance(content, dict):
        raise UserError(f"{place} must be a JSON object with {', '.join(_FIELDS)}")
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        there = "has no custom_id" if custom_id in (None, "") else "has a custom_id that is no text"
        raise UserError(f"{place} {there}; give each request a text of its own")
    body = content.get("body")
    fields = body if isinstance(body, dict) else {}
    n = fields.get("n")
    try:
        text = json.dumps(body).encode()
    except RecursionError as error:
        raise UserError(f"{place} is nested too deeply") from error
    return BatchRequest(
        custom_id,
        text,
        images=n if isinstance(n, int) and 1 <= n <= 10 else 1,
        needs_service=_needs_service(fields),
        error=_error_of(content),
    )


def _needs_service(fields: dict[str, Any]) -> str | None:
    if fields.get("stream") is True:
        return "stream"
    return "response_format" if fields.get("response_format") == "url" else None


def _error_of(content: dict[str, Any]) -> BatchError | None:
    """Why a line is no request to the route; None if it is one."""
    unknown = next((name for name in content if name not in _FIELDS), None)
    if unknown is not None:
        told = f"{shortened(unknown, _SHOWN_CHARACTERS)} is not a field of a request"
        return BatchError("unknown_field", f"{told}: use {', '.join(_FIELDS)}")
    for name, value in (("method", "POST"), ("url", IMAGES_PATH)):
        if content.get(name) != value:
            return BatchError(f"invalid_{name}", f"{name} must be {value}")
    if "body" not in content:
        return BatchError("missing_value", "body is missing: what to draw")
    return None


def _lines_of(path: Path, custom_id: str) -> list[int]:
    """The numbers of the first two lines with this custom_id."""
    with path.open("rb") as lines:
        found = (
            number
            for number, line in enumerate(lines, 1)
            if line.strip() and _read_request("", line).custom_id == custom_id
        )
        return [next(found), next(found)]


def _shown(custom_id: str) -> str:
    return repr(shortened(custom_id, _SHOWN_CHARACTERS))


class AnswerFile:
    """The answers of a requests file. One process writes it; it is locked meanwhile.

    Args:
        path: made if it does not exist. Whole lines that are there are kept, and a last line
            without its end is cut off.
        requests: where the requests are, for messages.
        known: the custom_ids of the requests.

    Raises:
        UserError: the file cannot be written, another process writes it, or it has anything but
            answers to these requests. It is then as it was.

    Attributes:
        answered: the custom_ids that have an answer.
    """

    def __init__(self, path: Path, requests: Path, known: Collection[str]) -> None:
        self.path, self.answered = path, set[str]()
        self._is_new = not os.path.exists(path)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                self._claim(requests)
                self._size = self._read(requests, known)
                os.ftruncate(self._file, self._size)
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another") from error

    def answer(self, custom_id: str, status: int, request_id: str, body: bytes) -> None:
        """Appends the service's answer to a request.

        Args:
            body: JSON in one line.

        Raises:
            UserError: the disk does not take it. The file ends with the answer before.
        """
        head = json.dumps({"status_code": status, "request_id": request_id})[:-1]
        self._append(custom_id, b"".join((head.encode(), b', "body": ', body, b"}")), b"null")

    def refuse(self, custom_id: str, error: BatchError) -> None:
        """Appends why a line is no request to the route.

        Raises:
            UserError: as `answer`.
        """
        self._append(custom_id, b"null", json.dumps(asdict(error)).encode())

    def close(self) -> None:
        """Returns when the disk has all answers. A new file without any is removed.

        Raises:
            UserError: the disk does not take them.
        """
        try:
            if self._is_new and self._size == 0:
                self.path.unlink(missing_ok=True)
            os.fsync(self._file)
        except OSError as error:
            raise self._unwritten(error) from error
        finally:
            with contextlib.suppress(OSError):  # the disk has all, or an error has been told
                os.close(self._file)

    def _append(self, custom_id: str, response: bytes, error: bytes) -> None:
        names = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id}
        head = json.dumps(names)[:-1].encode()
        line = b"".join((head, b', "response": ', response, b', "error": ', error, b"}\n"))
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except BaseException as failure:  # Ctrl-C, too
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            if isinstance(failure, OSError):
                raise self._unwritten(failure) from failure
            raise
        self._size += len(line)
        self.answered.add(custom_id)

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.path}: {error.strerror}; it has {len(self.answered)} answers. "
            "Make room, and run the same command again: it goes on from there"
        )

    def _claim(self, requests: Path) -> None:
        """Raises `UserError` unless this process alone may write the file."""
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{self.path}: answers go into a file, which this is not")
        if os.path.samestat(found, os.stat(requests)):
            raise UserError(f"{self.path}: these are the requests; name another file for answers")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another process writes its answers there") from error
        except OSError:  # a file system without locks
            pass

    def _read(self, requests: Path, known: Collection[str]) -> int:
        """Notes which requests have an answer; returns the size of the whole lines."""
        size = 0
        with open(self._file, "rb", _READ_BYTES, closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                place = f"{self.path}: line {number}"
                if not line.endswith(b"\n"):
                    if line[: len(_ANSWER_BEGINS)] != _ANSWER_BEGINS[: len(line)]:
                        raise _no_answer(place)
                    break
                self.answered.add(_answered_id(place, line, requests, known))
                size += len(line)
        return size


def _answered_id(place: str, line: bytes, requests: Path, known: Collection[str]) -> str:
    """The custom_id of an answer.

    Raises:
        UserError: it is no answer, or one to another request.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not {"custom_id", "response", "error"} <= content.keys():
        raise _no_answer(place)
    custom_id = str(content["custom_id"])
    if custom_id not in known:
        raise UserError(
            f"{place} answers {_shown(custom_id)}, which is no request of {requests}; choose "
            "another file for answers"
        )
    return custom_id


def _no_answer(place: str) -> UserError:
    return UserError(f"{place} is no answer of a batch; choose another file for answers")
