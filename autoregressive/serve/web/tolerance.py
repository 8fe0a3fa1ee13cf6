"""What the service lets pass by choice, for clients whose requests are hard-coded. Without a choice
it refuses what it does not do, so that a mistake does not pass for a setting.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from autoregressive.serve.web.schema import ImageRequest, ServedModel

ResponseFormat = Literal["b64_json", "url"]
_MOST_NAMES = 5  # of ignored fields, in a warning
_MOST_CHARACTERS = 100  # of what a client wrote, in a warning


@dataclass(frozen=True)
class Tolerance:
    """The choices; by default the service is strict."""

    ignore_unknown_fields: bool = False
    allow_any_size: bool = False
    allow_any_model: bool = False
    response_format: ResponseFormat = "b64_json"  # of requests that leave it out

    def adapt(
        self, fields: dict[str, Any], schema: type[BaseModel], model: ServedModel
    ) -> list[str]:
        """Changes the fields of a request into ones that the service takes, as far as it may.

        Args:
            fields: of the body.
            schema: that they are checked with afterwards.

        Returns:
            What was changed, for the client.
        """
        changes = []
        if self.ignore_unknown_fields:
            unknown = [name for name in fields if name not in schema.model_fields]
            for name in unknown:
                del fields[name]
            if unknown:
                more = len(unknown) - _MOST_NAMES
                shown = ", ".join(map(_shown, unknown[:_MOST_NAMES]))
                changes.append(f"ignored: {shown}" + (f" and {more} more" if more > 0 else ""))
        size, asked = fields.get("size"), fields.get("model")
        if self.allow_any_size and isinstance(size, str) and size not in ("auto", model.size):
            del fields["size"]
            changes.append(f"size {_shown(size)}: images have {model.size}")
        if self.allow_any_model and isinstance(asked, str) and asked not in model.names:
            del fields["model"]
            changes.append(f"model {_shown(asked)}: images are of {_shown(model.name)}")
        if schema is ImageRequest and fields.get("response_format") is None:
            # a stream has no URLs
            fields["response_format"] = "b64_json" if fields.get("stream") else self.response_format
        return changes


STRICT = Tolerance()


def warning_header(change: str) -> str:
    """The value of a `Warning` header (RFC 7234, section 5.5)."""
    return f'299 - "{change}"'


def _shown(text: str) -> str:
    """What somebody wrote, as it fits between a header's quotation marks."""
    cut = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    safe = (one if one.isascii() and one.isprintable() and one not in '"\\' else "?" for one in cut)
    return "".join(safe)
