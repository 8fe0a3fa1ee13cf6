"""The convolutional encoder and decoder of the VQ tokenizer, with LlamaGen's parameter names.

The family is that of VQGAN (Esser et al. 2021, arXiv:2012.09841): residual blocks at each
resolution, attention at the coarsest. Activations are [images, channels, height, width].
"""

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """The tokenizer's only norm: 32 groups."""
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two norm-swish-convolution stages and a shortcut (1 x 1 where the channel count changes)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keeps height and width."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over the pixels, one head as wide as the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        h = self.norm(x)
        # [images, channels, pixels]
        queries, keys, values = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))
        scores = queries.transpose(1, 2) @ keys * x.shape[1] ** -0.5  # [images, pixels, pixels]
        mixed = values @ scores.softmax(dim=-1).transpose(1, 2)  # [images, channels, pixels]
        return x + self.proj_out(mixed.view_as(x))


class Downsample(nn.Module):
    """Halves height and width with a strided convolution, padded at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c, h / 2, w / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c, 2 h, 2 w]."""
        images, channels, height, width = x.shape
        # Copies by broadcasting: the numbers of F.interpolate, with a backward pass that is a plain
        # (deterministic) sum.
        wide = (
            x[:, :, :, None, :, None]
            .expand(-1, -1, -1, 2, -1, 2)
            .reshape(images, channels, 2 * height, 2 * width)
        )
        return self.conv(wide)


class Stage(nn.Module):
    """The blocks of one resolution, with attention after each residual block and a change of
    resolution at the end, if asked for.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        *,
        attention: bool,
        dropout: float,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            [
                ResnetBlock(in_channels if i == 0 else out_channels, out_channels, dropout)
                for i in range(blocks)
            ]
        )
        self.attn = nn.ModuleList(
            [AttnBlock(out_channels) for _ in range(blocks if attention else 0)]
        )
        self.downsample = Downsample(out_channels) if downsample else None
        self.upsample = Upsample(out_channels) if upsample else None

    def forward(self, h: Tensor) -> Tensor:
        """Blocks, then the change of resolution if this stage has one."""
        for i, block in enumerate(self.res):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        if self.downsample is not None:
            h = self.downsample(h)
        if self.upsample is not None:
            h = self.upsample(h)
        return h


def middle(channels: int, dropout: float) -> nn.Sequential:
    """The blocks at the coarsest resolution, between convolution stages and code."""
    return nn.Sequential(
        ResnetBlock(channels, channels, dropout),
        AttnBlock(channels),
        ResnetBlock(channels, channels, dropout),
    )


class Encoder(nn.Module):
    """Pixels [n, 3, h, w] -> features [n, z_channels, h / f, w / f], f = 2 ** (stages - 1)."""

    def __init__(
        self,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [ch * multiple for multiple in ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.conv_blocks = nn.Sequential()
        for i, width in enumerate(widths):
            self.conv_blocks.append(
                Stage(
                    widths[i - 1] if i else ch,
                    width,
                    num_res_blocks,
                    attention=i == last,
                    dropout=dropout,
                    downsample=i != last,
                )
            )
        self.mid = middle(widths[-1], dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = self.mid(self.conv_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features [n, z_channels, h / f, w / f] -> pixels [n, 3, h, w], about -1 to 1."""

    def __init__(
        self,
        ch: int,
        ch_mult: tuple[int, ...],
        num_res_blocks: int,
        z_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [ch * multiple for multiple in reversed(ch_mult)]  # coarsest first
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], dropout)
        self.conv_blocks = nn.Sequential()
        for i, width in enumerate(widths):
            self.conv_blocks.append(
                Stage(
                    widths[max(i - 1, 0)],
                    width,
                    num_res_blocks + 1,
                    attention=i == 0,
                    dropout=dropout,
                    upsample=i != len(widths) - 1,
                )
            )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight by which LlamaGen's training balances its losses."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        h = self.conv_blocks(self.mid(self.conv_in(z)))
        return self.conv_out(F.silu(self.norm_out(h)))
