"""Transformers whose layers' products have quantised weights.

Only the weights of the layers' products are quantised. Embeddings, norms and the head stay what
they are: they are few, and the draw depends on them directly.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.gpt import Transformer
from kernels.quantization import QuantizedMatrix, Weights, joined, quantize

PRODUCTS = (
    "attention.wqkv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w3",
    "feed_forward.w2",
)


class QuantizedLinear(nn.Module):
    """Takes the place of a linear layer without bias. Its numbers are no parameters: `to` moves
    them to a device, and never converts them.
    """

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """X [..., inputs] -> [..., outputs], with the weights in x's dtype."""
        return F.linear(x, self.matrix.dequantized(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        device = fn(self.matrix.scales).device
        moved = (self.matrix.values.to(device), self.matrix.scales.to(device))
        self.matrix = QuantizedMatrix(*moved, self.matrix.paired)
        return self


def products_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers' products of a transformer: name of the module, and the module. Another model has
    none.
    """
    if not isinstance(model, Transformer):
        return
    for index, block in enumerate(model.layers):
        for name in PRODUCTS:
            yield f"layers.{index}.{name}", block.get_submodule(name)


def weights_of(product: nn.Module) -> Weights:
    """The weights of a product, as they lie in memory."""
    if isinstance(product, QuantizedLinear):
        return product.matrix
    assert isinstance(product, nn.Linear)
    return product.weight


@torch.no_grad()
def join_halves(first: nn.Module, second: nn.Module) -> Weights:
    """The weights of two products, the first above the second, in memory of which theirs become
    views.
    """
    if isinstance(first, QuantizedLinear) and isinstance(second, QuantizedLinear):
        both = joined([first.matrix, second.matrix])
        parts = zip(both.values.chunk(2), both.scales.chunk(2), strict=True)
        first.matrix, second.matrix = (QuantizedMatrix(*part, both.paired) for part in parts)
        return both
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    weights = torch.cat([first.weight, second.weight])
    first.weight.data, second.weight.data = weights.chunk(2)
    return weights


def quantization_of(model: Transformer) -> str | None:
    """How the products' weights are quantised; None if they are not."""
    first = weights_of(next(products_of(model))[1])
    return first.scheme if isinstance(first, QuantizedMatrix) else None


def weight_bytes(model: Transformer) -> int:
    """Memory of all weights, quantised ones with their scales."""
    matrices = (weights_of(product) for _, product in products_of(model))
    quantized = sum(each.nbytes for each in matrices if isinstance(each, QuantizedMatrix))
    return quantized + sum(parameter.nbytes for parameter in model.parameters())


@torch.no_grad()
def quantize_products(model: Transformer, scheme: str) -> None:
    """Quantises the weights of a model in its place, one matrix at a time. What is quantised
    already stays.
    """
    for name, product in products_of(model):
        weights = weights_of(product)
        if isinstance(weights, Tensor):
            model.set_submodule(name, QuantizedLinear(quantize(weights, scheme)))


def can_be_paired(model: Transformer) -> bool:
    """Whether all products of the layers have weights that `pair_products` takes."""
    weights = (weights_of(product) for _, product in products_of(model))
    return all(isinstance(each, QuantizedMatrix) and each.can_be_paired for each in weights)


def pair_products(model: Transformer) -> None:
    """Brings the weights of the layers' products into the order of `QuantizedMatrix.pair`."""
    for _, product in products_of(model):
        assert isinstance(product, QuantizedLinear)
        product.matrix = product.matrix.pair()
