"""The same request alone and in several kinds of company: its codes must not tell the
difference.
"""

from torch import Tensor

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.request import Request, RequestState

LABEL = 3


def the_request(tokens: int) -> SamplingParams:
    """Guided for most of its way, so that its rows change places with others' more than once."""
    return SamplingParams(
        cfg_scale=2.0, cfg_interval=2 * tokens // 3, top_k=0, top_p=0.97, seed=11, n=1
    )


def others(rows: int, tokens: int) -> list[SamplingParams]:
    """Requests of many kinds that start with that many rows in all."""
    kinds = [
        SamplingParams(cfg_scale=4.0, top_k=50, seed=1),
        SamplingParams(cfg_scale=1.0, top_k=0, temperature=0.7, seed=2),
        SamplingParams(cfg_scale=7.5, cfg_interval=tokens // 4, top_k=0, seed=3),
        SamplingParams(cfg_scale=1.0, temperature=0.0, top_k=0, seed=4),
        SamplingParams(cfg_scale=1.5, top_k=7, top_p=0.5, seed=5),
    ]
    chosen: list[SamplingParams] = []
    while rows > 0:
        params = kinds[len(chosen) % len(kinds)]
        chosen.append(params if params.rows <= rows else kinds[1])
        rows -= chosen[-1].rows
    return chosen


def codes_in_every_company(engine: Engine, rows: int) -> dict[str, Tensor]:
    """The request's codes [1, tokens] for each kind of company; `rows`, its own two included, run
    at most beside each other.
    """
    tokens = engine.shape.tokens
    params, many = the_request(tokens), others(rows - 2, tokens)
    drawn = {"alone": _finished(engine, engine.submit(LABEL, params))}

    crowd = [engine.submit(index % 7, other) for index, other in enumerate(many[: len(many) // 2])]
    request = engine.submit(LABEL, params)
    crowd += [engine.submit(index % 5, other) for index, other in enumerate(many[len(many) // 2 :])]
    drawn["in the middle of a batch"] = _finished(engine, request)
    assert all(other.state is RequestState.FINISHED for other in crowd)

    crowd = [engine.submit(index % 7, other) for index, other in enumerate(many)]
    while crowd[0].steps < tokens // 3:
        engine.step()
    drawn["submitted late"] = _finished(engine, engine.submit(LABEL, params))

    leaving, request = engine.submit(1, params), engine.submit(LABEL, params)
    staying = [
        engine.submit(index % 7, other) for index, other in enumerate(many[: len(many) // 2])
    ]
    while request.steps < tokens // 2:
        engine.step()
    engine.cancel(leaving)
    drawn["beside a cancelled one"] = _finished(engine, request)
    assert leaving.state is RequestState.CANCELLED
    assert all(other.state is RequestState.FINISHED for other in staying)
    return drawn


def _finished(engine: Engine, request: Request) -> Tensor:
    """The request's codes, once all that the engine has to do is done."""
    while engine.wait_for_work(timeout=0):
        engine.step()
        engine.audit()
    assert request.codes is not None
    return request.codes
