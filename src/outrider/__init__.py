"""outrider: lossless parallel decoding for autoregressive models."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outrider.config import EngineConfig
    from outrider.llm import LLM
    from outrider.outputs import CompletionOutput, RequestOutput
    from outrider.sampling.params import SamplingParams

__version__ = version("outrider")
__all__ = ["LLM", "CompletionOutput", "EngineConfig", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "outrider.llm",
    "EngineConfig": "outrider.config",
    "CompletionOutput": "outrider.outputs",
    "RequestOutput": "outrider.outputs",
    "SamplingParams": "outrider.sampling.params",
}


def __getattr__(name: str) -> Any:
    """Load on first use: importing torch takes seconds, and `outrider --help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'outrider' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
