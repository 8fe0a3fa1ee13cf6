"""Makes the fixtures of this folder with the library compressed-tensors (0.20.1), without which the
tests do.

    python -m venv VENV; VENV/bin/pip install compressed-tensors torch safetensors
    PYTHONPATH=. VENV/bin/python tests/reference/compressed_tensors/make.py

Each folder has a model that the library has quantised: a scheme of ours, and fp8 with one scale for
all outputs. `expected.json` has the SHA-256 of what the library makes of each matrix in float32.
"""

import hashlib
import json
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import Transformer

FOLDER = Path(__file__).parent
SCHEMES = {
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
}


def make(name: str, how: dict[str, object]) -> None:
    """Writes one folder."""
    torch.manual_seed(0)
    shape = GPTConfig(
        dim=64, n_layer=1, n_head=1, vocab_size=8, block_size=4, num_classes=2, multiple_of=32
    )
    model = Transformer(shape).eval().requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(1), std=0.1)
    model.to(torch.bfloat16)
    arguments = QuantizationArgs(**how, symmetric=True, dynamic=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["output"])
    apply_quantization_config(model, config)
    products = {
        key: module for key, module in model.named_modules() if hasattr(module, "weight_scale")
    }
    for module in products.values():
        weight = module.weight.float()
        groups = {"channel": weight[:, None], "tensor": weight.reshape(1, 1, -1)}.get(
            str(how["strategy"]), weight.unflatten(1, (-1, 32))
        )
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    compressor.update_config(folder)
    kind = PackedQuantizationCompressor if how["type"] == "int" else NaiveQuantizationCompressor
    expected = {}
    for key, module in products.items():
        parts = dict(module.state_dict())
        parts["weight_scale"] = parts["weight_scale"].float()
        weight = kind.decompress(parts, scheme)["weight"].float().contiguous()
        expected[key] = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    for name, how in SCHEMES.items():
        make(name, how)
