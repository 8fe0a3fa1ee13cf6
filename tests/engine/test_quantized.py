"""Engines with quantised weights and fp8 pages, on a CPU with the torch operations."""

from dataclasses import replace

import pytest
import torch
from company import codes_in_every_company
from conftest import reference_weights
from fused_runners import PairedRunner
from teacher import naive_logits

from autoregressive.benchmarks.teacher_forcing import TeacherForced
from autoregressive.errors import SettingError
from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine import memory as engine_memory
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.kv_pages import page_bytes, page_dtype
from autoregressive.serve.engine.layers import LibraryLayers, PlainLayers, QuantizedLayers
from autoregressive.serve.engine.memory import pool_pages
from autoregressive.serve.engine.model_runner import ModelRunner, check_device
from autoregressive.weights.quantized import (
    QuantizedLinear,
    products_of,
    quantization_of,
    quantize_products,
    weight_bytes,
    weights_of,
)
from kernels import QUANTIZATIONS
from kernels.quantization import FP8, QuantizedMatrix

SETTINGS: list[tuple[str | None, str]] = [(scheme, "auto") for scheme in QUANTIZATIONS]
SETTINGS += [(None, "fp8"), (None, "int8"), ("int8", "int8")]
CONFIG = EngineConfig(max_num_seqs=14, page_size=4, attention_backend="torch")


def small_model(tokens: int = 64) -> Transformer:
    config = GPTConfig(
        dim=128, n_layer=2, n_head=2, vocab_size=512, block_size=tokens, num_classes=10
    )
    model = Transformer(config).eval().requires_grad_(False)
    reference_weights(model, 7)
    return model


@pytest.mark.parametrize(("quantization", "pages"), SETTINGS)
def test_a_request_draws_the_same_in_any_company(quantization: str | None, pages: str) -> None:
    """Fails if a neighbour, a place in the batch or the moment of joining reaches a request's
    codes.
    """
    config = replace(CONFIG, quantization=quantization, kv_cache_dtype=pages)
    drawn = codes_in_every_company(Engine(small_model(), None, config), rows=14)
    alone = drawn.pop("alone")
    assert [company for company, codes in drawn.items() if not torch.equal(codes, alone)] == []


@pytest.mark.parametrize(("quantization", "pages"), SETTINGS)
def test_lookahead_and_the_interval_change_no_code(quantization: str | None, pages: str) -> None:
    """Fails if a token that a window computed differs from the one that is drawn alone, or what an
    unconditional row leaves behind is read.
    """
    params = [
        SamplingParams(cfg_scale=2.0, top_k=0, seed=seed, cfg_interval=interval)
        for seed, interval in ((1, -1), (2, 10), (3, 40))
    ]
    drawn = [
        Engine(
            small_model(),
            None,
            replace(CONFIG, quantization=quantization, kv_cache_dtype=pages, lookahead=lookahead),
        ).generate([1, 2, 3], params, decode=False)
        for lookahead in ("off", 4, 7)
    ]
    assert torch.equal(drawn[1], drawn[0])
    assert torch.equal(drawn[2], drawn[0])


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_both_loops_run_the_same_quantised_weights(scheme: str) -> None:
    """Fails if the engine reads other numbers than the plain loop, such as a neighbour's scales."""
    model, labels = small_model(), [3, 4]
    quantize_products(model, scheme)
    codes = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(1))
    wanted = naive_logits(model, codes, labels, 16)
    shape = BatchShape.of(4, 64, 4)
    forced = TeacherForced(ModelRunner(model, shape, 64, CONFIG), codes.int(), labels)
    for position in range(16):
        got = forced.logits(position)
        torch.testing.assert_close(got, wanted[:, :, position], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_layers_of_paired_weights_run_the_same_model(scheme: str) -> None:
    """Guards what else only a GPU of compute capability 9.0 runs; and that the plain loop and a
    second runner find the weights, which have another order then.
    """
    model, labels = small_model(), [3, 4]
    quantize_products(model, scheme)
    codes = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(1))
    wanted = naive_logits(model, codes, labels, 16)
    for _ in range(2):
        runner = PairedRunner(model, BatchShape.of(4, 64, 4), 64, CONFIG)
        assert type(runner.layers_for(4)) is QuantizedLayers
        forced = TeacherForced(runner, codes.int(), labels)
        for position in range(16):
            torch.testing.assert_close(
                forced.logits(position), wanted[:, :, position], atol=1e-4, rtol=1e-4
            )
        assert torch.equal(naive_logits(model, codes, labels, 16), wanted)


@pytest.mark.parametrize(("pages", "most"), [("fp8", 0.05), ("int8", 0.01)])
def test_scaled_pages_stay_near_the_exact_ones(pages: str, most: float) -> None:
    """Fails if scales are lost or exchanged: logits would be far off, or nearly all of them."""
    codes = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(1)).int()
    shape = BatchShape.of(4, 64, 4)
    runners = [
        ModelRunner(small_model(), shape, 64, replace(CONFIG, kv_cache_dtype=pages))
        for pages in ("auto", pages)
    ]
    assert runners[1].kv_pages.pages.itemsize == 1
    exact, rounded = (TeacherForced(runner, codes, [3, 4]) for runner in runners)
    for position in range(32):
        wanted, got = exact.logits(position), rounded.logits(position)
        assert (got - wanted).norm() < most * wanted.norm(), position
    assert not torch.equal(got, wanted)


