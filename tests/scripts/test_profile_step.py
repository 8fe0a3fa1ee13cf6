"""Where a step's time goes: kernels are told apart, times add up, and the script runs without a
GPU.
"""

import json

import profile_step
import pytest
from profile_step import ORDER, PRODUCTS, add_floor, operations_of, summed

from autoregressive.errors import UserError
from autoregressive.models.config import GPTConfig
from autoregressive.serve.floor import Ceilings, Floor, product_elements
from kernels import attention, norm, sampling
from kernels.hopper import attention as hopper_attention
from kernels.hopper import products as hopper_products

LAYER = [
    "qkv product",
    "attention",
    "combine",
    "output product",
    "add_norm",
    "swiglu",
    "down product",
    "add_norm",
]
STEP = ["embed", *LAYER, *LAYER, "head", "draw"]


# A step whose products norm their inputs and add themselves: kernel and operation.
FUSED_LAYER = [
    (hopper_products._fused_linear_kernel.__name__, "qkv product"),
    (hopper_attention._hopper_attention_kernel.__name__, "attention"),
    (attention._combine_kernel.__name__, "combine"),
    (hopper_products._fused_project_kernel.__name__, "output product"),
    (hopper_products._fused_swiglu_kernel.__name__, "swiglu"),
    (hopper_products._fused_project_kernel.__name__, "down product"),
]
FUSED_STEP = [
    (norm._embed_kernel.__name__, "embed"),
    *FUSED_LAYER * 2,
    (hopper_products._fused_linear_kernel.__name__, "head"),
    (sampling._draw_kernel.__name__, "draw"),
]


def kernel_of(operation: str) -> str:
    """How our own kernels are called: all products but the gated one alike."""
    return (
        "_linear_kernel"
        if operation in PRODUCTS and operation != "swiglu"
        else f"_{operation}_kernel"
    )


def test_products_are_told_apart_by_their_place() -> None:
    """Fails if one product's time is charged to another, in the last layer or in the next step."""
    assert operations_of([kernel_of(operation) for operation in STEP * 2], layers=2) == STEP * 2


def test_fused_products_are_told_apart_by_their_place() -> None:
    """Fails if the profile knows a kernel by another name, or charges it to another operation for
    want of an `add_norm`.
    """
    names, operations = zip(*FUSED_STEP * 2, strict=True)
    assert operations_of(names, layers=2) == list(operations)


def test_a_librarys_kernels_belong_to_the_product_that_is_due() -> None:
    """Fails if products of many rows, which may be two kernels each, shift everything
    after them.
    """
    names, expected = [], []
    for operation in STEP:
        if operation in PRODUCTS:
            names += ["nvjet_sm90", "splitKreduce"]
            expected += [operation] * 2
        else:
            names.append(kernel_of(operation))
            expected.append(operation)
        if operation == "swiglu":
            names.append("_gate_kernel")
            expected.append("gate")
    assert operations_of(names, layers=2) == expected


def test_what_operations_add_is_the_step() -> None:
    """Fails if overlapping kernels are counted twice in what sums to the step, or once in what they
    are busy.
    """
    kernels = [
        (kernel_of(operation), 10.0 * at, 10.0 * at + 15) for at, operation in enumerate(STEP * 2)
    ]
    times = summed(list(reversed(kernels)), layers=2, steps=2)
    assert [each["operation"] for each in times] == [name for name in ORDER if name in STEP]
    step_us = (kernels[-1][2] - kernels[0][1]) / 2
    assert sum(each["adds_us"] for each in times) == pytest.approx(step_us)
    assert sum(each["busy_us"] for each in times) == pytest.approx(15 * len(STEP))
    norm = next(each for each in times if each["operation"] == "add_norm")
    assert (norm["launches"], norm["busy_us"], norm["mean_us"]) == (4, 60, 15)
    with pytest.raises(UserError, match="2 of 3 steps"):
        summed(kernels, layers=2, steps=3)


@pytest.mark.parametrize(
    "names",
    [[kernel_of(operation) for operation in STEP], [name for name, _ in FUSED_STEP]],
    ids=["plain", "fused"],
)
def test_the_operations_floors_are_the_steps(names: list[str]) -> None:
    """Fails if an operation's bytes are left out of its share, or counted for two."""
    floor = Floor(GPTConfig(dim=256, n_layer=2, n_head=4), 2, Ceilings(4e12, 8e14))
    kernels = [(name, 10.0 * at, 10.0 * at + 10) for at, name in enumerate(names)]
    times = summed(kernels, layers=2, steps=1)
    add_floor(times, floor, rows=16, context=100)
    assert sum(each["floor_us"] or 0.0 for each in times) == pytest.approx(
        floor.step_seconds(16, 1600) * 1e6
    )
    assert (
        sum(each["bytes"] or 0 for each in times)
        == sum(product_elements(floor.config)) * floor.element_bytes
        + 1600 * floor.kv_bytes_per_token
    )
    norm = {"add_norm"} if "_add_norm_kernel" in names else set()
    assert {each["operation"] for each in times if each["floor_us"] is None} == {
        "embed",
        "combine",
        "draw",
    } | norm


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.5), ("int4", 0.3125)])
def test_quantised_weights_have_a_floor_of_their_own(quantization: str, share: float) -> None:
    """Fails if quantised weights count 16 bits, or the head counts as quantised."""
    config = GPTConfig(dim=256, n_layer=2, n_head=4)
    floors = [Floor(config, 2, Ceilings(4e12, 8e14), scheme) for scheme in (None, quantization)]
    plain, quantised = (
        summed([(kernel_of(name), 10.0 * at, 0.0) for at, name in enumerate(STEP)], 2, 1)
        for _ in floors
    )
    for times, floor in zip((plain, quantised), floors, strict=True):
        add_floor(times, floor, rows=16, context=100)
    for before, after in zip(plain, quantised, strict=True):
        if before["operation"] in PRODUCTS:
            expected = 1 if before["operation"] == "head" else share
            assert after["bytes"] / before["bytes"] == expected, before["operation"]
            assert after["floor_us"] / before["floor_us"] == pytest.approx(expected)


@pytest.mark.parametrize("flags", [(), ("--quantization", "int8", "--kv-cache-dtype", "int8")])
def test_it_runs_on_a_cpu(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the script is out of step with the engine: an operation that is not called, or is
    called by another name.
    """
    profile_step.main(["--device", "cpu", "--rows", "2", "--context", "40", *flags])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    launches = {each["operation"]: each["launches"] for each in report["operations"]}
    assert launches == dict.fromkeys(("embed", "head", "draw"), 1) | {
        "add_norm": 16
    } | dict.fromkeys(("qkv product", "attention", "output product", "swiglu", "down product"), 8)
    spent_us = sum(each["busy_us"] for each in report["operations"])
    assert 0.5 * report["step_us"] < spent_us <= report["step_us"]


@pytest.mark.parametrize(
    "typed", [["--rows", "3"], ["--rows", "0"], ["--context", "0"], ["--context", "257"]]
)
def test_a_mistake_is_told(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a span beyond the image's end, or half a pair, is measured."""
    with pytest.raises((UserError, SystemExit)) as ended:
        profile_step.main(["--device", "cpu", "--gpt-model", "GPT-demo", *typed])
    assert getattr(ended.value, "code", 2) == 2
    assert typed[0] in str(ended.value) + capsys.readouterr().err
