"""The floor's arithmetic, against the figures that docs and issues quote, and against sums written
out.
"""

from dataclasses import replace

import pytest

from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.scheduler import Limits
from autoregressive.serve.floor import Ceilings, Floor, job_floor, product_elements

H200 = Ceilings(read_bytes_per_second=4.24e12, operations_per_second=790e12)


def image_seconds(floor: Floor, rows: int, tokens: int) -> float:
    """The floor of all steps of rows that start together: linear in the context, so the mean step
    times the number. At step p each row reads p + 1 tokens.
    """
    return tokens * floor.step_seconds(rows, rows * (tokens + 1) / 2)


def floor_of(name: str, ceilings: Ceilings = H200) -> Floor:
    shape = GPT_SHAPES[name]
    return Floor(GPTConfig(shape.dim, shape.n_layer, shape.n_head, block_size=576), 2, ceilings)


@pytest.mark.parametrize(
    ("name", "weights_mb", "seconds"),
    [
        ("GPT-B", 195, 0.050),
        ("GPT-L", 650, 0.150),
        ("GPT-XL", 1505, 0.320),
        ("GPT-XXL", 2768, 0.561),
        ("GPT-3B", 6082, 1.019),
    ],
)
def test_the_floor_of_the_headline_job(name: str, weights_mb: int, seconds: float) -> None:
    """Fails if a product is forgotten or counted twice: 16 rows of 576 tokens on an H200, computed
    by hand before.
    """
    floor = floor_of(name)
    assert 2 * sum(product_elements(floor.config)) / 1e6 == pytest.approx(weights_mb, rel=0.005)
    assert image_seconds(floor, 16, 576) == pytest.approx(seconds, rel=0.01)


def test_many_rows_are_bound_by_arithmetic() -> None:
    """Fails if the larger of both limits is not taken, product by product."""
    floor = floor_of("GPT-XL")
    elements = sum(product_elements(floor.config))
    assert floor.step_seconds(2, 0) == pytest.approx(2 * elements / 4.24e12)
    assert floor.step_seconds(512, 0) == pytest.approx(2 * elements * 512 / 790e12)
    kv_seconds = floor.step_seconds(2, 1000) - floor.step_seconds(2, 0)
    assert kv_seconds == pytest.approx(1000 * 4 * 1280 * 36 / 4.24e12)


def test_quantised_weights_and_pages_are_read_as_they_lie() -> None:
    """Fails if the head counts as quantised, or a scale of a key or a value does not count."""
    plain = floor_of("GPT-XL")
    *layers, head = product_elements(plain.config)
    for scheme, size in (("fp8", 1), ("int8", 1), ("int4", 0.625)):
        floor = replace(plain, quantization=scheme)
        wanted = (size * sum(layers) + 2 * head) / 4.24e12
        assert floor.step_seconds(2, 0) == pytest.approx(wanted)
    assert replace(plain, kv_cache_dtype="fp8").kv_bytes_per_token == 2 * 36 * (1280 + 20 * 4)


def written_out(floor: Floor, rows_of_steps: list[list[int]]) -> float:
    """The sum over steps, each with its rows' positions."""
    return sum(
        floor.step_seconds(len(positions), sum(position + 1 for position in positions))
        for positions in rows_of_steps
    )


def test_a_job_is_the_sum_of_its_steps() -> None:
    """Fails if unconditional rows that leave early, or pictures that wait for others, are charged
    wrongly.
    """
    floor = floor_of("GPT-B")
    limits = Limits(tokens=4, page_size=2, max_rows=3, num_pages=6, num_slots=6, num_classes=1000)
    # guided for 2 steps
    guided, plain = (
        SamplingParams(cfg_interval=0),
        SamplingParams(cfg_scale=1.0),
    )
    found = job_floor(floor, limits, [guided, plain, plain, plain])
    # The first two start together; when the unconditional row has left, the third fits; the fourth
    # follows the first two.
    steps = [[0, 0, 0], [1, 1, 1], [2, 2, 0], [3, 3, 1], [2, 0], [3, 1], [2], [3]]
    assert found.steps == len(steps)
    assert found.seconds == pytest.approx(written_out(floor, steps))
    together = job_floor(floor, limits, [plain, plain, plain])
    assert together.seconds == pytest.approx(image_seconds(floor, 3, 4))
