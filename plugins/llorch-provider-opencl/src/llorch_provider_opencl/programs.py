"""Programs: OpenCL C from kernels/, built for a device, with the binaries kept on disk.

The key of a binary is everything it depends on: platform, device, driver version, source, options.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping
from importlib import resources
from typing import Any

from llorch.providers import KeptFiles, ProviderError
from llorch_provider_opencl.runtimes import import_pyopencl, kept_files

logger = logging.getLogger(__name__)

Macros = Mapping[str, int | float | str]


def source(*names: str) -> str:
    """The files of kernels/, one after another."""
    folder = resources.files("llorch_provider_opencl") / "kernels"
    return "\n".join((folder / f"{name}.cl").read_text() for name in names)


class Programs:
    """Builds each program once for a context; `get` is called while a model is bound, never in its hot loop."""

    def __init__(self, context: Any, device: Any, options: str = "", kept: KeptFiles | None = None) -> None:
        self._context, self._device, self._options = context, device, options
        self._kept = kept or kept_files("programs")
        self._built: dict[tuple[str, str], Any] = {}

    def get(self, code: str, macros: Macros) -> Any:
        """The built program. Raises ProviderError with the compiler's lines."""
        options = " ".join([self._options, *(f"-D{name}={_literal(value)}" for name, value in sorted(macros.items()))])
        key = (code, options.strip())
        if key not in self._built:
            self._built[key] = self._load(*key) or self._compile(*key)
        return self._built[key]

    def file(self, code: str, options: str) -> str:
        """The name of the file that holds the binary of this source and these options."""
        device = self._device
        parts = (device.platform.name, device.platform.version, device.name, device.driver_version, code, options)
        return f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.bin"

    def _load(self, code: str, options: str) -> Any:
        cl, file = import_pyopencl(), self.file(code, options)
        binary = self._kept.read(file)
        if binary is None:
            return None
        try:
            return _build(cl.Program(self._context, [self._device], [binary]), options)
        except cl.Error as error:
            path = self._kept.folder / file
            logger.warning("the kept binary %s is not usable and is built anew: %s", path, error)
            return None

    def _compile(self, code: str, options: str) -> Any:
        cl = import_pyopencl()
        try:
            program = _build(cl.Program(self._context, code), options)
        except cl.RuntimeError as error:
            raise ProviderError(
                f"opencl: {self._device.name.strip()}, driver {self._device.driver_version}, does not compile a kernel "
                f"with {options!r}. The compiler says:\n{error}"
            ) from error
        (binary,) = program.get_info(cl.program_info.BINARIES)
        self._kept.write(self.file(code, options), binary)
        return program


def _build(program: Any, options: str) -> Any:
    """Builds in place. Some compilers (Intel's) say that they succeeded, which pyopencl takes for a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", import_pyopencl().CompilerWarning)
        return program.build(options, cache_dir=False)


def _literal(value: int | float | str) -> str:
    return f"{value!r}f" if isinstance(value, float) else str(value)
