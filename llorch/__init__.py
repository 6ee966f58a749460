"""llorch: an LLM inference worker whose compute backend is a pip-installable plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llorch.core.llm import LLM, load
    from llorch.core.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["LLM", "Tokenizer", "__version__", "load"]

_HOMES = {"load": "llorch.core.llm", "LLM": "llorch.core.llm", "Tokenizer": "llorch.core.tokenizer"}


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `llorch --help` and a provider's import do not pay for NumPy and tokenizers.
    if name not in _HOMES:
        raise AttributeError(f"module 'llorch' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