def test_only_the_layers_products_are_quantised() -> None:
    """Fails if the head, an embedding or a norm is, or a product is not; or if a matrix is held
    twice, or converted with the rest.
    """
    model = small_model()
    engine = Engine(model, None, replace(CONFIG, quantization="fp8"))
    assert quantization_of(model) == "fp8"
    products = dict(products_of(model))
    assert len(products) == 10
    assert all(isinstance(product, QuantizedLinear) for product in products.values())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.output.weight.shape == (512, 128)
    assert isinstance(engine.runner, ModelRunner)
    layer = engine.runner.weights.layers[0]
    assert isinstance(layer.gate_up, QuantizedMatrix)
    halves = [weights_of(products[f"layers.0.feed_forward.{name}"]) for name in ("w1", "w3")]
    for half, values in zip(halves, layer.gate_up.values.chunk(2), strict=True):
        assert isinstance(half, QuantizedMatrix)
        assert half.values.data_ptr() == values.data_ptr()
    model.to(torch.bfloat16)
    matrix = weights_of(products["layers.0.attention.wo"])
    assert isinstance(matrix, QuantizedMatrix)
    assert (matrix.values.dtype, matrix.scales.dtype) == (FP8, torch.float32)


def test_weights_that_are_quantised_already_are_not_quantised_in_another_way() -> None:
    """Fails if a second quantisation adds its errors to the first one's, or the same is refused."""
    model = small_model()
    quantize_products(model, "int8")
    Engine(model, None, replace(CONFIG, quantization="int8"))
    Engine(model, None, CONFIG)
    with pytest.raises(SettingError, match="quantization fp8: the weights are int8 already"):
        Engine(model, None, replace(CONFIG, quantization="fp8"))


@pytest.mark.parametrize("model", ["GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B"])
@pytest.mark.parametrize("pages", ["fp8", "int8"])
def test_scaled_pages_hold_more_rows(
    model: str, pages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if fewer than 1.85 times the rows fit the same pool, or if pages take other memory than
    admission counts.
    """
    with torch.device("meta"):
        gpt = GPT_models[model](block_size=576).to(torch.bfloat16)
    configs = [EngineConfig(kv_cache_dtype=dtype) for dtype in ("auto", pages)]
    plain, scaled = (page_bytes(gpt, 16, page_dtype(gpt, config)) for config in configs)
    assert plain / scaled >= 1.85
    shape = BatchShape.of(10**4, 576, 16)
    monkeypatch.setattr(engine_memory, "memory_of", lambda device: (64 * 2**30, 64 * 2**30))
    rows = [pool_pages(gpt, shape, config) // shape.pages_per_row for config in configs]
    assert rows[1] >= 1.85 * rows[0] - 1


@pytest.mark.parametrize("pages", ["auto", "fp8", "int8"])
def test_pages_take_the_memory_that_is_counted(pages: str) -> None:
    """Fails if scales are not counted."""
    model, config = small_model(), replace(CONFIG, kv_cache_dtype=pages, num_pages=37)
    engine = Engine(model, None, config)
    assert isinstance(engine.runner, ModelRunner)
    counted = 37 * page_bytes(model, 4, page_dtype(model, config))
    assert engine.runner.kv_pages.nbytes == counted


def test_gpt_3b_takes_at_most_the_memory_that_is_promised() -> None:
    """Fails if the weights of GPT-3B take more than 3.3 GB in fp8."""
    shape = GPT_SHAPES["GPT-3B"]
    with torch.device("meta"):
        one = Transformer(replace(shape, n_layer=1, block_size=576)).to(torch.bfloat16)
        none = weight_bytes(one) - sum(parameter.nbytes for parameter in one.layers[0].parameters())
    quantize_products(one, "fp8")
    a_layer = weight_bytes(one) - none
    assert none + shape.n_layer * a_layer < 3.3e9


def test_large_and_small_rows_take_layers_that_read_quantised_weights() -> None:
    """Fails if a library's products, or those of Hopper, get weights that they cannot read."""
    model = small_model()
    quantize_products(model, "int8")
    runner = ModelRunner(model, BatchShape.of(4, 64, 4), 64, CONFIG)
    factory = replace(runner._factory, library=True)
    assert {factory.kind(rows) for rows in (1, 64, 65, 512)} == {PlainLayers}
    assert replace(factory, quantized=False).kind(512) is LibraryLayers


@pytest.mark.parametrize("setting", ["quantization", "kv_cache_dtype"])
def test_fp8_needs_a_gpu_that_has_it(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an older GPU is given fp8, which it cannot convert, or is not told what it can."""
    config = EngineConfig(**{setting: "fp8"})  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    told = "compute capability 8.6, and fp8 takes 8.9; "
    with pytest.raises(SettingError, match=told + "use int8"):
        check_device(config, torch.device("cuda"))
    with pytest.raises(SettingError, match=told + "convert the original weights to int8"):
        check_device(EngineConfig(), torch.device("cuda"), "fp8")  # of a checkpoint
    check_device(EngineConfig(quantization="int8", kv_cache_dtype="int8"), torch.device("cuda"))
    check_device(config, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    check_device(config, torch.device("cuda"))


@pytest.mark.parametrize(
    ("setting", "value"), [("quantization", "fp4"), ("kv_cache_dtype", "int4")]
)
def test_other_settings_are_refused(setting: str, value: str) -> None:
    """Fails if a setting that does nothing is accepted."""
    with pytest.raises(SettingError, match=f"{setting} {value}: must be one of"):
        EngineConfig(**{setting: value})  # type: ignore[arg-type]
