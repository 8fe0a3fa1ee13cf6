"""The class-conditional transformer of LlamaGen, with LlamaGen's parameter names: one definition
for training and sampling.

A Llama decoder: pre-norm blocks, RMS norm, gated SiLU feed-forward, 2-D rotary positions. This is
the reference that faster engines are compared with, so it stays plain: dense KV cache,
`scaled_dot_product_attention`, no fused kernels. Architecture: Sun et al. 2024, arXiv:2406.06525.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.config import GPT_SHAPES, GPTConfig
from autoregressive.models.rope import apply_rotary, rotary_table_2d


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and cast back before the gain."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of x."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class LabelEmbedder(nn.Module):
    """Class label -> embedding of the first token; the extra last row stands for "no class"
    (guidance).
    """

    def __init__(self, num_classes: int, dim: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Tensor) -> Tensor:
        """Labels [batch] -> embeddings [batch, 1, dim]; in training, some labels become
        "no class".
        """
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)[:, None, :]


class KVCache(nn.Module):
    """Keys and values of one layer for every position, dense. A module so that compiled graphs see
    fixed addresses.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_seq_length: int,
        n_head: int,
        head_size: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        shape = (max_batch_size, n_head, max_seq_length, head_size)
        self.k_cache = nn.Buffer(torch.zeros(shape, dtype=dtype), persistent=False)
        self.v_cache = nn.Buffer(torch.zeros(shape, dtype=dtype), persistent=False)

    def update(self, input_pos: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values [batch, heads, tokens, head_size] at input_pos [tokens]; returns
        the whole cache.
        """
        self.k_cache[:, :, input_pos] = keys
        self.v_cache[:, :, input_pos] = values
        return self.k_cache, self.v_cache


class Attention(nn.Module):
    """Multi-head self-attention with a packed query-key-value projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.head_size = config.heads_of_rank, config.head_size
        self.wqkv = nn.Linear(config.dim, 3 * config.width_of_rank, bias=False)
        self.wo = nn.Linear(config.width_of_rank, config.dim, bias=False)
        self.kv_cache: KVCache | None = None
        self.resid_dropout = nn.Dropout(config.resid_dropout_p)

    def setup_cache(
        self, max_batch_size: int, max_seq_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """See `Transformer.setup_caches`."""
        wanted = (max_batch_size, self.n_head, max_seq_length, self.head_size)
        old = self.kv_cache.k_cache if self.kv_cache is not None else None
        if old is None or (old.shape, old.dtype, old.device) != (wanted, dtype, device):
            with torch.device(device):
                self.kv_cache = KVCache(
                    max_batch_size, max_seq_length, self.n_head, self.head_size, dtype
                )

    def forward(
        self, x: Tensor, rotary: Tensor, input_pos: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """x [batch, tokens, dim]; with input_pos the cache is written and read, without it
        attention is causal over x.
        """
        batch, tokens, dim = x.shape
        qkv = self.wqkv(x).view(batch, tokens, 3, self.n_head, self.head_size)
        queries, keys, values = qkv.unbind(2)  # each [batch, tokens, heads, head_size]
        queries = apply_rotary(queries, rotary).transpose(1, 2)
        keys = apply_rotary(keys, rotary).transpose(1, 2)
        values = values.transpose(1, 2)
        if input_pos is not None:
            assert self.kv_cache is not None, "setup_caches() comes before sampling"
            keys, values = self.kv_cache.update(input_pos, keys, values)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None
        )
        return self.resid_dropout(self.wo(mixed.transpose(1, 2).reshape(batch, tokens, dim)))


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_of_rank, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_of_rank, bias=False)
        self.w2 = nn.Linear(config.ffn_of_rank, config.dim, bias=False)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., dim] -> [..., dim]."""
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, rotary: Tensor, input_pos: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """X [batch, tokens, dim] -> [batch, tokens, dim]."""
        h = x + self.attention(self.attention_norm(x), rotary, input_pos, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """Class label and tokens -> logits of the next token.

    Position 0 is the class token; the token of grid cell i sits at position i + 1. Position p's
    logits predict cell p. With several ranks it holds one rank's part of the weights, and only the
    engine runs it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedder(
            config.num_classes, config.dim, config.class_dropout_prob
        )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout_p)
        self.layers = nn.ModuleList([TransformerBlock(config) for _ in range(config.n_layer)])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocabulary_of_rank, bias=False)
        table = rotary_table_2d(
            config.grid, config.head_size, config.rope_base, config.cls_token_num
        )
        self.freqs_cis: Tensor = nn.Buffer(table, persistent=False)
        self.register_buffer("causal_mask", None, persistent=False)
        self.causal_mask: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        # The rotary table follows the module to a device but stays float32: in bf16 its angles
        # would be off.
        table = self.freqs_cis
        super()._apply(fn, recurse)
        self.freqs_cis = table.to(self.freqs_cis.device)
        return self

    def init_weights(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Draws every matrix from normal(0, std), in the order of the state dict, and sets the
        norms' gains to 1.
        """
        for parameter in self.parameters():
            init_weight(parameter, generator, std)

    def setup_caches(self, max_batch_size: int, max_seq_length: int, dtype: torch.dtype) -> None:
        """Allocates KV caches of [max_batch_size, heads, max_seq_length, head_size]; kept when they
        have that shape already.
        """
        device = self.tok_embeddings.weight.device
        for block in self.layers:
            assert isinstance(block, TransformerBlock)
            block.attention.setup_cache(max_batch_size, max_seq_length, dtype, device)
        self.causal_mask = torch.ones(
            max_seq_length, max_seq_length, dtype=torch.bool, device=device
        ).tril()

    def forward(
        self,
        idx: Tensor | None = None,
        cond_idx: Tensor | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token; the three uses are LlamaGen's.

        Args:
            idx: tokens [batch, tokens], or None for the first step (prefill), which takes the class
                alone.
            cond_idx: class labels [batch], or None for a later step (decode), which takes the
                newest token alone.
            input_pos: positions [tokens] of this step in the KV cache; None runs class and tokens
                at once, causally (training).

        Returns:
            float32 [batch, tokens (plus one with a class), vocab_size]
        """
        assert self.config.ranks == 1, "one rank's part alone computes nothing"
        parts = []
        if cond_idx is not None:
            parts.append(self.cls_embedding(cond_idx))
        if idx is not None:
            parts.append(self.tok_embeddings(idx))
        # [batch, tokens, dim]
        h = self.tok_dropout(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
        if input_pos is None:
            rotary, mask = self.freqs_cis[: h.shape[1]], None
        else:
            assert self.causal_mask is not None, "setup_caches() comes before sampling"
            rotary, mask = self.freqs_cis[input_pos], self.causal_mask[None, None, input_pos]
        for block in self.layers:
            h = block(h, rotary, input_pos, mask)
        return self.output(self.norm(h)).float()


def init_weight(weight: Tensor, generator: torch.Generator | None, std: float = 0.02) -> None:
    """Draws a matrix from normal(0, std), or sets a norm's gains to 1."""
    if weight.dim() > 1:
        nn.init.normal_(weight, std=std, generator=generator)
    else:
        nn.init.ones_(weight)


def build_gpt(shape: GPTConfig, **kwargs: Any) -> Transformer:
    """A transformer of that shape; keyword arguments are fields of `GPTConfig` (vocab_size,
    block_size, num_classes, ...).
    """
    return Transformer(replace(shape, **kwargs))


GPT_models: dict[str, Callable[..., Transformer]] = {
    name: partial(build_gpt, shape) for name, shape in GPT_SHAPES.items()
}
