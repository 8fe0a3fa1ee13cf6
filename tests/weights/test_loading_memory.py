"""The loading benchmark at a small size: no kind of file may take memory for a second copy of the
weights.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import QUANTIZATIONS

ROOT = Path(__file__).resolve().parents[2]


def test_files_are_loaded_within_the_limit(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "scripts/benchmarks/bench_loading.py",
        "--gpt-model",
        "GPT-demo",
        "--folder",
        str(tmp_path),
    ]
    command += [
        "--kinds",
        "flat .pt",
        "training .pt",
        ".safetensors",
        "--output",
        str(tmp_path / "report.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [m["within_limit"] for m in report["measurements"]] == [True] * 3
    # The model itself is in that memory: a much smaller peak would mean that nothing was measured.
    assert all(m["peak_bytes"] > 0.8 * m["target_bytes"] for m in report["measurements"])
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_weights_are_quantised_within_the_limit(scheme: str, tmp_path: Path) -> None:
    """Fails if quantising while loading holds the checkpoint beside what becomes of it, or either
    of them twice. GPT-B is large enough for the allocator's own share not to matter.
    """
    command = [sys.executable, "scripts/benchmarks/bench_loading.py", "--gpt-model", "GPT-B"]
    command += ["--kinds", ".safetensors", "--quantization", scheme, "--folder", str(tmp_path)]
    command += ["--output", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (measured,) = json.loads((tmp_path / "report.json").read_text())["measurements"]
    assert measured["within_limit"]
    assert 0.8 * measured["target_bytes"] < measured["peak_bytes"] < 2 * measured["target_bytes"]


CARELESS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, "scripts/benchmarks")
import bench_loading

def careless(model, path, *, device, dtype, quantization):
    weights = torch.load(path, weights_only=True)
    model.to(dtype).to_empty(device=device)
    model.load_state_dict(weights)

bench_loading.load_weights = careless
path = bench_loading.write_checkpoint("flat .pt", "GPT-demo", Path(sys.argv[1]))
found = bench_loading.measure_here("flat .pt", "GPT-demo", path, torch.device("cpu"))
sys.exit(10 + found["within_limit"])
"""


def test_the_benchmark_notices_a_second_copy(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CARELESS, str(tmp_path)], cwd=ROOT, timeout=60)
    assert done.returncode == 10
