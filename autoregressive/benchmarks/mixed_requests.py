"""Requests that differ in all that a draw depends on, drawn as a service would: some come late,
some are cancelled, and pages are scarce. Codes must not tell.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig, LookaheadSetting
from autoregressive.serve.engine.request import Request
from kernels.operations import MANY_ROWS

MOST_ROWS = 4  # of a request
_AUTO_ROWS = 24  # some passes of "auto" then have a window, and others have none
_AUDITED_SHARE = 0.2  # of all spans: an audit takes the host as long as a span
_SUBMITTED = (0, 0, 0, 1, 8)  # requests that come between two spans


@dataclass(frozen=True)
class Wanted:
    """A request before it is submitted."""

    label: int
    params: SamplingParams
    first_image: int


def mixed_requests(pictures: int, tokens: int, num_classes: int, seed: int = 0) -> list[Wanted]:
    """Requests of so many pictures over classes, guidance, intervals, temperatures, filters, seeds
    and counts.
    """
    generator = random.Random(seed)  # noqa: S311 -- requests, no secrets
    wanted, left = [], pictures
    while left:
        params = SamplingParams(
            cfg_scale=generator.choice([1.0, 1.5, 2.0, 4.0, 7.5]),
            cfg_interval=generator.choice([-1, -1, generator.randrange(tokens)]),
            temperature=generator.choice([0.0, 0.7, 1.0, 1.0, 1.3]),
            top_k=generator.choice([0, 0, 1, 50, 500]),
            top_p=generator.choice([1.0, 1.0, 0.9, 0.5]),
            seed=generator.randrange(2**63),
            n=min(left, generator.choice([1, 1, 2])),
        )
        wanted.append(
            Wanted(generator.randrange(num_classes), params, generator.choice([0, 0, 7, 2**20]))
        )
        left -= params.n
    return wanted


def draw_mixed(engine: Engine, wanted: Sequence[Wanted], seed: int = 0) -> list[Request]:
    """Draws the requests, which come one after the other while others run. Further ones are
    cancelled on their way. Returns the former in their order; all have ended.
    """
    generator = random.Random(seed)  # noqa: S311 -- arrivals, no secrets
    waiting = deque(wanted)
    requests: list[Request] = []
    leaving: list[Request] = []
    while waiting or engine.wait_for_work(timeout=0):
        for _ in range(min(len(waiting), generator.choice(_SUBMITTED))):
            each = waiting.popleft()
            requests.append(engine.submit(each.label, each.params, each.first_image))
            if generator.random() < 0.15:
                other = replace(each.params, seed=generator.randrange(2**63))
                leaving.append(engine.submit(each.label, other))
        if leaving and generator.random() < 0.3:
            engine.cancel(leaving.pop(0))
        engine.step()
        if generator.random() < _AUDITED_SHARE:
            engine.audit()
    return requests


def scarce_config(
    lookahead: LookaheadSetting,
    tokens: int,
    *,
    max_num_seqs: int | None = None,
    page_size: int = 16,
    deterministic: bool = False,
    enforce_eager: bool = False,
) -> EngineConfig:
    """A configuration whose pool holds a quarter of what its rows may ask for, or the largest
    request of `mixed_requests`.

    Args:
        max_num_seqs: None: as many as a GPU draws the same codes with in any company, or 24 with
            "auto". Windows of more than 16 take more then, and need `deterministic`.
    """
    if max_num_seqs is None:
        window = 1 if lookahead == "off" else lookahead
        rows = _AUTO_ROWS if isinstance(window, str) else MANY_ROWS // window
        max_num_seqs = max(MOST_ROWS, rows)
    pages = -(-tokens // page_size)
    return EngineConfig(
        max_num_seqs,
        page_size=page_size,
        num_pages=pages * max(MOST_ROWS, max_num_seqs // 4),
        deterministic=deterministic,
        enforce_eager=enforce_eager,
        lookahead=lookahead,
    )


def equal_pictures(requests: Sequence[Request], others: Sequence[Request]) -> int:
    """How many pictures of finished requests have the same codes in both runs."""
    equal = 0
    for request, other in zip(requests, others, strict=True):
        if request.codes is not None and other.codes is not None:
            equal += int((request.codes == other.codes).all(dim=1).sum())
    return equal
