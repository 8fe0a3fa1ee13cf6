"""Errors as a command tells them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from autoregressive.cli.command import flag_of
from autoregressive.errors import UserError


@contextmanager
def refused(match: str = "") -> Iterator[None]:
    """Expects a `UserError` whose message, with flags for settings, has the pattern in it."""
    with pytest.raises(UserError) as caught:
        yield
    message = caught.value.spelled(flag_of)
    assert re.search(match, message), message
