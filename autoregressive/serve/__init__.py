"""The engine, its command, and the service.

The engine's classes are imported when they are first asked for, so that a command can answer --help
before torch is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoregressive.models.sampling_params import SamplingParams
    from autoregressive.serve.engine.engine import Engine
    from autoregressive.serve.engine.engine_config import EngineConfig
    from autoregressive.serve.pipeline import Pipeline
    from autoregressive.serve.worker.rank_processes import RankLostError

__all__ = ["Engine", "EngineConfig", "Pipeline", "RankLostError", "SamplingParams"]

_MODULES = {
    "Engine": "autoregressive.serve.engine.engine",
    "EngineConfig": "autoregressive.serve.engine.engine_config",
    "Pipeline": "autoregressive.serve.pipeline",
    "RankLostError": "autoregressive.serve.worker.rank_processes",
    "SamplingParams": "autoregressive.models.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'autoregressive.serve' has no attribute '{name}'")
