"""A provider whose device is the host: the real device and operations over the emulated runtime."""

from __future__ import annotations

from llorch_provider_cupy.device import CudaDevice
from llorch_provider_cupy.operations import CudaOps

from emulator.runtime import HostRuntime
from llorch.providers import API_VERSION, DeviceInfo, DeviceOptions

INFO = DeviceInfo("emulated:0", "an emulated card", "cuda")


class EmulatedProvider:
    name = "cuda-emulated"
    summary = "cupy-cuda's kernels on the host, for tests"
    requires = "g++"
    api_version = API_VERSION
    priority = 0
    batch_invariant = False
    rounds_activations = True
    options = frozenset({"gpu_memory", "prefill_weights"})
    total = 1 << 30  # bytes of a card

    def devices(self) -> list[DeviceInfo]:
        return [INFO]

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> CudaDevice:
        options = options or DeviceOptions()
        runtime = HostRuntime(self.total, options.gpu_memory)
        return CudaDevice(runtime, INFO, halves=options.prefill_weights == "half")

    def operations(self) -> CudaOps:
        return CudaOps()


provider = EmulatedProvider()
