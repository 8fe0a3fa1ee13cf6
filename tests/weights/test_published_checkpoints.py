"""The promise to LlamaGen's users, end to end: files of the published form in, LlamaGen's tokens
out.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_reference, reference_weights
from PIL import Image

from autoregressive.models.gpt import GPT_models
from autoregressive.sample import naive, sample_c2i
from tokenizer.tokenizer_image.vq_model import VQ_models


def test_the_command_draws_llamagens_tokens_from_checkpoints_in_the_published_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if finding, unwrapping or loading weights, the defaults, or the loop with its logits
    differ from LlamaGen's.
    """
    meta, expected = load_reference("gpt_b_256")
    gpt, vq = GPT_models["GPT-B"](block_size=meta["block_size"]), VQ_models["VQ-16"]()
    reference_weights(gpt, meta["seed"])
    reference_weights(vq, 6)
    training = {
        "optimizer": {"state": {}},
        "steps": 300_000,
        "args": argparse.Namespace(epochs=300),
    }
    torch.save({"model": gpt.state_dict(), **training}, tmp_path / "c2i_B_256.pt")
    torch.save({"model": vq.state_dict()}, tmp_path / "vq_ds16_c2i.pt")
    deterministic = torch.backends.cudnn.deterministic
    logits: list[torch.Tensor] = []  # guided, of every step

    def record(step: int, of_step: torch.Tensor) -> None:
        logits.append(of_step)

    monkeypatch.setattr(naive, "generate", partial(naive.generate, on_logits=record))
    sample_c2i.main(
        [
            "--pretrained-dir", str(tmp_path), "--device", "cpu", "--top-k", "1", "--output",
            str(tmp_path / "x.png"),
            "--class-labels", str(meta["labels"][0]), "--save-codes",
            str(tmp_path / "codes.npy"),
        ]
    )  # fmt: skip

    torch.backends.cudnn.deterministic = deterministic
    codes = np.load(tmp_path / "codes.npy")
    assert codes.dtype == np.int32
    assert np.array_equal(codes, expected["tokens"][:1])
    recorded = torch.stack([logits[position] for position in meta["positions"]], dim=1)
    assert np.abs(recorded.numpy() - expected["guided_logits_at_positions"][:1]).max() < 1e-3
    with torch.no_grad():
        pixels = vq.eval().decode_code(torch.from_numpy(codes), [1, 8, 16, 16])
    first = ((pixels[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    with Image.open(tmp_path / "x.png") as image:
        drawn = np.asarray(image).astype(np.float32)
    assert np.abs(drawn - first).max() <= 1
