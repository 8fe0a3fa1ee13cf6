"""The VQ tokenizer: pixels <-> a grid of codes. Shapes and parameter names are LlamaGen's
(`tokenizer_image/vq_model.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image.blocks import Decoder, Encoder
from tokenizer.tokenizer_image.vq_config import VQ_CONFIGS as VQ_CONFIGS
from tokenizer.tokenizer_image.vq_config import VQConfig as VQConfig


class Quantized(NamedTuple):
    """What the quantiser makes of features."""

    # [n, dim, h, w], codebook entries; gradients pass straight through to the features
    vectors: Tensor
    codes: Tensor  # int64 [n, h, w]
    codebook_loss: Tensor  # pulls entries to features, and features to entries at commit_loss_beta


class VectorQuantizer(nn.Module):
    """Replaces each feature vector by the nearest entry of a codebook; both are scaled to length 1
    first.
    """

    def __init__(self, codebook_size: int, dim: int, commit_loss_beta: float) -> None:
        super().__init__()
        self.commit_loss_beta = commit_loss_beta
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        # A log of recently used codes in LlamaGen's training; unused here, kept because published
        # checkpoints hold it.
        self.register_buffer("codebook_used", torch.zeros(65536))

    def forward(self, features: Tensor) -> Quantized:
        """Features [n, dim, h, w] -> `Quantized`."""
        vectors = F.normalize(features.permute(0, 2, 3, 1), dim=-1)  # [n, h, w, dim]
        codebook = F.normalize(self.embedding.weight, dim=-1)
        # Of entries of length 1, the nearest has the largest dot product.
        likeness = vectors.detach().flatten(0, 2) @ codebook.detach().T  # [n * h * w, entries]
        codes = likeness.argmax(dim=-1).view(vectors.shape[:3])
        chosen = F.embedding(codes, codebook)  # [n, h, w, dim]
        to_features = (chosen - vectors.detach()).square().mean()
        to_entries = (chosen.detach() - vectors).square().mean()
        passed_through = vectors + (chosen - vectors).detach()
        loss = to_features + self.commit_loss_beta * to_entries
        return Quantized(passed_through.permute(0, 3, 1, 2).contiguous(), codes, loss)

    def get_codebook_entry(self, codes: Tensor, shape: Sequence[int]) -> Tensor:
        """Codes [n * h * w], in any arrangement of that order, -> entries of length 1, `shape` =
        [n, dim, h, w].
        """
        images, dim, height, width = shape
        entries = F.embedding(codes.reshape(-1).long(), F.normalize(self.embedding.weight, dim=-1))
        return entries.view(images, height, width, dim).permute(0, 3, 1, 2).contiguous()


class VQModel(nn.Module):
    """Encoder, quantiser and decoder."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.codebook_embed_dim
        self.encoder = Encoder(
            config.ch, config.ch_mult, config.num_res_blocks, config.z_channels, config.dropout
        )
        self.decoder = Decoder(
            config.ch, config.ch_mult, config.num_res_blocks, config.z_channels, config.dropout
        )
        self.quantize = VectorQuantizer(config.codebook_size, dim, config.commit_loss_beta)
        self.quant_conv = nn.Conv2d(config.z_channels, dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, config.z_channels, 1)

    def encode(self, pixels: Tensor) -> Quantized:
        """Pixels [n, 3, height, width] in -1..1 -> `Quantized`; the sides are multiples of
        `config.downsample_size`.
        """
        return self.quantize(self.quant_conv(self.encoder(pixels)))

    def decode(self, vectors: Tensor) -> Tensor:
        """Codebook entries [n, codebook_embed_dim, h, w] -> pixels [n, 3, height, width], about
        -1..1.
        """
        return self.decoder(self.post_quant_conv(vectors))

    def decode_code(self, codes: Tensor, shape: Sequence[int]) -> Tensor:
        """Codes -> pixels.

        Args:
            codes: integers [n, h * w], row by row.
            shape: [n, codebook_embed_dim, h, w], as LlamaGen's `qzshape`.

        Returns:
            [n, 3, height, width], about -1..1
        """
        return self.decode(self.quantize.get_codebook_entry(codes, shape))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantized]:
        """Pixels -> their reconstruction, and what lay between."""
        quantized = self.encode(pixels)
        return self.decode(quantized.vectors), quantized


def build_vq(config: VQConfig, **codebook: Any) -> VQModel:
    """A tokenizer of that config; keyword arguments are other values of its codebook's fields
    (codebook_size, codebook_embed_dim).
    """
    return VQModel(replace(config, **codebook))


VQ_models: dict[str, Callable[..., VQModel]] = {
    name: partial(build_vq, config) for name, config in VQ_CONFIGS.items()
}
