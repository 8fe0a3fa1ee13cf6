"""A whole engine on the Triton kernels in the interpreter."""

from functools import partial

import numpy as np
import pytest
import torch
from kernel_cases import LargeTilesRunner
from teacher import TINY, engine_codes


# Head size 64 with guidance is in gpt_tiny_interval5, too.
@pytest.mark.parametrize("name", [name for name in TINY if name != "gpt_tiny_head64"])
def test_engine_tokens_are_llamagens(name: str) -> None:
    """The kernels together: greedy tokens of LlamaGen's own code."""
    # partial sums and chunks to combine in one of them
    pieces = 2 if name == "gpt_tiny_nocfg" else 1
    codes, expected = engine_codes(
        name, torch.device("cpu"), "triton", partial(LargeTilesRunner, pieces=pieces)
    )
    assert np.array_equal(codes, expected)
