"""The provider: which cards there are, and opening one."""

from __future__ import annotations

from typing import Any

from llorch.providers import API_VERSION, DeviceInfo, DeviceOptions, ProviderUnavailableError
from llorch_provider_cupy.probe import probe_devices


class CudaProvider:
    """Devices are named cuda:0, cuda:1."""

    name = "cupy-cuda"
    summary = "NVIDIA GPUs through CuPy; weights stay quantised, decode steps are CUDA graphs"
    requires = "an NVIDIA GPU of compute capability 7.0 or newer, its driver, and CuPy 14"
    api_version = API_VERSION
    priority = -1  # named only: `auto` does not choose kernels that have never run on a card
    batch_invariant = False  # cuBLAS takes over from 9 tokens on, and its own kernels differ by shape
    options = frozenset({"gpu_memory", "prefill_weights"})
    rounds_activations = True  # to int8 for a few tokens, to half for many

    def devices(self) -> list[DeviceInfo]:
        """The cards that passed their probe. Raises ProviderUnavailableError with every reason where none did."""
        probes = probe_devices()
        usable = [probe.info for probe in probes if probe.info is not None]
        if not usable:
            reasons = "; ".join(str(probe.error) for probe in probes) or "the driver lists no card, see `nvidia-smi`"
            raise ProviderUnavailableError(f"no CUDA device works: {reasons}")
        return usable

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> Any:
        available = {info.name: info for info in self.devices()}
        name = device or next(iter(available))
        if name not in available:
            refused = [str(probe.error) for probe in probe_devices() if f"cuda:{probe.number}" == name]
            why = f": {refused[0]}" if refused else ""
            raise ProviderUnavailableError(f"cupy-cuda has no device {name!r}{why}; it has {', '.join(available)}")
        from llorch_provider_cupy.cupy_runtime import CupyRuntime
        from llorch_provider_cupy.device import CudaDevice

        options = options or DeviceOptions()
        runtime = CupyRuntime(int(name.removeprefix("cuda:")), options.gpu_memory)
        return CudaDevice(runtime, available[name], halves=options.prefill_weights == "half")

    def operations(self) -> Any:
        from llorch_provider_cupy.operations import CudaOps

        return CudaOps()


provider = CudaProvider()
