"""The whole engine on a GPU: the kernels against torch's operations, precision, damage that stays
where it is, memory.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import reference_weights
from teacher import TeacherForced, naive_logits, reference_model
from torch import Tensor

from autoregressive.devices import default_precision
from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.model_runner import ModelRunner
from autoregressive.serve.engine.request import Request, RequestState
from kernels.attention_reference import attention_reference

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
GREEDY = SamplingParams(cfg_scale=2.0, temperature=0.0, top_k=0)


def random_gpt(name: str, dtype: torch.dtype, tokens: int = 64) -> Transformer:
    """Two layers of a published model's width, in eval mode on the GPU."""
    shape = GPT_SHAPES[name]
    gpt = Transformer(GPTConfig(dim=shape.dim, n_layer=2, n_head=shape.n_head, block_size=tokens))
    reference_weights(gpt, 7)
    return gpt.eval().requires_grad_(False).to(CUDA, dtype)


def run_out(engine: Engine) -> None:
    """Steps until nothing is left."""
    while engine.wait_for_work(timeout=0):
        engine.step()
        engine.audit()


def test_gpt_3b_draws_the_same_on_both_backends() -> None:
    """Fails if its heads of 100, which fill no power of two, are cut or padded otherwise than
    torch's operations have them.
    """
    shape = GPT_SHAPES["GPT-3B"]
    with torch.device("meta"):
        gpt = Transformer(
            GPTConfig(dim=shape.dim, n_layer=shape.n_layer, n_head=shape.n_head, block_size=64)
        ).eval()
    assert gpt.config.head_size == 100
    gpt = gpt.to_empty(device=CUDA).requires_grad_(False)
    gpt.init_weights(torch.Generator(CUDA).manual_seed(7))
    # The attention of each window would be compiled anew, which takes float32 ten seconds each.
    engines = [
        Engine(gpt, None, EngineConfig(8, attention_backend=backend, lookahead="off"))
        for backend in ("triton", "torch")
    ]
    codes, expected = (engine.generate([1, 7, 3, 900], GREEDY, decode=False) for engine in engines)
    assert len(expected.unique()) > 50
    assert torch.equal(codes, expected)


