"""llorch's OpenCL provider: `provider` is what the entry point `opencl` names. Importing it loads no OpenCL."""

from llorch_provider_opencl.provider import provider

__all__ = ["provider"]
