"""The service with two ranks that share a model: load and cancels, and the death of a rank."""

import os
import random
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_service import Service, is_alive
from rank_service import CHECKPOINT, GRID, other_ranks, rank_service, tree

from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.pipeline import Pipeline
from autoregressive.weights.finding import find_weights, resolve_model
from autoregressive.weights.options import ModelOptions

pytestmark = pytest.mark.slow
NOTICED_SECONDS = 2.0
_CLIENTS = 16


def ask(service: Service, number: int) -> str:
    """One of many requests; many of their clients leave before the answer."""
    random_ = random.Random(number)
    body = {"prompt": str(number % 64), "seed": number, "n": random_.randint(1, 3)}
    body |= {"cfg_scale": random_.choice([1.0, 2.0, 4.0]), "top_k": random_.choice([0, 5])}
    route = random_.choice(["/v1/codes", "/v1/images/generations"])
    patience = random_.choice([0.02, 0.1, 0.3, 60.0])
    try:
        answer = httpx2.post(service.url + route, json=body, timeout=patience)
    except httpx2.TimeoutException:
        return "left"
    assert answer.status_code in (200, 429), answer.text
    if answer.status_code == 200 and route == "/v1/codes":
        assert all(len(one["codes"]) == GRID**2 for one in answer.json()["data"])
    return str(answer.status_code)


def test_nothing_is_left_of_four_hundred_requests(tmp_path: Path) -> None:
    """Fails if a cancelled or finished request keeps pages, rows or a place on a gauge, or if the
    ranks get out of step.
    """
    with rank_service(tmp_path, "--max-num-seqs", "24", "--num-pages", "24") as service:
        body = {"prompt": "3", "seed": 9, "n": 2}
        before = service.client.post("/v1/codes", json=body).json()["data"]
        with ThreadPoolExecutor(_CLIENTS) as pool:
            ends = list(pool.map(lambda number: ask(service, number), range(400)))
        service.wait_for(service.is_empty, 30)
        assert ends.count("200") > 50
        assert ends.count("left") > 50
        assert service.client.post("/v1/codes", json=body).json()["data"] == before
        assert service.client.get("/health").status_code == 200
        processes = tree(service.process.pid)
        assert len(processes) == 3  # the service, rank 0 and rank 1
        assert service.terminate() == 0
        service.wait_for(lambda: not any(map(is_alive, processes)), 5)
        assert '"level": "error"' not in service.log
        assert '"level": "critical"' not in service.log


@pytest.mark.timing
@pytest.mark.parametrize("drawing", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_ends_the_service(tmp_path: Path, rank: int, drawing: bool) -> None:
    """Fails if a rank's death is noticed late, by nobody, or leaves a process behind."""
    with rank_service(tmp_path, "--max-num-seqs", "8") as service:
        processes = tree(service.process.pid)
        assert len(processes) == 3
        with ThreadPoolExecutor(1) as pool:
            if drawing:
                slow = {"prompt": "1", "n": 10}
                waiting = pool.submit(httpx2.post, f"{service.url}/v1/codes", json=slow, timeout=60)
                service.wait_for(lambda: service.gauges()["num_requests_running"] == 1, 20)
            os.kill(processes[1 + rank], signal.SIGKILL)
            noticed = service.wait_for(lambda: health(service) == 503, 10)
            assert noticed <= NOTICED_SECONDS
            assert service.process.wait(30) == 1
            if drawing:
                assert waiting.result().status_code == 503
        service.wait_for(lambda: not any(map(is_alive, processes)), 2)


def one_process_draws(bodies: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
    """The codes for requests of the service, by an engine without ranks."""
    model = resolve_model(ModelOptions("GPT-demo", CHECKPOINT, device="cpu"))
    model = replace(model, image_size=GRID * model.downsample_size)
    pipe = Pipeline(model, find_weights(model), EngineConfig(max_num_seqs=8, lookahead="off"))
    drawn = []
    for body in bodies:
        settings = {name: value for name, value in body.items() if name != "prompt"}
        params = replace(model.defaults.sampling, **settings)
        drawn.append(pipe.draw([int(body["prompt"])], params).tolist())
    return drawn


@pytest.mark.timing
def test_engines_of_several_ranks_draw_what_one_process_draws_and_end_together(
    tmp_path: Path,
) -> None:
    """Fails if two engines of two ranks do not run beside each other, draw other codes than one
    process, or outlive a rank of one of them.
    """
    bodies = [{"prompt": str(number), "seed": number, "n": 3} for number in range(6)]
    bodies[3]["temperature"] = 0.0
    expected = one_process_draws(bodies)
    with rank_service(tmp_path, "--data-parallel-size", "2", "--max-num-seqs", "2") as service:
        processes = tree(service.process.pid)
        ranks = other_ranks(service.process.pid)
        assert (len(processes), len(ranks)) == (7, 2)  # with two API servers

        def ask_for(body: dict[str, Any]) -> httpx2.Response:
            return httpx2.post(f"{service.url}/v1/codes", json=body, timeout=60)

        def both_engines_draw() -> bool:  # a guided image has all rows of one
            return service.gauges()["num_requests_running"] == 2

        with ThreadPoolExecutor(len(bodies)) as pool:
            drawing = [pool.submit(ask_for, body) for body in bodies]
            service.wait_for(both_engines_draw, 20)
            answers = [future.result().json()["data"] for future in drawing]
            assert [[image["codes"] for image in answer] for answer in answers] == expected
            slow = [pool.submit(ask_for, {"prompt": "1", "n": 5}) for _ in range(2)]
            service.wait_for(both_engines_draw, 20)
            os.kill(ranks[1], signal.SIGKILL)
            assert service.wait_for(lambda: health(service) == 503, 10) <= NOTICED_SECONDS
            assert service.process.wait(60) == 1  # the other engine finishes what it draws
            assert 503 in [future.result().status_code for future in slow]
        service.wait_for(lambda: not any(map(is_alive, processes)), 2)


@pytest.mark.timing
def test_a_rank_that_hangs_shows_and_ends_the_service(tmp_path: Path) -> None:
    """Fails if a stopped rank leaves /health at 200, or is waited for beyond --step-timeout."""
    with rank_service(tmp_path, "--max-num-seqs", "8", "--step-timeout", "6") as service:
        processes = tree(service.process.pid)
        os.kill(processes[2], signal.SIGSTOP)
        assert service.wait_for(lambda: health(service) == 503, 10) <= NOTICED_SECONDS + 0.2
        os.kill(processes[2], signal.SIGCONT)
        service.wait_for(lambda: health(service) == 200, 5)
        assert service.client.post("/v1/codes", json={"prompt": "1"}).status_code == 200
        os.kill(processes[2], signal.SIGSTOP)
        begun = time.monotonic()
        assert service.process.wait(30) == 1
        assert time.monotonic() - begun < 30  # of a minute, the default
        service.wait_for(lambda: not any(map(is_alive, processes)), 2)


def health(service: Service) -> int:
    """What a probe hears; 0: nothing."""
    try:
        return httpx2.get(f"{service.url}/health", timeout=1).status_code
    except httpx2.TransportError:
        return 0


def test_a_rank_that_cannot_start_says_what_to_do(tmp_path: Path) -> None:
    """Fails if the reason is a rank's secret, or hidden behind a traceback."""
    pages = "--num-pages", str(2**31 - 1)
    with pytest.raises(AssertionError, match="--num-pages"), rank_service(tmp_path, *pages):
        pass
    assert "Traceback" not in (tmp_path / "stderr").read_text()
