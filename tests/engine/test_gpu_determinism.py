"""An image's codes depend on its request alone, in bf16 on a GPU: whatever the batch, with and
without CUDA graphs.
"""

from dataclasses import replace

import pytest
import torch
from company import codes_in_every_company
from conftest import reference_weights

from autoregressive import Pipeline
from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from kernels.operations import MANY_ROWS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", ["GPT-B", "GPT-3B"])
@pytest.mark.parametrize("rows", [MANY_ROWS, 128, 512])
@pytest.mark.parametrize(("weights", "pages"), [(None, "auto"), ("fp8", "fp8"), ("int8", "int8")])
def test_a_request_draws_the_same_in_any_company(
    model: str, rows: int, weights: str | None, pages: str
) -> None:
    """Fails if the order of a sum depends on the batch. By default it does not on Hopper, and with
    `deterministic` on no GPU.
    """
    shape = GPT_SHAPES[model]
    gpt = Transformer(GPTConfig(dim=shape.dim, n_layer=4, n_head=shape.n_head))
    reference_weights(gpt, 7)
    gpt = gpt.eval().requires_grad_(False).to("cuda", torch.bfloat16)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    config = EngineConfig(
        max_num_seqs=rows, deterministic=not hopper, quantization=weights, kv_cache_dtype=pages
    )
    drawn = codes_in_every_company(Engine(gpt, None, config), rows)
    # Without graphs a step has exactly the rows in use, not the next bucket's.
    without = replace(config, enforce_eager=True, num_pages=rows * 16)
    drawn |= {
        f"{company}, without graphs": codes
        for company, codes in codes_in_every_company(Engine(gpt, None, without), rows).items()
    }
    alone = drawn.pop("alone")
    assert len(alone.unique()) > 100
    assert [company for company, codes in drawn.items() if not torch.equal(codes, alone)] == []


def test_a_grids_images_are_those_that_are_drawn_alone() -> None:
    """Fails if codes or pixels of an image depend on the others of its grid."""
    pipe = Pipeline.from_pretrained("GPT-demo", device="cuda")
    grid = pipe.grid({"guidance": [1, 2, 4], "seed": [7, 8]}, "fox", progress=False)
    for codes, image in zip(grid.codes, grid.images, strict=True):
        seed, scale = image.record["seed"], image.record["cfg_scale"]
        alone = pipe("fox", seed=seed, cfg_scale=scale, progress=False)  # type: ignore[arg-type]
        assert torch.equal(alone.codes[0], codes)
        assert alone.images[0].tobytes() == image.tobytes()
