"""Equality with LlamaGen's own code, on the outputs stored in tests/reference."""

import json

import numpy as np
import pytest
import torch
from conftest import REFERENCE, load_reference, reference_weights
from torch.nn.attention import sdpa_kernel

from autoregressive.models.config import GPTConfig
from autoregressive.models.generate import ATTENTION_BACKENDS, filter_logits, generate
from autoregressive.models.gpt import GPT_models, Transformer
from tokenizer.tokenizer_image.vq_model import VQ_models

SHAPES = json.loads((REFERENCE / "state_dict_shapes.json").read_text())
TINY = ["gpt_tiny_head64", "gpt_tiny_head100", "gpt_tiny_interval5", "gpt_tiny_nocfg"]


def run_greedily(
    name: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, dict[str, np.ndarray]]:
    """Greedy codes [images, tokens] and guided logits [images, recorded steps, vocab] of our loop,
    and the reference's arrays.
    """
    meta, expected = load_reference(name)
    if "config" in meta:
        model = Transformer(GPTConfig(**meta["config"]))
    else:
        model = GPT_models[meta["model"]](block_size=meta["block_size"])
    reference_weights(model, meta["seed"])
    model.eval().to(device)
    steps = meta.get("positions", range(model.config.block_size))
    recorded: list[torch.Tensor] = []

    def record(step: int, logits: torch.Tensor) -> None:
        if step in steps:
            recorded.append(logits.float().cpu())

    codes = generate(
        model,
        torch.tensor(meta["labels"], device=device),
        model.config.block_size,
        cfg_scale=meta["cfg_scale"],
        cfg_interval=meta["cfg_interval"],
        temperature=meta["temperature"],
        top_k=meta["top_k"],
        on_logits=record,
    )
    return codes.cpu(), torch.stack(recorded, dim=1), expected


def assert_equal_to_reference(name: str, device: torch.device) -> None:
    codes, logits, expected = run_greedily(name, device)
    wanted = (
        expected["guided_logits"]
        if "guided_logits" in expected
        else expected["guided_logits_at_positions"]
    )
    assert codes.dtype == torch.int32
    assert np.array_equal(codes.numpy(), expected["tokens"])
    assert np.abs(logits.numpy() - wanted).max() < 1e-3


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_and_logits_are_llamagens(name: str) -> None:
    """Guards rotary table, norms, cache positions, guidance and its interval, head size 100, and no
    guidance.

    GPT-B's are compared in tests/weights/test_published_checkpoints.py.
    """
    assert_equal_to_reference(name, torch.device("cpu"))


def test_the_comparison_notices_a_wrong_model() -> None:
    """A comparison that passes whatever it is given would guard nothing."""
    meta, expected = load_reference("gpt_tiny_head64")
    model = Transformer(GPTConfig(**meta["config"]))
    reference_weights(model, meta["seed"] + 1)
    codes = generate(
        model.eval(), torch.tensor(meta["labels"]), 16, cfg_scale=meta["cfg_scale"], top_k=1
    )
    assert not np.array_equal(codes.numpy(), expected["tokens"])


def test_attention_may_take_the_paths_that_llamagen_leaves_it() -> None:
    """One path fewer made the compiled baseline twice as slow on a GPU, and the engine look twice
    as good.
    """

    def enabled() -> list[bool]:
        switches = torch.backends.cuda
        return [
            switches.flash_sdp_enabled(),
            switches.mem_efficient_sdp_enabled(),
            switches.math_sdp_enabled(),
            switches.cudnn_sdp_enabled(),
        ]

    with (
        pytest.warns(FutureWarning, match="deprecated"),
        torch.backends.cuda.sdp_kernel(
            enable_flash=False, enable_mem_efficient=False, enable_math=True
        ),
    ):
        llamagens = enabled()
    with sdpa_kernel(ATTENTION_BACKENDS):
        assert enabled() == llamagens


def test_vq16_pixels_are_llamagens() -> None:
    """Guards the decoder's layers and the normalised codebook."""
    meta, expected = load_reference("vq16_grid8")
    model = VQ_models[meta["model"]](codebook_size=16384, codebook_embed_dim=8)
    reference_weights(model, meta["seed"])
    with torch.no_grad():
        pixels = model.eval().decode_code(
            torch.from_numpy(expected["codes"]), [2, 8, meta["grid"], meta["grid"]]
        )
    assert np.abs(pixels.numpy() - expected["pixels"].astype(np.float32)).max() < 1e-2


@pytest.mark.parametrize("case", range(6))
def test_filtered_probabilities_are_llamagens(case: int) -> None:
    """Guards temperature, top-k with ties kept, top-p keeping the first token over the threshold,
    and their order.
    """
    _, expected = load_reference("sampling_filter")
    top_k, top_p, temperature = expected[f"case{case}_params"]
    logits = torch.from_numpy(expected["logits"]) / float(temperature)
    probabilities = filter_logits(logits, int(top_k), float(top_p)).softmax(dim=-1)
    assert np.abs(probabilities.numpy() - expected[f"case{case}_probs"]).max() < 1e-6


def test_ties_at_the_kth_logit_are_all_kept() -> None:
    """A filter by rank instead of by value would keep two of these five."""
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("name", list(SHAPES))
def test_state_dicts_have_llamagens_keys_and_shapes(name: str) -> None:
    """A published checkpoint must load strictly."""
    with torch.device("meta"):
        model = (GPT_models if name.startswith("GPT") else VQ_models)[name]()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*TINY, "gpt_b_256"])
def test_greedy_tokens_and_logits_are_llamagens_on_a_gpu(name: str) -> None:
    """TF32 left on, or a cache on the wrong device, would show here."""
    assert_equal_to_reference(name, torch.device("cuda"))
