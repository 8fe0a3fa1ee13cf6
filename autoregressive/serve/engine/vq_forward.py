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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.errors import tell
from kernels.group_norm import (
    add_with_statistics,
    add_with_statistics_reference,
    normalize,
    normalize_reference,
    supports,
)
from kernels.operations import triton_runs_on
from tokenizer.tokenizer_image.blocks import AttnBlock, ResnetBlock, Stage
from tokenizer.tokenizer_image.vq_model import VQModel

_PRODUCTS = torch.bfloat16  # of convolutions and matrix products: operands and results
# channels of the last convolution; three alone would not run on the tensor cores
_PADDED_OUTPUTS = 8


@dataclass(frozen=True)
class Measured:
    """An image and the statistics that the norm after it needs."""

    values: Tensor  # [images, height, width, channels]
    statistics: Tensor  # as kernels.group_norm has them


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
        # of each phase and each of its two taps: which of the module's three it is the sum of
        taps = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        phases = torch.einsum("ayi,bxj,ocij->abocyx", taps, taps, weight).flatten(0, 2)
        return cls(_channels_last(phases, _PRODUCTS), module.bias.detach().float().clone())

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


def group_norm_kernels_run(
    device: torch.device,
    widths: Sequence[int],
    groups: int,
    backend: str,
    *,
    tell: Callable[[str], None],
) -> bool:
    """Whether Triton carries out the group norms: on a GPU, for widths that its kernels take,
    unless torch is asked for.

    Args:
        widths: channels of every norm.
        backend: "auto", "triton" or "torch".
        tell: called with one line for the user where torch takes the kernels' place.
    """
    if device.type != "cuda" or not triton_runs_on(device) or backend == "torch":
        return False
    supported = all(supports(width, groups) for width in widths)
    if not supported:
        tell(
            f"a tokenizer of {', '.join(map(str, widths))} channels has no Triton group norm: "
            "torch's takes its place"
        )
    return supported


class GroupNorms:
    """Group norms in two passes: the sum that is measured, and the norm itself.

    Args:
        triton: by kernels; else by their references.
        groups: of every norm.
    """

    def __init__(self, triton: bool, groups: int) -> None:
        self._groups = groups
        self._add = add_with_statistics if triton else add_with_statistics_reference
        self._normalize = normalize if triton else normalize_reference

    def add(
        self,
        x: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        dtype: torch.dtype | None,
        *,
        interleaved: bool = False,
    ) -> Measured:
        """x + bias (+ residual), measured. Without a dtype the sum is not stored, and the values
        remain x.
        """
        total, statistics = self._add(
            x, bias, residual, self._groups, dtype, interleaved=interleaved
        )
        return Measured(x if total is None else total, statistics)

    def normalize(
        self, image: Measured, norm: nn.GroupNorm, *, bias: Tensor | None = None, silu: bool = True
    ) -> Tensor:
        """The norm of an image, and SiLU.

        Args:
            bias: of the sum that was not stored.
        """
        return self._normalize(
            image.values,
            image.statistics,
            norm.weight,
            norm.bias,
            norm.eps,
            bias=bias,
            silu=silu,
            out_dtype=_PRODUCTS,
        )


