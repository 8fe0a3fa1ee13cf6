"""The shapes of LlamaGen's class-conditional transformers, as data.

Shapes and names are those of LlamaGen (Sun et al. 2024, arXiv:2406.06525),
`autoregressive/models/gpt.py`; the demo model is ours.
"""

from dataclasses import dataclass
from math import gcd, isqrt

FFN_MULTIPLE = 32  # of the feed-forward width on each rank: so many outputs the product has at once


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes a transformer's parameters and positions. Field names are LlamaGen's.

    Raises:
        ValueError: the heads' size is no multiple of 4, `block_size` is no square, so many ranks
            cannot share the model, or a field is unsupported.
    """

    dim: int
    n_layer: int
    n_head: int
    vocab_size: int = 16384
    block_size: int = 256  # tokens per image: the side of the token grid, squared
    num_classes: int = 1000
    cls_token_num: int = 1
    model_type: str = "c2i"
    multiple_of: int = 256  # the feed-forward width is rounded up to a multiple of this
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    class_dropout_prob: float = 0.1
    token_dropout_p: float = 0.1
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    # processes that share the model: each has a part of the heads, of the feed-forward layer and of
    # the logits
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.dim % self.n_head or self.head_size % 4:
            raise ValueError(
                f"width {self.dim} does not split into {self.n_head} heads whose size is a "
                "multiple of 4"
            )
        if isqrt(self.block_size) ** 2 != self.block_size:
            raise ValueError(f"block_size {self.block_size} is not the square of a whole number")
        if self.model_type != "c2i" or self.cls_token_num != 1:
            raise ValueError(
                "only class-conditional models (model_type 'c2i', one class token) are supported"
            )
        if self.ranks not in self.rank_counts:
            raise ValueError(f"{self.ranks} ranks cannot share the model; {self.rank_counts} can")

    @property
    def head_size(self) -> int:
        """Elements of one attention head."""
        return self.dim // self.n_head

    @property
    def ffn_dim(self) -> int:
        """Width of the gated feed-forward layer: two thirds of 4 x dim, rounded up to
        `multiple_of`.
        """
        two_thirds = int(2 * 4 * self.dim / 3)
        return -(-two_thirds // self.multiple_of) * self.multiple_of

    @property
    def grid(self) -> int:
        """Side of the square of tokens that makes an image."""
        return isqrt(self.block_size)

    @property
    def rank_counts(self) -> tuple[int, ...]:
        """How many ranks can share the model: divisors of the heads, of the feed-forward width and
        of the vocabulary. Products take inputs by 8.
        """
        shared = gcd(self.n_head, self.ffn_dim // FFN_MULTIPLE, self.vocab_size)
        divisors = (count for count in range(2, shared + 1) if shared % count == 0)
        return (1, *(count for count in divisors if self.dim // count % 8 == 0))

    @property
    def heads_of_rank(self) -> int:
        """Attention heads of one rank."""
        return self.n_head // self.ranks

    @property
    def width_of_rank(self) -> int:
        """Elements of the heads of one rank."""
        return self.heads_of_rank * self.head_size

    @property
    def ffn_of_rank(self) -> int:
        """Width of one rank's part of the feed-forward layer."""
        return self.ffn_dim // self.ranks

    @property
    def vocabulary_of_rank(self) -> int:
        """Tokens whose logits one rank computes."""
        return self.vocab_size // self.ranks


# What distinguishes one size from another; the rest of a config follows from the image and the data
# set.
GPT_SHAPES: dict[str, GPTConfig] = {
    "GPT-B": GPTConfig(n_layer=12, n_head=12, dim=768),  # 111M
    "GPT-L": GPTConfig(n_layer=24, n_head=16, dim=1024),  # 343M
    "GPT-XL": GPTConfig(n_layer=36, n_head=20, dim=1280),  # 775M
    "GPT-XXL": GPTConfig(n_layer=48, n_head=24, dim=1536),  # 1.4B
    "GPT-XXXL": GPTConfig(n_layer=48, n_head=40, dim=2560),  # 3.9B
    "GPT-1B": GPTConfig(n_layer=22, n_head=32, dim=2048),  # 1.2B
    "GPT-3B": GPTConfig(n_layer=24, n_head=32, dim=3200),  # 3.1B, head size 100
    "GPT-7B": GPTConfig(n_layer=32, n_head=32, dim=4096),  # 6.6B
    "GPT-demo": GPTConfig(n_layer=8, n_head=4, dim=256),  # 7M, ships with the repository
}
