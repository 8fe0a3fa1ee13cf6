"""The engine around a fake runner: requests come, go, fail and are cancelled; threads; spans;
offline use.
"""

import threading
import time
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from fake_runner import VOCABULARY, FakeRunner, LateCopies, expected_codes, fake_engine, tiny_gpt

from autoregressive.errors import UserError
from autoregressive.models.generate import NonFiniteLogitsError
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.memory import ways_to_less_memory, ways_to_more_pages
from autoregressive.serve.engine.request import Request, RequestState
from tokenizer.tokenizer_image.vq_model import VQ_models

SMALL = EngineConfig(max_num_seqs=8, page_size=4)
GUIDED, PLAIN = SamplingParams(top_k=5), SamplingParams(cfg_scale=1.0, top_k=5)


def run_out(engine: Engine, most_steps: int = 200) -> list[Request]:
    """Steps until nothing is left, audited."""
    ended: list[Request] = []
    while engine.wait_for_work(timeout=0):
        ended += engine.step()
        engine.audit()
        most_steps -= 1
        assert most_steps > 0, "the engine does not come to an end"
    return ended


def test_a_mixed_batch_draws_what_each_would_alone() -> None:
    """Fails if guidance, an interval, n, a filter or a seed of one request reaches another, or rows
    mix up their pages.
    """
    engine, _ = fake_engine(SMALL)
    wanted = [
        GUIDED,
        SamplingParams(cfg_scale=1.0, top_k=0, seed=1),
        SamplingParams(cfg_scale=7.5, cfg_interval=4, top_k=3, seed=2**63 - 1),
        SamplingParams(cfg_scale=0.0, temperature=0.0, top_p=0.5, top_k=VOCABULARY, n=4),
        SamplingParams(cfg_interval=0, top_k=5, n=2, seed=8),
    ]
    requests = [engine.submit(label, params) for label, params in enumerate(wanted)]
    assert sorted(request.id for request in run_out(engine)) == [0, 1, 2, 3, 4]
    for request in requests:
        assert request.state is RequestState.FINISHED
        assert request.codes is not None
        assert request.codes.dtype == torch.int32
        assert request.codes.tolist() == expected_codes(request, 16)


def test_late_requests_join_those_that_run() -> None:
    """Fails if a request waits for the batch before it to end although there is room, or joining
    disturbs those that run.
    """
    engine, runner = fake_engine(SMALL, tokens=64)
    first = engine.submit(1, GUIDED)
    engine.step()
    second = engine.submit(1, GUIDED)
    engine.step()
    assert (first.state, second.state) == (RequestState.RUNNING, RequestState.RUNNING)
    run_out(engine)
    assert sum(runner.spans) < 128
    assert first.codes is not None
    assert second.codes is not None
    assert first.codes.tolist() == second.codes.tolist() == expected_codes(first, 64)


def test_a_cancelled_request_leaves_at_the_next_step() -> None:
    """Fails if a cancelled request runs on, holds pages, is reported twice or not at all, or others
    change.
    """
    engine, _ = fake_engine(SMALL)
    running, other = engine.submit(1, GUIDED), engine.submit(2, GUIDED)
    waiting = engine.submit(3, SamplingParams(n=4, top_k=5))
    engine.step()
    used = engine.scheduler.pool.used_pages
    for request in (running, waiting, running):
        engine.cancel(request)
    steps = running.steps
    with patch.object(engine.scheduler, "plan_span", return_value=0):
        assert set(engine.step()) == {running, waiting}
    assert engine.scheduler.pool.used_pages == used // 2
    assert run_out(engine) == [other]
    assert (running.state, waiting.state, running.steps) == (
        RequestState.CANCELLED,
        RequestState.CANCELLED,
        steps,
    )
    assert other.codes is not None
    assert other.codes.tolist() == expected_codes(other, 16)
    engine.cancel(other)
    assert run_out(engine) == []
    assert other.state is RequestState.FINISHED


def test_nan_fails_its_request_and_no_other() -> None:
    """Fails if NaN logits end the process, spoil a neighbour, pass for a picture, or haunt the next
    image in that slot.
    """
    engine, runner = fake_engine(EngineConfig(max_num_seqs=4, page_size=4))
    runner.fails = {(6, 1, 3)}
    bad, good = (
        engine.submit(1, SamplingParams(cfg_scale=1.0, top_k=0, n=2, seed=6)),
        engine.submit(1, GUIDED),
    )
    run_out(engine)
    assert (bad.state, good.state) == (RequestState.FAILED, RequestState.FINISHED)
    assert bad.codes is None
    assert bad.error is not None
    assert "image 1 of request 0" in bad.error
    assert "\n" not in bad.error
    later = [engine.submit(1, GUIDED) for _ in range(6)]
    run_out(engine)
    assert {request.state for request in later} == {RequestState.FINISHED}
    with pytest.raises(NonFiniteLogitsError, match="NaN"):
        engine.generate([1, 1], SamplingParams(cfg_scale=1.0, top_k=0, seed=6))
    assert not engine.wait_for_work(timeout=0)


