"""The pages of the KV cache: how they lie in memory, and how much of it they take.

Pages have the dtype of the weights, or are fp8 (e4m3) or int8. Each key and each value of a head
has a float32 scale then, which makes its largest element the largest number of the dtype.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.engine_config import EngineConfig
from kernels.attention import head_stride
from kernels.quantization import BYTE_DTYPES, LARGEST


@dataclass(frozen=True)
class LayerPages:
    """The keys and values of one layer."""

    pages: Tensor  # [2, pages, heads, page_size, stride of a head]
    scales: Tensor | None = None  # of fp8 and int8, float32 [2, pages, heads, page_size]


@dataclass(frozen=True)
class KVPages:
    """The keys and values of all layers. One page number holds all of them."""

    pages: Tensor  # [layers, 2, pages, heads, page_size, stride of a head]
    scales: Tensor | None  # of fp8 and int8, float32 [layers, 2, pages, heads, page_size]

    @classmethod
    def zeros(
        cls, gpt: Transformer, num_pages: int, page_size: int, config: EngineConfig
    ) -> "KVPages":
        """Pages for a model on its device."""
        dtype, device = page_dtype(gpt, config), gpt.output.weight.device
        shape = _shape(gpt, num_pages, page_size, dtype)
        scales = torch.zeros(shape[:-1], device=device) if dtype in LARGEST else None
        return cls(torch.zeros(shape, dtype=dtype, device=device), scales)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, with their scales."""
        return self.pages.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @cached_property
    def layers(self) -> list[LayerPages]:
        """Those of each layer."""
        if self.scales is None:
            return [LayerPages(pages) for pages in self.pages]
        return [LayerPages(*parts) for parts in zip(self.pages, self.scales, strict=True)]


def page_dtype(gpt: Transformer, config: EngineConfig) -> torch.dtype:
    """What keys and values are kept in."""
    return BYTE_DTYPES.get(config.kv_cache_dtype, gpt.output.weight.dtype)


def page_bytes(gpt: Transformer, page_size: int, dtype: torch.dtype) -> int:
    """Memory of one page in all layers, keys and values, with their scales."""
    *cells, stride = _shape(gpt, 1, page_size, dtype)
    scale_bytes = torch.float32.itemsize if dtype in LARGEST else 0
    return prod(cells) * (stride * dtype.itemsize + scale_bytes)


def _shape(gpt: Transformer, num_pages: int, page_size: int, dtype: torch.dtype) -> tuple[int, ...]:
    model = gpt.config
    stride = head_stride(model.head_size, dtype.itemsize)
    return model.n_layer, 2, num_pages, model.heads_of_rank, page_size, stride
