"""The Triton kernels in the layers of ranks that share a model, in the interpreter."""

import numpy as np
import torch
from teacher import engine_codes
from threaded_ranks import ThreadedRanks


def test_ranks_draw_llamagens_tokens_with_the_kernels() -> None:
    """Fails if a kernel takes the shapes of a rank's part for those of the whole model, or adds up
    the terms of ranks and splits otherwise than one after the other.
    """
    codes, expected = engine_codes(
        "gpt_tiny_nocfg", torch.device("cpu"), "triton", ThreadedRanks, lookahead="off"
    )
    assert np.array_equal(codes, expected)