@pytest.mark.parametrize("delay", [0, 1, 3, 1000])
def test_a_slot_is_not_reused_before_its_codes_arrive(delay: int) -> None:
    """Fails if an image begins in a slot whose codes are still being copied, or a late copy stops
    the engine.
    """
    engine, _ = fake_engine(EngineConfig(max_num_seqs=2, page_size=4), tokens=4)
    with patch.object(engine.batch, "fetch", LateCopies(engine.batch, delay).fetch):
        requests = [engine.submit(label, GUIDED) for label in range(8)]
        run_out(engine)
    for request in requests:
        assert request.codes is not None
        assert request.codes.tolist() == expected_codes(request, 4)


@pytest.mark.parametrize(
    ("label", "params", "message"),
    [
        (10, PLAIN, "class_label 10: must be 0 to 9"),
        (-1, PLAIN, "class_label -1"),
        (1, SamplingParams(n=5, top_k=0), "10 rows .* and max_num_seqs is 8"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    label: int, params: SamplingParams, message: str
) -> None:
    """Fails if a bad request gets into the queue."""
    engine, _ = fake_engine(SMALL)
    with pytest.raises(ValueError, match=message):
        engine.submit(label, params)
    assert not engine.wait_for_work(timeout=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SamplingParams(cfg_scale=float("nan")),
        lambda: SamplingParams(cfg_scale=-0.5),
        lambda: SamplingParams(cfg_interval=-2),
        lambda: SamplingParams(temperature=float("inf")),
        lambda: SamplingParams(temperature=-1.0),
        lambda: SamplingParams(temperature=10**400),
        lambda: SamplingParams(temperature=1e39),  # infinite in float32
        lambda: SamplingParams(temperature=float("nan")),
        lambda: SamplingParams(top_k=-1),
        lambda: SamplingParams(top_p=0.0),
        lambda: SamplingParams(seed=2**63),
        lambda: SamplingParams(n=0),
        lambda: SamplingParams(n=1.5),  # type: ignore[arg-type]
        lambda: EngineConfig(max_num_seqs=0),
        lambda: EngineConfig(page_size=0),
        lambda: EngineConfig(num_pages=0),
        lambda: EngineConfig(gpu_memory_utilization=1.5),
        lambda: EngineConfig(attention_backend="cuda"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], object]) -> None:
    """Fails if a value that no kernel expects is taken, or the message is not one line that says
    what is allowed.
    """
    with pytest.raises(ValueError, match=r"^\w+ .*: must be [^\n]*$"):
        make()


def test_generate_keeps_the_order_of_labels() -> None:
    """Fails if images come back in the order in which they ended, or equal labels give equal
    images.
    """
    engine, _ = fake_engine(SMALL)
    labels = [3, 1, 3, 0, 9, 3]
    codes = engine.generate(labels, GUIDED)
    alone = [
        expected_codes(Request(0, label, GUIDED, first_image=index), 16)[0]
        for index, label in enumerate(labels)
    ]
    assert codes.tolist() == alone
    assert codes[0].tolist() != codes[2].tolist()
    assert (
        engine.generate([3], SamplingParams(top_k=5, n=3))[2].tolist()
        == engine.generate([3] * 3, GUIDED)[2].tolist()
    )
    each = engine.generate([3, 1], [PLAIN, SamplingParams(top_k=5, n=2, cfg_interval=2)])
    assert each.shape == (3, 16)
    assert each[0].tolist() == expected_codes(Request(0, 3, PLAIN), 16)[0]


def test_generate_leaves_nothing_behind_when_it_stops(capfd: pytest.CaptureFixture[str]) -> None:
    """Fails if requests of a refused or interrupted call stay in the engine, and run with the next
    one.
    """
    engine, runner = fake_engine(SMALL)
    with pytest.raises(ValueError, match="class_label 99"):
        engine.generate([1, 99], GUIDED)
    with pytest.raises(ValueError, match="0 labels"):
        engine.generate([], GUIDED)
    with pytest.raises(ValueError, match="2 labels"):
        engine.generate([1, 2], [GUIDED])

    def interrupt(steps: int) -> None:
        raise KeyboardInterrupt

    with patch.object(runner, "before_span", interrupt), pytest.raises(KeyboardInterrupt):
        engine.generate([1, 2], GUIDED)
    assert {request.state for request in run_out(engine)} <= {
        RequestState.FAILED,
        RequestState.CANCELLED,
    }
    assert engine.scheduler.pool.used_pages == 0
    assert engine.generate([1], GUIDED, progress=True).shape == (1, 16)
    assert "16/16" in capfd.readouterr().err


def test_spans_are_short_enough_for_a_cancel() -> None:
    """Fails if a cancel could have to wait for more than 16 steps, or for more than 0.25 s of slow
    ones.
    """
    quick, runner = fake_engine(EngineConfig(max_num_seqs=2, page_size=64), tokens=64)
    quick.generate([1, 1], PLAIN)
    assert max(runner.spans) == 16
    slow, runner = fake_engine(EngineConfig(max_num_seqs=2, page_size=64))
    runner.step_seconds = 0.04
    slow.generate([1], PLAIN)
    assert runner.spans[0] == 1  # nothing is known yet
    assert 2 <= max(runner.spans) <= 6


def test_threads_may_submit_and_cancel() -> None:
    """Fails if a request from another thread is lost or gets another's id, or the owner is not
    woken for it.
    """
    engine, _ = fake_engine(EngineConfig(max_num_seqs=8, page_size=4), tokens=4)
    requests: list[Request] = []
    stop = threading.Event()

    def own() -> None:
        while not stop.is_set():
            if engine.wait_for_work(timeout=30):
                engine.step()
                engine.audit()

    def ask(first_label: int) -> None:
        for index in range(20):
            request = engine.submit(first_label, SamplingParams(top_k=5, seed=index))
            requests.append(request)
            if index % 3 == 0:
                engine.cancel(request)

    owner = threading.Thread(target=own)
    askers = [threading.Thread(target=ask, args=(label,)) for label in range(4)]
    for thread in (owner, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    deadline = time.monotonic() + 30
    while not all(request.ended for request in requests) and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    engine.submit(0, PLAIN)  # wakes the owner, which sees that it is to stop
    owner.join(timeout=30)
    assert not owner.is_alive()
    assert sorted(request.id for request in requests) == list(range(80))
    assert all(request.ended for request in requests)
    for request in requests:
        if request.codes is not None:
            assert request.codes.tolist() == expected_codes(request, 4)
        else:
            assert request.state is RequestState.CANCELLED


def test_the_pool_holds_a_full_batch_where_memory_allows() -> None:
    """Fails if the default pool is smaller than the batch on a machine with room, or larger than
    can be of use.
    """
    engine, runner = fake_engine(SMALL)
    assert engine.scheduler.pool.num_pages == len(runner.pages) == 8 * 4
    fixed, _ = fake_engine(EngineConfig(num_pages=5))
    assert fixed.scheduler.pool.num_pages == 5


@pytest.mark.parametrize(
    ("config", "more", "less"),
    [
        (
            EngineConfig(),
            "raise gpu_memory_utilization, lower max_num_seqs or use a smaller model",
            "lower gpu_memory_utilization",
        ),
        (EngineConfig(num_pages=9), "raise num_pages", "lower num_pages"),
        (
            EngineConfig(page_size=64),
            "lower page_size, raise gpu_memory_utilization, lower max_num_seqs or use a smaller "
            "model",
            "lower gpu_memory_utilization",
        ),
    ],
)
def test_advice_about_a_gpus_memory_is_of_use(config: EngineConfig, more: str, less: str) -> None:
    """Fails if it names a setting that the one that was set overrides: then following it changes
    nothing.
    """
    cuda = torch.device("cuda")
    told = UserError("x", remedies=ways_to_more_pages(config, cuda))
    assert str(told) == f"x: {more}"
    told = UserError("x", remedies=ways_to_less_memory(config, cuda)[:1])
    assert str(told) == f"x: {less}"


def test_an_idle_owner_is_woken() -> None:
    """Fails if a request has to wait until the owner looks by itself."""
    engine, _ = fake_engine(SMALL)
    timer = threading.Timer(0.1, lambda: engine.submit(1, GUIDED))
    timer.start()
    start = time.monotonic()
    assert engine.wait_for_work(timeout=20)
    assert time.monotonic() - start < 10
    timer.join()
    run_out(engine)


def test_generate_decodes_each_image_where_it_belongs() -> None:
    """Fails if pixels come back in the order in which codes were finished, or belong to other
    codes.
    """
    torch.manual_seed(0)
    vq = VQ_models["VQ-demo"](codebook_size=VOCABULARY).eval()
    engine = Engine(tiny_gpt(4), vq, EngineConfig(max_num_seqs=4, page_size=4), FakeRunner)
    params = [SamplingParams(top_k=5, n=2), PLAIN, SamplingParams(cfg_interval=0, top_k=5)]
    pixels = engine.generate([1, 2, 3], params)
    codes = engine.generate([1, 2, 3], params, decode=False)
    with torch.no_grad():
        expected = torch.cat(
            [vq.decode_code(one[None], [1, vq.config.codebook_embed_dim, 2, 2]) for one in codes]
        )
    assert pixels.shape == (4, 3, 16, 16)
    assert torch.allclose(pixels, expected, atol=1e-4)


def test_the_runner_gets_what_the_engine_was_built_with() -> None:
    """Fails if the runner's tensors could have other sizes than the batch, or its switches are
    lost.
    """
    config = EngineConfig(
        max_num_seqs=3,
        page_size=5,
        enforce_eager=True,
        attention_backend="torch",
        deterministic=True,
    )
    engine, runner = fake_engine(config)
    assert isinstance(runner, FakeRunner)
    assert runner.shape == engine.shape == engine.batch.shape
    assert runner.config == config
