"""The provider: the CPU it runs on, and opening it."""

from __future__ import annotations

from typing import Any

from llorch.providers import API_VERSION, DeviceInfo, DeviceOptions, ProviderUnavailableError


class NumbaProvider:
    name = "numba-cpu"
    summary = "vector kernels made by Numba and LLVM on the CPU; weights stay quantised"
    requires = "numba and llvmlite"
    api_version = API_VERSION
    priority = 20  # the fastest on a CPU: docs/benchmarks.md
    batch_invariant = True  # every kernel of a product does the same operations in the same order (emitter.py)
    rounds_activations = True  # to int8, a scale per 32 columns, before a product with quantised weights

    def devices(self) -> list[DeviceInfo]:
        """Raises ProviderUnavailableError where LLVM cannot be loaded, or LLORCH_NUMBA_ISA is not of this CPU."""
        try:
            import llvmlite
            import llvmlite.binding as llvm
        except (ImportError, OSError) as error:
            raise ProviderUnavailableError(
                f"llvmlite cannot be loaded ({error}): `pip install --upgrade numba llvmlite`"
            ) from error
        from llorch_provider_numba import hosts

        text = f"{llvm.get_host_cpu_name()}, {hosts.choose().name} kernels, llvmlite {llvmlite.__version__}"
        return [DeviceInfo("cpu", text, "cpu")]

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> Any:
        (cpu,) = self.devices()
        if device not in (None, cpu.name):
            raise ProviderUnavailableError(f"numba-cpu has no device {device!r}, only 'cpu': leave out --device")
        from llorch_provider_numba import hosts
        from llorch_provider_numba.device import NumbaDevice

        return NumbaDevice(cpu, hosts.choose(), options or DeviceOptions())

    def operations(self) -> Any:
        from llorch_provider_numba.operations import NumbaOps

        return NumbaOps()


provider = NumbaProvider()
