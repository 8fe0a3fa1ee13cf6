"""Steps of a runner along given codes, so that logits of every position can be compared whatever
would have been drawn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from conftest import load_reference, reference_weights
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from autoregressive.models.config import GPTConfig
from autoregressive.models.generate import ATTENTION_BACKENDS
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.models.sampling_params import SamplingParams
from autoregressive.serve.engine.engine import Engine, EngineConfig, RunnerFactory
from autoregressive.serve.engine.model_runner import ModelRunner

TINY = ["gpt_tiny_head64", "gpt_tiny_head100", "gpt_tiny_interval5", "gpt_tiny_nocfg"]


def reference_model(name: str) -> tuple[Transformer, dict[str, Any], dict[str, np.ndarray]]:
    """The model of a file of tests/reference, float32 on the CPU, with the file's description and
    arrays.
    """
    meta, expected = load_reference(name)
    if "config" in meta:
        model = Transformer(GPTConfig(**meta["config"]))
    else:
        model = GPT_models[meta["model"]](block_size=meta["block_size"])
    reference_weights(model, meta["seed"])
    return model.eval().requires_grad_(False), meta, expected


@torch.no_grad()
def engine_codes(
    name: str,
    device: torch.device,
    backend: str,
    make_runner: RunnerFactory = ModelRunner,
    **engine: object,
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy codes of the engine for a reference file, and the file's own."""
    model, meta, expected = reference_model(name)
    model.to(device)
    config = EngineConfig(max_num_seqs=8, page_size=4, attention_backend=backend, **engine)  # type: ignore[arg-type]
    params = SamplingParams(
        cfg_scale=meta["cfg_scale"], cfg_interval=meta["cfg_interval"], temperature=0, top_k=0
    )
    codes = Engine(model, None, config, make_runner).generate(meta["labels"], params, decode=False)
    return codes.numpy(), expected["tokens"]


def naive_logits(
    model: Transformer, codes: Tensor, labels: Sequence[int], positions: int
) -> Tensor:
    """The naive loop's logits along given codes, with its dense cache: float32 [images, 2,
    positions, vocab_size], as above.
    """
    device, images = model.output.weight.device, len(labels)
    classes = torch.tensor([*labels, *[model.config.num_classes] * images], device=device)
    tokens = codes.to(device).long().repeat(2, 1)
    model.setup_caches(2 * images, positions, model.output.weight.dtype)
    steps = []
    with sdpa_kernel(ATTENTION_BACKENDS):
        for position in range(positions):
            at = torch.tensor([position], device=device)
            if position == 0:
                steps.append(model(cond_idx=classes, input_pos=at)[:, -1])
            else:
                steps.append(model(idx=tokens[:, position - 1 : position], input_pos=at)[:, -1])
    return torch.stack(steps, dim=1).unflatten(0, (2, images)).transpose(0, 1)
