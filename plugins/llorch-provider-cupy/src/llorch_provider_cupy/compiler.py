"""NVRTC through ctypes: programs to binaries for a card, kept on disk by all that they depend on.

CuPy has a compiler of its own; this one takes no headers and no options but ours, says where it looked for NVRTC, and
compiles for cards that are not there, which the tests do. Functions: NVIDIA's "NVRTC" documentation.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from pathlib import Path
from typing import Any

import platformdirs

from llorch.providers import KeptFiles, ProviderError, ProviderUnavailableError
from llorch_provider_cupy.programs import Program


def cuda_library(name: str) -> str:
    """The path of one of CUDA's libraries ("nvrtc", "cublas"), from a package of NVIDIA's or a toolkit.

    Raises ProviderUnavailableError where there is none.
    """
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError as error:
        raise ProviderUnavailableError(
            f"cuda-pathfinder cannot be imported ({error}), which CuPy 14 comes with: `pip install --upgrade "
            "'llorch-provider-cupy[cuda12]'`, or [cuda13] where the driver knows CUDA 13"
        ) from error
    try:
        return str(load_nvidia_dynamic_lib(name).abs_path)
    except RuntimeError as error:  # its DynamicLibNotFoundError is one
        raise ProviderUnavailableError(
            f"CUDA's library {name} is not installed ({str(error).splitlines()[0]}): `pip install "
            "'llorch-provider-cupy[cuda12]'`, or [cuda13] where the driver knows CUDA 13"
        ) from error


class Nvrtc:
    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    @functools.cached_property
    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    @functools.cached_property
    def architectures(self) -> list[int]:
        """The compute capabilities that it compiles for, 90 for 9.0, ascending."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return sorted(found)

    def target(self, capability: tuple[int, int]) -> str:
        """What to compile for: the card itself, or what its driver finishes where NVRTC is older than the card."""
        wanted = capability[0] * 10 + capability[1]
        if wanted in self.architectures:
            return f"sm_{wanted}"
        older = [architecture for architecture in self.architectures if architecture < wanted]
        if not older:
            raise ProviderUnavailableError(
                f"NVRTC {self.version[0]}.{self.version[1]} compiles for compute capability "
                f"{self.architectures[0] / 10} and up, the card has {wanted / 10}: `pip install "
                "'llorch-provider-cupy[cuda12]'`"
            )
        return f"compute_{older[-1]}"

    def compile(self, program: Program, target: str, *extra: str) -> tuple[bytes, str]:
        """(binary, log). Raises ProviderError with the compiler's lines."""
        options = [f"--gpu-architecture={target}", "--std=c++17", *program.defines, *extra]
        handle = ctypes.c_void_p()
        name = f"{program.name}.cu".encode()
        self._call("nvrtcCreateProgram", ctypes.byref(handle), program.source.encode(), name, 0, None, None)
        try:
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._library.nvrtcCompileProgram(handle, len(options), arguments)
            log = self._text(handle, "nvrtcGetProgramLog").rstrip(b"\0").decode()
            if failed:
                raise ProviderError(
                    f"cupy-cuda: NVRTC {self.version[0]}.{self.version[1]} does not compile {program.name} with "
                    f"{' '.join(options)}. It says:\n{log}"
                )
            return self._text(handle, "nvrtcGetCUBIN" if target.startswith("sm_") else "nvrtcGetPTX"), log
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(handle))

    def _text(self, handle: ctypes.c_void_p, name: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{name}Size", handle, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(name, handle, text)
        return text.raw

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise ProviderError(f"{name} failed with status {status}")


class Binaries:
    """Compiled programs, kept in a folder."""

    def __init__(self, nvrtc: Nvrtc, folder: Path | None = None) -> None:
        self._nvrtc = nvrtc
        folder = folder or Path(platformdirs.user_cache_dir("llorch")) / "cuda" / "programs"
        self._kept = KeptFiles(folder, "of cupy-cuda compiles its kernels, for some seconds")

    def get(self, program: Program, capability: tuple[int, int]) -> bytes:
        """Raises ProviderError with the compiler's lines."""
        target = self._nvrtc.target(capability)
        parts = (str(self._nvrtc.version), target, *program.defines, program.source)
        file = f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.bin"
        binary = self._kept.read(file)
        if binary is None:
            binary, _ = self._nvrtc.compile(program, target)
            self._kept.write(file, binary)
        return binary
