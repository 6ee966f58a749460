"""llorch's Numba provider: `provider` is what the entry point `numba-cpu` names. Importing it loads no Numba."""

from llorch_provider_numba.provider import provider

__all__ = ["provider"]