def test_an_unsupported_head_size_falls_back_and_says_so_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails if head size 72 is refused, drawn wrongly, or passed over in silence; or if every graph
    or layer says it again.
    """
    gpt = Transformer(
        GPTConfig(dim=288, n_layer=3, n_head=4, vocab_size=512, block_size=64, num_classes=10)
    )
    reference_weights(gpt, 8)
    gpt = gpt.eval().requires_grad_(False).to(CUDA)
    codes = Engine(gpt, None, EngineConfig(max_num_seqs=8)).generate(
        [1, 7, 3], GREEDY, decode=False
    )
    said = capsys.readouterr().err
    assert said.count("head size 72") == 1, said
    expected = Engine(gpt, None, EngineConfig(max_num_seqs=8, attention_backend="torch")).generate(
        [1, 7, 3], GREEDY, decode=False
    )
    assert "head size" not in capsys.readouterr().err
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("images", [2, 40], ids=["own products", "a library's products"])
def test_bf16_is_as_precise_as_the_naive_model(images: int) -> None:
    """Fails if the engine's bf16 logits are further (by 5 %) from float32's than the naive bf16
    model's, at 64 positions.
    """
    model, meta, expected = reference_model("gpt_b_256")
    codes = torch.from_numpy(np.resize(expected["tokens"], (images, meta["block_size"])))
    labels = [meta["labels"][image % len(meta["labels"])] for image in range(images)]
    positions = 64
    # [2, 2, positions, vocab_size]
    exact = naive_logits(model.to(CUDA), codes[:2], labels[:2], positions)
    naive = naive_logits(model.to(torch.bfloat16), codes[:2], labels[:2], positions)
    shape = BatchShape.of(2 * images, meta["block_size"], page_size=16)
    runner = ModelRunner(
        model, shape, shape.max_rows * shape.pages_per_row, EngineConfig(enforce_eager=True)
    )
    teacher = TeacherForced(runner, codes, labels)
    ours = torch.stack([teacher.logits(position)[:2] for position in range(positions)], dim=2)

    def error(logits: Tensor) -> float:
        return (logits - exact).double().square().mean().sqrt().item()

    print(
        f"RMS error of {2 * images} rows: {error(ours):.5f}, the naive model's {error(naive):.5f}"
    )
    assert error(ours) <= 1.05 * error(naive)


def test_a_gpu_without_bf16_is_as_precise_as_fp16_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what runs on a T4 (fp16, torch's operations) overflows, or its guided logits are far
    from float32's. This GPU passes for a T4.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    model, meta, expected = reference_model("gpt_b_256")
    codes, labels = torch.from_numpy(expected["tokens"]), meta["labels"]
    positions, scale = 64, meta["cfg_scale"]
    conditional, unconditional = naive_logits(model.to(CUDA), codes, labels, positions).unbind(1)
    exact = unconditional + (conditional - unconditional) * scale  # [images, positions, vocab_size]
    assert default_precision(CUDA) is torch.float16
    shape = BatchShape.of(2 * len(labels), meta["block_size"], page_size=16)
    config = EngineConfig(enforce_eager=True)
    runner = ModelRunner(
        model.to(torch.float16), shape, shape.max_rows * shape.pages_per_row, config
    )
    assert runner.operations.attention is attention_reference
    teacher = TeacherForced(runner, codes, labels)
    ours = torch.stack(
        [teacher.guided_logits(position, scale) for position in range(positions)], dim=1
    )
    error = (ours - exact).double().square().mean().sqrt().item() / exact.std().item()
    print(f"RMS error of the guided logits: {error:.5f} of their spread")
    assert error < 0.01


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_float32_draws_the_same_where_tf32_is_allowed(backend: str) -> None:
    """Fails if a library's float32 products, above 64 rows, are TF32's: their errors of 1e-3 turn
    greedy tokens.
    """
    gpt = random_gpt("GPT-B", torch.float32)
    codes = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        engine = Engine(gpt, None, EngineConfig(80, attention_backend=backend, lookahead="off"))
        codes.append(engine.generate(range(40), GREEDY, decode=False))
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.equal(*codes)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_lies_in_unused_pages_does_not_matter(backend: str) -> None:
    """Fails if a step reads a page, or a place in one, that its row has not written: all others are
    NaN, all the time.
    """
    gpt = random_gpt("GPT-B", torch.bfloat16)
    config = EngineConfig(max_num_seqs=16, num_pages=64, attention_backend=backend)
    clean, poisoned = Engine(gpt, None, config), Engine(gpt, None, config)
    for engine in (clean, poisoned):
        assert isinstance(engine.runner, ModelRunner)
        requests: list[Request] = []
        for seed in range(12):  # they come one after the other, so that pages change hands
            interval = [-1, 5, 30][seed % 3]
            params = SamplingParams(
                cfg_scale=[1.0, 3.0][seed % 2], cfg_interval=interval, top_k=0, seed=seed
            )
            requests.append(engine.submit(seed, params))
            engine.step()
            if engine is poisoned:
                held = {
                    page
                    for image in engine.scheduler.images
                    for row in image.rows
                    for page in row.pages
                }
                engine.runner.kv_pages[:, :, [page for page in range(64) if page not in held]] = (
                    torch.nan
                )
        run_out(engine)
        codes = torch.cat([request.codes for request in requests if request.codes is not None])
        assert len(codes) == len(requests)
        if engine is clean:
            expected = codes
    assert torch.equal(codes, expected)


def test_a_class_of_nan_fails_its_requests_alone() -> None:
    """Fails if NaN ends the process, reaches a neighbour or whoever gets its pages next, or is
    passed over.
    """
    gpt = random_gpt("GPT-B", torch.bfloat16)
    labels = [1, 5, 2, 5, 3]
    clean = Engine(gpt, None, EngineConfig(max_num_seqs=10, num_pages=40)).generate(
        labels, SamplingParams(top_k=0), decode=False
    )
    gpt.cls_embedding.embedding_table.weight[5] = torch.nan
    engine = Engine(gpt, None, EngineConfig(max_num_seqs=10, num_pages=40))
    for _ in range(2):  # the second time on the pages of the first
        requests = [
            engine.submit(label, SamplingParams(top_k=0), first_image=index)
            for index, label in enumerate(labels)
        ]
        run_out(engine)
        for label, request, codes in zip(labels, requests, clean, strict=True):
            if label == 5:
                assert request.state is RequestState.FAILED
                assert "NaN" in (request.error or "")
            else:
                assert request.codes is not None
                assert torch.equal(request.codes[0], codes)


def test_memory_beyond_weights_and_pages() -> None:
    """Fails if GPT-XL for 256 rows, pixels included, takes more than 2 GiB of the GPU beside its
    weights and its pages.

    That counts all that a process of its own takes, CUDA's context too.
    """
    script = Path(__file__).parents[1].joinpath("helpers", "measure_memory.py")
    torch.cuda.empty_cache()
    free_before = torch.cuda.mem_get_info()[0]
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    beyond = (
        free_before - measured["free_bytes"] - measured["weight_bytes"] - measured["page_bytes"]
    )
    print(
        {name: f"{size / 2**30:.2f} GiB" for name, size in (measured | {"beyond": beyond}).items()}
    )
    assert 0 < beyond <= 2 * 2**30
