"""What a request's answer and its line in the log have in common."""

import secrets

REQUESTS = "llamagen.requests"  # the logger that writes a line a request


def new_request_id() -> str:
    """The number of a request, for its answer and its line in the log."""
    return f"req_{secrets.token_hex(12)}"
