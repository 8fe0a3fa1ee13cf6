"""Checkpoints that were fine-tuned to need no guidance (CCA, arXiv 2410.09347): files of the form
that its training writes load as LlamaGen's do, and an image takes one row.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from autoregressive.benchmarks.guessing import draw_all
from autoregressive.cli.drawing import resolve_settings
from autoregressive.models.config import GPTConfig
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, build_gpt
from autoregressive.serve.engine.batch import Batch
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig
from autoregressive.serve.engine.model_runner import ModelRunner
from autoregressive.serve.sample_c2i import build_engine_parser
from autoregressive.weights.finding import find_weights
from autoregressive.weights.loading import load_models

CODES = 64  # of the codebook, so that the test is quick


# Its training writes the weights of B, L and XL under "model", and those of XXL and 3B bare.
@pytest.mark.parametrize("model", ["GPT-XL", "GPT-3B"])
def test_a_checkpoint_that_needs_no_guidance_draws_with_one_row_an_image(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if such a file is refused or needs another flag, its tokens are not those of the plain
    loop without guidance, or the engine runs unconditional rows for nothing.
    """
    shape = GPTConfig(n_layer=1, n_head=1, dim=64)
    monkeypatch.setitem(GPT_models, model, partial(build_gpt, shape))
    gpt = GPT_models[model](vocab_size=CODES, block_size=576, num_classes=1000)
    gpt.init_weights(torch.Generator().manual_seed(3))
    weights = gpt.state_dict()
    file = tmp_path / f"c2i_{model.removeprefix('GPT-')}_384_CCA_0005000.pt"
    torch.save({"model": weights} if model == "GPT-XL" else weights, file)
    recipe = ["--gpt-model", model, "--image-size", "384", "--gpt-ckpt", str(file)]
    recipe += ["--cfg-scale", "1"]
    seen: list[tuple[int, int]] = []
    run = ModelRunner.run

    def count(self: ModelRunner, batch: Batch, rows: int, images: int, *others: int) -> None:
        seen.append((rows, images))
        run(self, batch, rows, images, *others)

    monkeypatch.setattr(ModelRunner, "run", count)
    settings = resolve_settings(
        build_engine_parser().parse_args(
            [
                *recipe, "--temperature", "0", "--device", "cpu", "--codebook-size", str(CODES),
                "--class-labels", "207", "360", "--pretrained-dir", str(tmp_path),
            ]
        )
    )  # fmt: skip
    found = find_weights(settings.model)
    assert found.gpt == file
    loaded = load_models(settings.model, found).gpt
    engine = Engine(loaded, None, EngineConfig(max_num_seqs=2))

    requests = draw_all(engine, settings.labels, [settings.sampling] * 2)

    assert max(seen) == (2, 2)
    assert all(rows == images for rows, images in seen)
    codes = torch.cat([request.codes for request in requests if request.codes is not None])
    plain = generate(gpt.eval(), torch.tensor(settings.labels), 576, sample_logits=False)
    assert torch.equal(codes, plain)
