"""What is counted of requests that come to their end, under vLLM's names."""

from pathlib import Path
from typing import Any

import pytest
from fake_service import TOKENS, running_service

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.web.metrics import Metrics
from autoregressive.serve.worker.messages import Ended, EngineRequest, ServedRequest

PREFIX = "llamagen:spec_decode_num"


def counted(*ends: dict[str, Any]) -> tuple[float | None, ...]:
    """Drafts, draft tokens and accepted tokens, after requests for two images have ended so."""
    metrics = Metrics(lambda: 0.0, lambda: 0.0, lambda: 0.0)
    for number, fields in enumerate(ends):
        served = ServedRequest(EngineRequest(number, 1, 2, SamplingParams(), pixels=False), 1.0)
        served.take(Ended(number, at=2.0, **fields))
        metrics.ended(served, TOKENS)
    return tuple(
        metrics.registry.get_sample_value(f"{PREFIX}_{name}_total")
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )


@pytest.mark.parametrize("outcome", ["cancelled", "engine_lost", "non_finite"])
def test_guesses_count_for_finished_requests(outcome: str) -> None:
    """Fails if requests that nobody got, or that tried no guess, count."""
    ahead = {"outcome": "finished", "drafted": 300, "accepted": 48}
    passes = 2 * TOKENS - 48
    assert counted(ahead) == (passes, 300, 48)
    assert counted(ahead, ahead) == (2 * passes, 600, 96)
    assert counted(ahead, {**ahead, "outcome": outcome}) == (passes, 300, 48)
    assert counted(ahead, {"outcome": "finished"}) == (passes, 300, 48)
    assert counted({"outcome": "finished"}) == (0, 0, 0)


def test_the_metrics_say_what_lookahead_brought(tmp_path: Path) -> None:
    """Fails if the counts of an engine do not come to the process that counts, or the mean that
    vLLM's users compute from them is not the tokens kept a pass.
    """
    with running_service(tmp_path, "--lookahead", "4", "--api-server-count", "2") as service:
        service.faults.set("right_share", "1")
        assert service.draw(n=3).status_code == 200
        service.faults.set("right_share", "0")
        assert service.draw(n=2).status_code == 200
        service.wait_for(lambda: service.gauges()["images_total"] == 5, 5)
        gauges = service.gauges()
    drafts, drafted, accepted = (
        gauges[f"spec_decode_num_{name}_total"]
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    right = 3 * TOKENS // 4  # passes of the first request, each of which kept four tokens
    assert (drafts, accepted) == (right + 2 * TOKENS, 3 * right)
    # At the end of an image the window is smaller.
    assert drafted == 3 * right + 2 * (3 * TOKENS - (3 + 2 + 1))
    assert 1 + accepted / drafts == pytest.approx(gauges["generation_tokens_total"] / drafts)
