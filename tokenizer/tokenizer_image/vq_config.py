"""The shapes of the VQ tokenizers, as data; nothing here imports torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VQConfig:
    """Everything that fixes a tokenizer's parameters."""

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    ch: int = 128  # channels at full resolution; ch_mult multiplies it, one factor a resolution
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    commit_loss_beta: float = 0.25
    dropout: float = 0.0

    @property
    def downsample_size(self) -> int:
        """Pixels of a code's side."""
        return 2 ** (len(self.ch_mult) - 1)


VQ_CONFIGS: dict[str, VQConfig] = {
    "VQ-16": VQConfig(ch_mult=(1, 1, 2, 2, 4)),
    "VQ-8": VQConfig(ch_mult=(1, 2, 2, 4)),
    # ships with the repository
    "VQ-demo": VQConfig(codebook_size=1024, ch=32, ch_mult=(1, 2, 4, 4), z_channels=64),
}
