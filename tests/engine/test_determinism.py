"""An image's codes depend on its request alone: the real runner on a CPU with the torch
operations.
"""

import torch
from company import codes_in_every_company
from conftest import reference_weights

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import Transformer
from autoregressive.serve.engine.engine import Engine
from autoregressive.serve.engine.engine_config import EngineConfig


def test_a_request_draws_the_same_in_any_company() -> None:
    """Fails if a neighbour, a place in the batch, the moment of joining or another's leaving
    reaches a request's codes.
    """
    model = Transformer(
        GPTConfig(dim=128, n_layer=2, n_head=2, vocab_size=512, block_size=64, num_classes=10)
    )
    reference_weights(model, 7)
    engine = Engine(
        model.eval(), None, EngineConfig(max_num_seqs=14, page_size=4, attention_backend="torch")
    )
    drawn = codes_in_every_company(engine, rows=14)
    alone = drawn.pop("alone")
    assert len(alone.unique()) > 20
    assert [company for company, codes in drawn.items() if not torch.equal(codes, alone)] == []
