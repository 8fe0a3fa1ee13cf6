"""Triton's interpreter is chosen when triton is imported: these tests have a process of their own
(tests/kernels/test_interpreted.py).
"""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import triton.language as tl
from triton.runtime import interpreter

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def patched_once() -> Iterator[None]:
    """Saves a quarter of the time: Triton patches its language for every launch and every call of a
    device function.
    """
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        yield
    scope.restore()
