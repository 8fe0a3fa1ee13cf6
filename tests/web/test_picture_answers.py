"""OpenAI's answer with its pictures, which go in one by one."""

import asyncio
import json
from base64 import b64encode
from types import SimpleNamespace
from typing import Any, cast

from autoregressive.serve.web.openai_routes import PicturesResponse
from autoregressive.serve.web.schema import ImageData, ImagesAnswer, Usage


def test_the_answer_is_the_models_and_is_let_go_of_as_it_is_sent() -> None:
    """Fails if a picture goes in at the wrong place, or one that is sent is still
    counted, or held.
    """
    pictures = [b64encode(bytes([index]) * 3000) for index in range(3)]
    fields: dict[str, Any] = {"created": 1, "size": "32x32", "output_format": "png", "seed": 7}
    fields |= {"usage": Usage.of(3, 64), "model": 'a "b64_json":"" \\ ü'}
    empty = ImagesAnswer(data=[ImageData(b64_json="")] * 3, **fields)
    whole = ImagesAnswer(data=[ImageData(b64_json=text.decode()) for text in pictures], **fields)
    served = SimpleNamespace(answer_bytes=0)
    response = PicturesResponse(
        cast(Any, served), empty.model_dump_json(exclude_none=True).encode(), list(pictures)
    )
    sent = bytearray()
    left: list[int] = []
    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        messages.append(message)
        sent.extend(message.get("body", b""))
        left.append(served.answer_bytes)

    asyncio.run(response(cast(Any, {}), cast(Any, None), send))
    assert json.loads(sent) == json.loads(whole.model_dump_json(exclude_none=True))
    headers = dict(messages[0]["headers"])
    assert headers[b"content-length"] == str(len(sent)).encode()
    assert headers[b"content-type"] == b"application/json"
    assert [message.get("more_body") for message in messages[1:]] == [True] * (
        len(messages) - 2
    ) + [False]
    assert left[1:] == sorted(left[1:], reverse=True)
    assert left[-1] == 0
    assert not response._parts
