"""The VQ decoder's forward pass as the engine runs it: bf16 products, channels last, fused norms;
the parameters are `VQModel`'s.

Same function as `VQModel.decode_code`, carried out otherwise: the projection behind the codebook is
folded into a table of features; biases of convolutions are added where the next norm measures its
input; a nearest-neighbour upsampling and its 3 x 3 convolution are one 2 x 2 convolution of the
small image to four phases (4/9 of the operations).

Norms, statistics and biases are float32. So are, because they cost little, the first convolution,
the attention's projection and the residual stream below full resolution. With all of these in bf16,
two random VQ-16s reached 43.7 and 45.5 dB PSNR against float32. As it is, they reach 45.8 and 47.0,
and the trained demo tokenizer 58.6 (measured on a CPU, with 8 x 8 and 16 x 16 codes).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.errors import tell
from kernels.dispatch import select_group_norm
from kernels.group_norm import GroupStatistics
from tokenizer.tokenizer_image.layers import AttnBlock, ResnetBlock, Stage, normalized
from tokenizer.tokenizer_image.vq_model import VQModel

_PRODUCTS = torch.bfloat16  # of convolutions and matrix products: operands and results
# channels of the last convolution; three alone would not run on the tensor cores
_PADDED_OUTPUTS = 8


@dataclass(frozen=True)
class Measured:
    """An image and the statistics that the norm after it needs."""

    values: Tensor  # [images, height, width, channels]
    statistics: GroupStatistics


@dataclass(frozen=True)
class Convolution:
    """A convolution of stride 1, in the dtype of its weight. The caller adds the bias."""

    weight: Tensor  # [out, in, k, k], channels last
    bias: Tensor  # float32 [out]

    @classmethod
    def of(cls, module: nn.Conv2d, dtype: torch.dtype = _PRODUCTS) -> "Convolution":
        """A copy of the module's parameters."""
        assert module.bias is not None
        return cls(_channels_last(module.weight, dtype), module.bias.detach().float().clone())

    @classmethod
    def upsampling(cls, module: nn.Conv2d) -> "Convolution":
        """A convolution of the small image that gives what the module makes of the image doubled by
        nearest neighbour: four phases side by side.

        Row 2 i of the doubled image's convolution reads the small rows i - 1 (once) and i (twice),
        row 2 i + 1 reads i (twice) and i + 1; columns likewise. So each phase is a 2 x 2
        convolution, whose taps are sums of the nine; with one row and column of padding on each
        side, phase (a, b) of pixel (i, j) is at (i + a, j + b).
        """
        assert module.bias is not None
        weight = module.weight.detach().double()
        # each [out, in, 2, 3]
        by_row = [torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], dim=2)]
        by_row += [torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], dim=2)]
        phases = []
        for rows in by_row:
            # each [out, in, 2, 2]
            phases += [torch.stack([rows[..., 0], rows[..., 1] + rows[..., 2]], dim=3)]
            phases += [torch.stack([rows[..., 0] + rows[..., 1], rows[..., 2]], dim=3)]
        return cls(
            _channels_last(torch.cat(phases), _PRODUCTS), module.bias.detach().float().clone()
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[images, h, w, in] -> [images, h, w, out], without the bias; one more row and column with
        a 2 x 2 kernel.
        """
        x = x.to(self.weight.dtype)
        if self.weight.shape[2] == 1:
            return F.linear(x, self.weight[:, :, 0, 0])
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, padding=1)
        # it is contiguous already where the library kept the layout
        return y.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Norm:
    """A group norm's parameters."""

    weight: Tensor  # float32 [channels]
    bias: Tensor  # float32 [channels]
    groups: int
    eps: float

    @classmethod
    def of(cls, module: nn.GroupNorm) -> "Norm":
        """A copy of the module's parameters."""
        return cls(
            module.weight.detach().float().clone(),
            module.bias.detach().float().clone(),
            module.num_groups,
            module.eps,
        )


class VQForward:
    """Turns codes into pixels, with copies of the decoder's parameters.

    Args:
        vq: on the device to run on; later changes to its parameters have no effect.
        grid: codes of an image's side.
        backend: "auto", "triton" or "torch", of the group norms.
    """

    def __init__(self, vq: VQModel, grid: int, backend: str = "auto") -> None:
        decoder, config = vq.decoder, vq.config
        self._groups = decoder.norm_out.num_groups
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self._operations = select_group_norm(
            vq.quantize.embedding.weight.device, widths, self._groups, backend, tell=tell
        )
        self._grid = grid
        entries, project = (
            normalized(vq.quantize.embedding.weight.detach().double()),
            vq.post_quant_conv,
        )
        assert project.bias is not None
        features = F.linear(
            entries, project.weight.detach()[:, :, 0, 0].double(), project.bias.detach().double()
        )
        self._features = features.float()  # [codebook, z_channels]
        self._conv_in = Convolution.of(decoder.conv_in, torch.float32)
        self._stages = [
            _Stage([_block(module) for module in decoder.mid], None, torch.float32, torch.float32)
        ]
        last = len(decoder.conv_blocks) - 1
        for number, stage in enumerate(decoder.conv_blocks):
            assert isinstance(stage, Stage)
            pairs = (
                zip(stage.res, stage.attn, strict=True)
                if stage.attn
                else ((block,) for block in stage.res)
            )
            blocks = [_block(module) for pair in pairs for module in pair]
            upsample = (
                None if stage.upsample is None else Convolution.upsampling(stage.upsample.conv)
            )
            residual_dtypes = [
                _PRODUCTS if at >= last else torch.float32 for at in (number, number + 1)
            ]
            self._stages.append(_Stage(blocks, upsample, *residual_dtypes))
        self._norm_out = Norm.of(decoder.norm_out)
        outputs = Convolution.of(decoder.conv_out)
        self._outputs = outputs.weight.shape[0]
        missing = _PADDED_OUTPUTS - self._outputs
        weight = F.pad(outputs.weight, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(
            memory_format=torch.channels_last
        )
        self._conv_out = Convolution(weight, outputs.bias)

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Tensor:
        """Codes [images, grid * grid] -> pixels float32 [images, 3, height, width], about -1..1.
        Wild ids are clamped.
        """
        codes = codes.long().clamp(0, self._features.shape[0] - 1)
        features = F.embedding(codes, self._features).view(
            codes.shape[0], self._grid, self._grid, -1
        )
        image = self._add(self._conv_in(features), self._conv_in.bias, None, torch.float32)
        # No more than one name for the image: three of them at a time are the decoder's peak.
        for stage in self._stages:
            for block in stage.blocks:
                if isinstance(block, _Attention):
                    image = self._attend(block, image, stage.residual_dtype)
                else:
                    image = self._convolve(block, image, stage.residual_dtype)
            if stage.upsample is not None:
                image = self._add(
                    stage.upsample(image.values),
                    stage.upsample.bias,
                    None,
                    stage.upsampled_dtype,
                    interleaved=True,
                )
        y = self._conv_out(self._normalize(image, self._norm_out))
        pixels = y[..., : self._outputs].float() + self._conv_out.bias
        return pixels.permute(0, 3, 1, 2).contiguous()

    def _convolve(self, block: "_Resnet", image: Measured, dtype: torch.dtype) -> Measured:
        h = block.conv1(self._normalize(image, block.norm1))
        _, statistics = self._operations.add(h, block.conv1.bias, None, block.norm2.groups, None)
        normed = self._normalize(Measured(h, statistics), block.norm2, bias=block.conv1.bias)
        del h  # before the next is made
        h = block.conv2(normed)
        del normed
        shortcut = image.values if block.shortcut is None else block.shortcut(image.values)
        return self._add(h, block.bias, shortcut, dtype)

    def _attend(self, block: "_Attention", image: Measured, dtype: torch.dtype) -> Measured:
        images, height, width, channels = image.values.shape
        h = self._normalize(image, block.norm, silu=False).view(images, 1, height * width, channels)
        queries, keys, values = F.linear(h, block.qkv_weight, block.qkv_bias).split(
            channels, dim=-1
        )
        # one head: [images, 1, positions, channels]
        attn_out = F.scaled_dot_product_attention(queries, keys, values)
        return self._add(
            block.project(attn_out.view(images, height, width, channels)),
            block.project.bias,
            image.values,
            dtype,
        )

    def _add(
        self,
        x: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        dtype: torch.dtype,
        *,
        interleaved: bool = False,
    ) -> Measured:
        total, statistics = self._operations.add(
            x, bias, residual, self._groups, dtype, interleaved=interleaved
        )
        assert total is not None
        return Measured(total, statistics)

    def _normalize(
        self, image: Measured, norm: Norm, *, bias: Tensor | None = None, silu: bool = True
    ) -> Tensor:
        return self._operations.normalize(
            image.values,
            image.statistics,
            norm.weight,
            norm.bias,
            norm.eps,
            bias=bias,
            silu=silu,
            out_dtype=_PRODUCTS,
        )


@dataclass(frozen=True)
class _Resnet:
    norm1: Norm
    conv1: Convolution
    norm2: Norm
    conv2: Convolution
    shortcut: Convolution | None  # 1 x 1
    bias: Tensor  # float32, of the second convolution and the shortcut


@dataclass(frozen=True)
class _Attention:
    norm: Norm
    qkv_weight: Tensor  # bf16 [3 * channels, channels]
    qkv_bias: Tensor  # bf16 [3 * channels]
    project: Convolution  # 1 x 1


@dataclass(frozen=True)
class _Stage:
    """The blocks of one resolution."""

    blocks: list[_Resnet | _Attention]
    upsample: Convolution | None
    residual_dtype: torch.dtype
    upsampled_dtype: torch.dtype  # of the residual stream at the next resolution


def _block(module: nn.Module) -> _Resnet | _Attention:
    if isinstance(module, ResnetBlock):
        shortcut = (
            Convolution.of(module.nin_shortcut)
            if isinstance(module.nin_shortcut, nn.Conv2d)
            else None
        )
        conv1, conv2 = Convolution.of(module.conv1), Convolution.of(module.conv2)
        bias = conv2.bias if shortcut is None else conv2.bias + shortcut.bias
        return _Resnet(Norm.of(module.norm1), conv1, Norm.of(module.norm2), conv2, shortcut, bias)
    assert isinstance(module, AttnBlock)
    parts = [module.q, module.k, module.v]
    weight = torch.cat([part.weight.detach()[:, :, 0, 0] for part in parts])
    bias = torch.cat([part.bias.detach() for part in parts if part.bias is not None])
    project = Convolution.of(module.proj_out, torch.float32)
    return _Attention(Norm.of(module.norm), weight.to(_PRODUCTS), bias.to(_PRODUCTS), project)


def _channels_last(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True).contiguous(memory_format=torch.channels_last)
