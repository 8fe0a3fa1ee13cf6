"""Pixels from codes: the engine's decoder against the tokenizer's own, on the CPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import reference_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from autoregressive.folders import pretrained_folder
from autoregressive.serve.engine.pixel_decoder import PixelDecoder, batch_sizes
from autoregressive.serve.engine.vq_forward import Convolution, VQForward
from autoregressive.weights.published import DEMO_VQ
from kernels.group_norm import interleave
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel

CPU = torch.device("cpu")


def tokenizer(name: str) -> VQModel:
    """With reference weights; the demo's has its own."""
    model = VQ_models[name]()
    if name == "VQ-demo":
        # the log of used codes is not shipped
        model.load_state_dict(load_file(pretrained_folder() / DEMO_VQ), strict=False)
    else:
        reference_weights(model, 6)
    return model.eval().requires_grad_(False)


def random_codes(model: VQModel, images: int, grid: int, seed: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, model.config.codebook_size, (images, grid * grid), generator=generator, dtype=torch.int32
    )


def plain(model: VQModel, codes: Tensor, grid: int) -> Tensor:
    return model.decode_code(codes, [codes.shape[0], model.config.codebook_embed_dim, grid, grid])


def decibels(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in -1..1."""
    return 10 * math.log10(4 / (found.double() - expected.double()).square().mean().item())


def test_on_a_cpu_the_pixels_are_the_tokenizers() -> None:
    """Fails if the CPU's pixels are not those of the tokenizer, or the last bits of an image's
    depend on which others are decoded with it.
    """
    model = tokenizer("VQ-demo")
    codes = random_codes(model, 5, 16)
    pending = PixelDecoder(model, 16, CPU).submit(codes)
    assert pending.ready()
    alone = torch.cat([plain(model, one, 16) for one in codes.split(1)])
    assert torch.equal(pending.result(), alone)


def test_a_batch_larger_than_the_largest_is_split_and_keeps_its_order() -> None:
    """Fails if a part of a batch is lost, doubled or moved."""
    model = tokenizer("VQ-demo")
    codes = random_codes(model, 5, 4)
    decoder = PixelDecoder(model, 4, CPU)
    decoder.batch_sizes = (1, 2)
    torch.testing.assert_close(decoder.decode(codes), plain(model, codes, 4), atol=1e-5, rtol=1e-5)


def test_wild_codes_are_clamped() -> None:
    """Fails if the id that a damaged step wrote reads beyond the codebook, which on a GPU loses the
    process.
    """
    model = tokenizer("VQ-demo")
    wild, clamped = torch.tensor([[-5, 3, 1 << 30, 7]]), torch.tensor([[0, 3, 1023, 7]])
    decoder = PixelDecoder(model, 2, CPU)
    assert torch.equal(decoder.decode(wild), decoder.decode(clamped))
    forward = VQForward(model, 2)
    assert torch.equal(forward(wild), forward(clamped))


@pytest.mark.parametrize(("size", "expected"), [(128, 16), (256, 8), (384, 4), (512, 2), (2048, 1)])
def test_large_images_are_decoded_in_small_batches(size: int, expected: int) -> None:
    """Fails if decoding's memory grows with the size of the images, or a size is left without any
    batch.
    """
    assert batch_sizes(size)[-1] == expected
    assert batch_sizes(size)[0] == 1


# What the bf16 path reaches in its torch form, less a margin for other CPUs; the promise is 45. All
# in bf16, VQ-16 has 45.5.
@pytest.mark.parametrize(
    ("name", "grid", "expected"), [("VQ-demo", 16, 57.0), ("VQ-16", 4, 46.0), ("VQ-8", 4, 46.0)]
)
def test_the_fast_path_keeps_the_pixels(name: str, grid: int, expected: float) -> None:
    """Fails if the fast path computes something else, or loses more precision than bf16 products
    must.
    """
    model = tokenizer(name)
    codes = random_codes(model, 1, grid)
    pixels = VQForward(model, grid)(codes)
    reference = plain(model, codes, grid)
    assert pixels.dtype == torch.float32
    assert pixels.shape == reference.shape
    assert pixels.is_contiguous()
    assert decibels(pixels, reference) > expected


def test_four_phases_are_the_upsampled_convolution() -> None:
    """Fails if a tap is summed into the wrong phase: borders and corners included."""
    torch.manual_seed(0)
    module = nn.Conv2d(8, 6, 3, padding=1)
    x = torch.randn(2, 5, 4, 8)
    doubled = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
    expected = module(doubled).permute(0, 2, 3, 1)
    convolution = Convolution.upsampling(module)
    exact = Convolution(convolution.weight.float(), convolution.bias)
    found = interleave(exact(x)) + exact.bias
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)  # bf16 weights
    assert (found - expected).abs().mean() < 2e-3
