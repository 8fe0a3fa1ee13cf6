"""The Triton kernels at a published model's size in the interpreter."""

import numpy as np
import torch
from kernel_cases import LargeTilesRunner
from teacher import reference_model
from torch import Tensor

from autoregressive.benchmarks.teacher_forcing import TeacherForced
from autoregressive.models.gpt import Transformer, TransformerBlock
from autoregressive.serve.engine.batch import BatchShape
from autoregressive.serve.engine.engine_config import EngineConfig


def test_gpt_b_logits_are_llamagens() -> None:
    """The kernels at a published model's size: guided logits at LlamaGen's five recorded positions,
    for one of the two images.

    One step has all five, as if five images had come so far. Keys and values of the positions
    before come from the naive model; what lies behind is NaN.
    """
    model, meta, expected = reference_model("gpt_b_256")
    wanted, codes, labels = (
        expected["guided_logits_at_positions"][0],
        torch.from_numpy(expected["tokens"][:1]),
        meta["labels"][:1],
    )
    positions = torch.tensor(meta["positions"])
    images, shape = (
        len(positions),
        BatchShape.of(2 * len(positions), meta["block_size"], page_size=16),
    )
    runner = LargeTilesRunner(
        model,
        shape,
        shape.max_rows * shape.pages_per_row,
        EngineConfig(attention_backend="triton"),
        pieces=3,
    )
    cache = naive_keys_and_values(model, codes, labels)
    behind = torch.arange(shape.tokens) >= positions[:, None]  # [images, tokens]
    # [layers, 2, images, 2, heads, tokens, ...]
    known = cache[:, :, None].masked_fill(behind[:, None, None, :, None], torch.nan)
    # [layers, 2, rows, pages, heads, ...]
    in_pages = known.flatten(2, 3).unflatten(4, (-1, shape.page_size)).transpose(3, 4)
    runner.kv_pages.pages.copy_(in_pages.flatten(2, 3))
    teacher = TeacherForced(runner, codes.expand(images, -1), labels * images)
    guided = teacher.guided_logits(positions, meta["cfg_scale"])
    assert np.abs(guided.numpy() - wanted).max() < 1e-3


@torch.no_grad()
def naive_keys_and_values(model: Transformer, codes: Tensor, labels: list[int]) -> Tensor:
    """What the naive model caches: [layers, 2, rows, heads, tokens, head_size], two rows an image
    as `TeacherForced` has them.
    """
    tokens, no_class = codes.shape[1], model.config.num_classes
    of_rows = torch.tensor([label for image_label in labels for label in (image_label, no_class)])
    model.setup_caches(len(of_rows), tokens, torch.float32)
    model(
        idx=codes[:, :-1].repeat_interleave(2, dim=0),
        cond_idx=of_rows,
        input_pos=torch.arange(tokens),
    )
    caches = [
        block.attention.kv_cache for block in model.layers if isinstance(block, TransformerBlock)
    ]
    return torch.stack(
        [torch.stack([cache.k_cache, cache.v_cache]) for cache in caches if cache is not None]
    )
