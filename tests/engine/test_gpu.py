"""What needs a GPU, beyond the reference outputs: `pytest -m gpu`. The commands run as users type
them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import reference_weights
from PIL import Image
from safetensors.torch import save_file

from autoregressive.models.generate import NonFiniteLogitsError, generate
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.weights.checkpoint import load_weights
from tokenizer.tokenizer_image.vq_model import VQ_models

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda")


def run_command(*typed: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "autoregressive/sample/sample_c2i.py", *typed]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def demo_gpt() -> Transformer:
    model = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64)
    reference_weights(model, 0)
    return model.eval()


def test_the_demo_draws_the_same_picture_twice(tmp_path: Path) -> None:
    """Same seed, same machine, same picture; and the codes are those of trained weights,
    not noise.
    """
    for name in ("a", "b"):
        done = run_command("--gpt-model", "GPT-demo", "--output", str(tmp_path / f"{name}.png"))
        assert done.returncode == 0, done.stderr
        assert re.search(r"gpt sampling takes about \d+\.\d\d seconds\.", done.stdout)
        assert "untrained" not in done.stderr
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("a", "b"))
    assert np.array_equal(first, second)
    assert first.std() > 20


@pytest.mark.parametrize("precision", ["none", "fp16", "bf16"])
def test_every_precision_draws(precision: str, tmp_path: Path) -> None:
    """A dtype mismatch between cache, table and weights shows at the first step."""
    codes = tmp_path / "codes.npy"
    done = run_command(
        "--gpt-model",
        "GPT-demo",
        "--precision",
        precision,
        "--output",
        str(tmp_path / "x.png"),
        "--save-codes",
        str(codes),
    )
    assert done.returncode == 0, done.stderr
    drawn = np.load(codes)
    assert drawn.shape == (8, 256)
    assert drawn.dtype == np.int32
    assert 0 <= drawn.min() <= drawn.max() < 1024
    assert len(np.unique(drawn)) > 100


def test_compile_draws_the_eager_loops_tokens() -> None:
    """CUDA graphs that read a stale position or cache would change greedy tokens (float32, untied
    weights).
    """
    model, labels = demo_gpt().to(CUDA), torch.tensor([0, 5, 9], device=CUDA)
    eager = generate(model, labels, 256, cfg_scale=2.0, top_k=1)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    again = [generate(compiled, labels, 256, cfg_scale=2.0, top_k=1) for _ in range(2)]  # type: ignore[arg-type]
    assert torch.equal(again[0], eager)
    assert torch.equal(again[1], eager)


def test_non_finite_logits_leave_the_gpu_usable() -> None:
    """Drawing from NaN trips an assertion on the device, after which every call of the process
    fails.
    """
    model = demo_gpt().to(CUDA)
    with torch.no_grad():
        model.output.weight[3, 5] = float("nan")
    with pytest.raises(NonFiniteLogitsError):
        generate(model, torch.tensor([1], device=CUDA), 16)
    assert torch.ones(3, device=CUDA).sum().item() == 3


def test_weights_go_straight_to_the_gpu_in_the_asked_precision(tmp_path: Path) -> None:
    """A float32 copy on the GPU on the way would show in the peak of allocated memory."""
    source = demo_gpt()
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    with torch.device("meta"):
        model = GPT_models["GPT-demo"](vocab_size=1024, block_size=256, num_classes=64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    load_weights(model, tmp_path / "x.safetensors", device=CUDA, dtype=torch.bfloat16)
    target = sum(tensor.numel() * 2 for tensor in source.state_dict().values())
    largest = max(tensor.numel() * 4 for tensor in source.state_dict().values())
    assert torch.cuda.max_memory_allocated() - before < 1.1 * target + largest
    for key, tensor in source.state_dict().items():
        loaded = model.state_dict()[key]
        assert loaded.device.type == "cuda"
        assert torch.equal(loaded.cpu(), tensor.to(torch.bfloat16))
    assert model.freqs_cis.device.type == "cuda"
    assert model.freqs_cis.dtype == torch.float32


def test_the_tokenizer_gives_the_cpus_pixels() -> None:
    """Convolutions in TF32, or a codebook left unnormalised on one device, would differ."""
    model = VQ_models["VQ-16"]()
    reference_weights(model, 6)
    codes = torch.randint(0, 16384, (1, 64), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        on_cpu = model.eval().decode_code(codes, [1, 8, 8, 8])
        on_gpu = model.to(CUDA).decode_code(codes.to(CUDA), [1, 8, 8, 8]).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-3, rtol=1e-3)


def test_too_large_a_batch_is_one_line(tmp_path: Path) -> None:
    """Out of memory is the user's to mend: fewer pictures."""
    labels = ["--class-labels", *["7"] * 60_000]
    done = run_command(
        "--gpt-model", "GPT-B", "--random-weights", *labels, "--output", str(tmp_path / "x.png")
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].count("too little free memory") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.png").exists()


def test_untrained_gpt_b_runs_and_says_so(tmp_path: Path) -> None:
    """The mission's command must run without weights, and own up to it."""
    done = run_command(
        "--gpt-model",
        "GPT-B",
        "--random-weights",
        "--image-size",
        "256",
        "--output",
        str(tmp_path / "x.png"),
    )
    assert done.returncode == 0, done.stderr
    assert "noise" in done.stderr
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (4 * 256 + 10, 2 * 256 + 6)
        assert json.loads(image.text["llamagen"])["trained"] is False  # type: ignore[attr-defined]
