"""The engine, its command, and the service.

The engine's classes are imported when they are first asked for, so that a command can answer --help
before torch is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoregressive.models.sampling import SamplingParams
    from autoregressive.serve.engine.config import EngineConfig
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.serve.pipeline import Pipeline

__all__ = ["Engine", "EngineConfig", "Pipeline", "SamplingParams"]

_MODULES = {
    "Engine": "autoregressive.serve.engine.engine",
    "EngineConfig": "autoregressive.serve.engine.config",
    "Pipeline": "autoregressive.serve.pipeline",
    "SamplingParams": "autoregressive.models.sampling",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'autoregressive.serve' has no attribute '{name}'")
