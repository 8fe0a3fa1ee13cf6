"""Logs for machines: a JSON object a line, on stderr."""

import json
import logging
import secrets
import sys
from datetime import UTC, datetime

REQUESTS = "llamagen.requests"  # the logger that writes a line a request


def new_request_id() -> str:
    """What a request's answer and its line in the log are told by."""
    return f"req_{secrets.token_hex(12)}"


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, and what the record has in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = datetime.fromtimestamp(record.created, tz=UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def write_logs(level: str) -> None:
    """Ours at this level, uvicorn's where something is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, threshold in (("llamagen", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(threshold)
