"""The pages of the KV cache: their shape and dtype, and the scales of fp8 ones."""

from math import prod

import torch
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.engine_config import EngineConfig
from kernels.attention import head_stride
from kernels.quantization import FP8, FP8_LARGEST, Weights

# Keys and values are sums of numbers that were rounded, so they may exceed the bound a little.
_ROUNDING = 1.02


def page_dtype(gpt: Transformer, config: EngineConfig) -> torch.dtype:
    """What keys and values are kept in."""
    return FP8 if config.kv_cache_dtype == "fp8" else gpt.output.weight.dtype


def kv_shape(
    gpt: Transformer, num_pages: int, page_size: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """The shape of the KV pages: [layers, 2, pages, heads, page_size, stride of a head]."""
    model = gpt.config
    stride = head_stride(model.head_size, dtype.itemsize)
    return model.n_layer, 2, num_pages, model.n_head, page_size, stride


def page_bytes(gpt: Transformer, page_size: int, dtype: torch.dtype) -> int:
    """Memory of one page in all layers, keys and values."""
    return prod(kv_shape(gpt, 1, page_size, dtype)) * dtype.itemsize


def page_scales(qkv: Weights, norm_weight: Tensor, heads: int) -> Tensor:
    """The scales of a layer's fp8 pages: float32 [2, heads], of keys and of values.

    They follow from the weights alone. The input of the product is a vector of a known length (its
    root mean square is 1) times the weight of the norm, so that a row of weights bounds what it
    gives (Cauchy and Schwarz). No image exceeds that bound, whatever its class: the class token's
    extreme keys and values fit, too. A scale is a power of two, so it costs no precision.

    Args:
        qkv: [3 * width, width]
        norm_weight: [width]
    """
    weights = qkv if isinstance(qkv, Tensor) else qkv.dequantized(torch.float32)
    width = weights.shape[1]
    gain = norm_weight.float()
    # a part at a time, so that memory holds no float32 copy of all
    keys, values = (
        torch.linalg.vector_norm(part.float() * gain, dim=1).view(heads, -1)
        for part in weights[width:].chunk(2)
    )
    # Rotary positions turn a pair of elements, which keeps its length.
    keys = torch.linalg.vector_norm(keys.unflatten(1, (-1, 2)), dim=2)
    bounds = torch.stack([keys.amax(dim=1), values.amax(dim=1)]) * (width**0.5 * _ROUNDING)
    bounds = torch.where(bounds.isfinite() & (bounds > 0), bounds, 1.0)
    return torch.exp2(torch.frexp(bounds / FP8_LARGEST).exponent.float())
