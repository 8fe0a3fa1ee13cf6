"""Class-conditional images with LlamaGen's autoregressive models.

`Pipeline` is imported when it is first asked for, so that `import autoregressive` stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoregressive.serve.pipeline import Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from autoregressive.serve.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'autoregressive' has no attribute '{name}'")
