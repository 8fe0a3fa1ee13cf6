"""The benchmark of HTTP alone reads the counters of a service that wants a key."""

from pathlib import Path

import bench_http
import pytest
from fake_service import running_service

from autoregressive.errors import UserError


def test_the_counters_are_asked_for_with_the_first_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if no key is sent, all keys are sent as one, or a refusal ends in a traceback."""
    keys = "first-key-of-two, second-key-of-two"
    with running_service(tmp_path, environment={"LLAMAGEN_API_KEY": keys}) as service:
        monkeypatch.setenv("LLAMAGEN_API_KEY", keys)
        assert bench_http.images_drawn(service.url) == 0
        monkeypatch.delenv("LLAMAGEN_API_KEY")
        with pytest.raises(UserError, match=r"answers 401, not 200; check LLAMAGEN_API_KEY$"):
            bench_http.images_drawn(service.url)
