"""The engine's pixel decoder on a GPU: captured, padded, split, on its own stream."""

import pytest
import torch
from test_pixel_decoder import decibels, plain, random_codes, tokenizer

from autoregressive.serve.engine.pixel_decoder import PixelDecoder
from autoregressive.serve.engine.vq_forward import VQForward

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "grid", "expected"), [("VQ-demo", 16, 55.0), ("VQ-16", 16, 45.0), ("VQ-16", 24, 45.0)]
)
def test_pixels_are_within_the_promise_at_every_batch(
    name: str, grid: int, expected: float
) -> None:
    """Fails if padding, splitting or a graph's stale addresses show, or the precision falls below
    45 dB.
    """
    model = tokenizer(name).to(CUDA)
    decoder = PixelDecoder(model, grid, CUDA)
    codes = random_codes(model, 11, grid).to(CUDA)
    reference = torch.cat([plain(model, part, grid) for part in codes.split(4)])
    for images in (11, 1, 3, 8, 2):
        pixels = decoder.decode(codes[:images])
        assert pixels.shape == reference[:images].shape
        for image in range(images):
            assert decibels(pixels[image], reference[image]) > expected


def test_pixels_outlive_the_next_decoding_and_codes_may_change() -> None:
    """Fails if a result is a view of a graph's memory, or the codes are read after the caller has
    moved on.
    """
    model = tokenizer("VQ-demo").to(CUDA)
    decoder = PixelDecoder(model, 16, CUDA)
    first, second = random_codes(model, 2, 16).to(CUDA), random_codes(model, 2, 16, seed=7).to(CUDA)
    expected = decoder.decode(first).clone()
    buffer = first.clone()
    early = decoder.submit(buffer)
    buffer.copy_(second)
    late = decoder.submit(buffer)
    assert torch.equal(early.result(), expected)
    assert torch.equal(late.result(), decoder.decode(second))
    torch.cuda.synchronize()
    assert early.ready()


def test_without_graphs_the_same_pixels() -> None:
    """Fails if capturing changes a bit, or the global switches of cuDNN."""
    model = tokenizer("VQ-demo").to(CUDA)
    codes = random_codes(model, 4, 16).to(CUDA)
    switches = ("benchmark", "deterministic", "allow_tf32", "enabled")
    before = [getattr(torch.backends.cudnn, name) for name in switches]
    captured, eager = (
        PixelDecoder(model, 16, CUDA, cuda_graphs=graphs).decode(codes) for graphs in (True, False)
    )
    assert torch.equal(captured, eager)
    assert [getattr(torch.backends.cudnn, name) for name in switches] == before


def test_kernels_and_references_agree() -> None:
    """Fails if the Triton kernels, compiled, compute something else than their references."""
    model = tokenizer("VQ-16").to(CUDA)
    codes = random_codes(model, 2, 16).to(CUDA)
    fast, reference = (VQForward(model, 16, backend)(codes) for backend in ("triton", "torch"))
    # Both round to bf16, in other places; each is some 46 dB from float32. A wrong norm is below
    # 30. Measured: 46.7.
    assert decibels(fast, reference) > 45
