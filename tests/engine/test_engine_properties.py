"""Whatever arrives, in whatever order, is cancelled, or does not fit: nothing is lost, nobody
overtakes, no page goes astray.
"""

from dataclasses import dataclass, field
from unittest.mock import patch

from fake_runner import FakeRunner, LateCopies, expected_codes, fake_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.request import Request, RequestState

TOKENS = 9

sampling = st.builds(
    SamplingParams,
    cfg_scale=st.sampled_from([0.0, 1.0, 1.5, 4.0]),
    cfg_interval=st.integers(-1, TOKENS + 1),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.integers(0, 97),
    top_p=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    n=st.integers(1, 3),
)
configs = st.builds(
    EngineConfig,
    max_num_seqs=st.integers(1, 8),
    page_size=st.sampled_from([1, 2, 3, 4, 16]),
    num_pages=st.integers(1, 40),
)


@dataclass(frozen=True)
class Moment:
    """What other threads ask between two steps."""

    arrivals: list[tuple[int, SamplingParams]]  # label and parameters
    cancels: list[int]  # of the requests so far, counted round and round


moments = st.builds(
    Moment,
    arrivals=st.lists(st.tuples(st.integers(0, 9), sampling), max_size=3),
    cancels=st.lists(st.integers(0, 50), max_size=2),
)


@dataclass
class Record:
    """What was asked of an engine, and what came of it."""

    engine: Engine
    runner: FakeRunner
    asked: list[Request] = field(default_factory=list)
    cancelled: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)

    def ask(self, moment: Moment) -> None:
        for label, params in moment.arrivals:
            try:
                self.asked.append(self.engine.submit(label, params))
            except ValueError:
                assert never_fits(params, self.engine.config)
            else:
                assert not never_fits(params, self.engine.config)
        for number in moment.cancels if self.asked else []:
            request = self.asked[number % len(self.asked)]
            self.cancelled.append(request)
            self.engine.cancel(request)

    def step(self) -> None:
        self.ended += self.engine.step()
        self.engine.audit()
        scheduler = self.engine.scheduler
        assert scheduler.pool.used_pages == sum(
            len(row.pages) for running in scheduler.running for row in running.rows
        )
        assert scheduler.pool.used_pages + scheduler.pool.free_pages == self.engine.config.num_pages
        here = [request for request in self.asked if request.state is not RequestState.CANCELLED]
        waits = [request.state is RequestState.WAITING for request in here]
        assert waits == sorted(waits), "a later request has started before an earlier one"

    def check_forecast(self, steps: int) -> None:
        """Called with the pages of a span allocated, before it runs."""
        scheduler = self.engine.scheduler
        for image in scheduler.images:
            covered = [len(row.pages) * self.engine.shape.page_size for row in image.rows]
            assert covered[0] >= image.limit
        in_use = {
            page for running in scheduler.running for row in running.rows for page in row.pages
        }
        assert len(in_use) == scheduler.pool.used_pages == scheduler.forecast[steps - 1]
        assert (scheduler.forecast <= scheduler.pool.num_pages).all()

    def check_ends(self, tokens: int = TOKENS) -> None:
        """Called when nothing is left to do."""
        assert sorted(request.id for request in self.ended) == [
            request.id for request in self.asked
        ]
        for request in self.asked:
            if request.state is RequestState.CANCELLED:
                assert request in self.cancelled
                assert request.codes is None
            else:
                assert request.state is RequestState.FINISHED
                assert request.codes is not None
                assert request.codes.tolist() == expected_codes(request, tokens)
        assert self.engine.scheduler.pool.used_pages == 0
        assert len(self.engine.scheduler.free_slots) == self.engine.shape.num_slots
        assert self.engine.scheduler.forecast.sum() == 0


def never_fits(params: SamplingParams, config: EngineConfig) -> bool:
    """Whether a request could not run even alone, counted step by step."""
    assert config.num_pages is not None
    peak = 0
    for step in range(TOKENS):
        guided = params.cfg_scale > 1 and (
            params.cfg_interval < 0 or step <= params.cfg_interval + 1
        )
        pages_of_a_row = len({position // config.page_size for position in range(step + 1)})
        peak = max(peak, params.n * (2 if guided else 1) * pages_of_a_row)
    rows = params.n * (2 if params.cfg_scale > 1 else 1)
    return rows > config.max_num_seqs or peak > config.num_pages


@settings(max_examples=150, deadline=None, print_blob=True, derandomize=True)
@given(
    config=configs,
    script=st.lists(moments, max_size=8),
    delay=st.integers(0, 3),
    longest_span=st.integers(1, 16),
)
def test_every_request_ends_as_it_should(
    config: EngineConfig, script: list[Moment], delay: int, longest_span: int
) -> None:
    """Fails if a request is lost, never ends, is overtaken, ends twice, draws other codes than
    alone, or if a page is lost.
    """
    engine, runner = fake_engine(config, tokens=TOKENS)
    record = Record(engine, runner)
    late_copies = LateCopies(engine.batch, delay)
    with (
        patch.object(engine._step_limiter, "span_limit", return_value=longest_span),
        patch.object(engine.batch, "fetch", late_copies.fetch),
        patch.object(runner, "before_span", record.check_forecast),
    ):
        for moment in script:
            record.ask(moment)
            record.step()
        for _ in range((TOKENS + delay + 1) * len(record.asked) + 1):
            if not engine.wait_for_work(timeout=0):
                break
            record.step()
    assert not engine.wait_for_work(timeout=0), "the engine does not come to an end"
    record.check_ends()