class VQForward:
    """Turns codes into pixels, with copies of the decoder's parameters.

    Args:
        vq: on the device to run on; later changes to its parameters have no effect.
        grid: codes of an image's side.
        backend: "auto", "triton" or "torch", of the group norms.
    """

    def __init__(self, vq: VQModel, grid: int, backend: str = "auto") -> None:
        decoder, config, project = vq.decoder, vq.config, vq.post_quant_conv
        codebook, groups = vq.quantize.embedding.weight, decoder.norm_out.num_groups
        widths = [config.ch * multiple for multiple in config.ch_mult]
        triton = group_norm_kernels_run(codebook.device, widths, groups, backend, tell=tell)
        self._norms, self._grid = GroupNorms(triton, groups), grid
        assert project.bias is not None
        features = F.linear(
            F.normalize(codebook.detach().double(), dim=-1),
            project.weight.detach()[:, :, 0, 0].double(),
            project.bias.detach().double(),
        )
        self._features = features.float()  # [codebook, z_channels]
        self._conv_in = Convolution.of(decoder.conv_in, torch.float32)
        self._blocks: list[_Block] = [_block(module, torch.float32) for module in decoder.mid]
        last = len(decoder.conv_blocks) - 1
        for number, stage in enumerate(decoder.conv_blocks):
            assert isinstance(stage, Stage)
            dtype, next_dtype = (
                _PRODUCTS if at >= last else torch.float32 for at in (number, number + 1)
            )
            for index, module in enumerate(stage.res):
                self._blocks.append(_block(module, dtype))
                if stage.attn:
                    self._blocks.append(_block(stage.attn[index], dtype))
            if stage.upsample is not None:
                convolution = Convolution.upsampling(stage.upsample.conv)
                self._blocks.append(_Upsampling(convolution, next_dtype))
        self._norm_out = _copy(decoder.norm_out)
        outputs = Convolution.of(decoder.conv_out)
        self._outputs = outputs.weight.shape[0]
        missing = _PADDED_OUTPUTS - self._outputs
        weight = F.pad(outputs.weight, (0, 0, 0, 0, 0, 0, 0, missing))
        self._conv_out = Convolution(_channels_last(weight, _PRODUCTS), outputs.bias)

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> Tensor:
        """Codes [images, grid * grid] -> pixels float32 [images, 3, height, width], about -1..1.
        Wild ids are clamped.
        """
        codes = codes.long().clamp(0, self._features.shape[0] - 1)
        features = F.embedding(codes, self._features).view(
            codes.shape[0], self._grid, self._grid, -1
        )
        image = self._norms.add(self._conv_in(features), self._conv_in.bias, None, torch.float32)
        # No more than one name for the image: three of them at a time are the decoder's peak.
        for block in self._blocks:
            image = block(self._norms, image)
        y = self._conv_out(self._norms.normalize(image, self._norm_out))
        pixels = y[..., : self._outputs].float() + self._conv_out.bias
        return pixels.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class _Resnet:
    norm1: nn.GroupNorm
    conv1: Convolution
    norm2: nn.GroupNorm
    conv2: Convolution
    shortcut: Convolution | None  # 1 x 1
    bias: Tensor  # float32, of the second convolution and the shortcut
    dtype: torch.dtype  # of the residual stream

    def __call__(self, norms: GroupNorms, image: Measured) -> Measured:
        h = norms.add(self.conv1(norms.normalize(image, self.norm1)), self.conv1.bias, None, None)
        normed = norms.normalize(h, self.norm2, bias=self.conv1.bias)
        del h  # before the next is made
        y = self.conv2(normed)
        del normed
        shortcut = image.values if self.shortcut is None else self.shortcut(image.values)
        return norms.add(y, self.bias, shortcut, self.dtype)


@dataclass(frozen=True)
class _Attention:
    norm: nn.GroupNorm
    qkv_weight: Tensor  # bf16 [3 * channels, channels]
    qkv_bias: Tensor  # bf16 [3 * channels]
    project: Convolution  # 1 x 1
    dtype: torch.dtype  # of the residual stream

    def __call__(self, norms: GroupNorms, image: Measured) -> Measured:
        images, height, width, channels = image.values.shape
        h = norms.normalize(image, self.norm, silu=False).view(images, 1, height * width, channels)
        queries, keys, values = F.linear(h, self.qkv_weight, self.qkv_bias).split(channels, dim=-1)
        # one head: [images, 1, positions, channels]
        attn_out = F.scaled_dot_product_attention(queries, keys, values)
        projected = self.project(attn_out.view(images, height, width, channels))
        return norms.add(projected, self.project.bias, image.values, self.dtype)


@dataclass(frozen=True)
class _Upsampling:
    convolution: Convolution
    dtype: torch.dtype  # of the residual stream at the next resolution

    def __call__(self, norms: GroupNorms, image: Measured) -> Measured:
        phases, bias = self.convolution(image.values), self.convolution.bias
        return norms.add(phases, bias, None, self.dtype, interleaved=True)


_Block = _Resnet | _Attention | _Upsampling


def _block(module: nn.Module, dtype: torch.dtype) -> _Block:
    """A block of the tokenizer's, with copies of its parameters."""
    if isinstance(module, ResnetBlock):
        conv1, conv2 = Convolution.of(module.conv1), Convolution.of(module.conv2)
        shortcut, bias = None, conv2.bias
        if isinstance(module.nin_shortcut, nn.Conv2d):
            shortcut = Convolution.of(module.nin_shortcut)
            bias = conv2.bias + shortcut.bias
        norm1, norm2 = _copy(module.norm1), _copy(module.norm2)
        return _Resnet(norm1, conv1, norm2, conv2, shortcut, bias, dtype)
    assert isinstance(module, AttnBlock)
    parts = [module.q, module.k, module.v]
    weight = torch.cat([part.weight.detach()[:, :, 0, 0] for part in parts]).to(_PRODUCTS)
    bias = torch.cat([part.bias.detach() for part in parts if part.bias is not None]).to(_PRODUCTS)
    project = Convolution.of(module.proj_out, torch.float32)
    return _Attention(_copy(module.norm), weight, bias, project, dtype)


def _copy(norm: nn.GroupNorm) -> nn.GroupNorm:
    copied = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, device=norm.weight.device)
    copied.load_state_dict(norm.state_dict())  # in float32
    return copied.requires_grad_(False)


def _channels_last(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True).contiguous(memory_format=torch.channels_last)
