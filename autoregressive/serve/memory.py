"""Running out of memory, as an error that says what takes less of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autoregressive.errors import UserError
from autoregressive.serve.engine.config import EngineConfig, ways_to_less_memory
from autoregressive.weights.choice import smaller_precision
from autoregressive.weights.finding import ModelSettings


@contextmanager
def saying_what_needs_less_memory(
    model: ModelSettings, config: EngineConfig | None = None
) -> Iterator[None]:
    """Turns running out of memory into a `UserError`.

    Args:
        config: the engine's settings, where they matter. What was set comes first in the message.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(
            error
        ):
            raise
        ways = [
            *(ways_to_less_memory(config, model.device) if config is not None else ()),
            "use a smaller model",
            *smaller_precision(model),
        ]
        raise UserError(f"{model.device} has too little free memory", remedies=ways) from error
