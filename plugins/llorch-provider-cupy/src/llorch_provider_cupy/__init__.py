"""llorch's CUDA provider: `provider` is what the entry point `cupy-cuda` names. Importing it loads no CUDA."""

from llorch_provider_cupy.provider import provider

__all__ = ["provider"]
