"""A provider whose devices are the host: the real devices and operations over the emulated runtime."""

from __future__ import annotations

import os

from llorch_provider_cupy.device import CudaDevice
from llorch_provider_cupy.pipeline import Pipeline
from llorch_provider_cupy.placed import Operations
from llorch_provider_cupy.provider import NORMS, card_names, together

from emulator.runtime import HostRuntime
from llorch.providers import API_VERSION, DeviceInfo, DeviceOptions

INFO, OTHER = (DeviceInfo(f"emulated:{i}", "an emulated card", "cuda") for i in range(2))


class EmulatedProvider:
    name = "cuda-emulated"
    summary = "cupy-cuda's kernels on the host, for tests"
    requires = "g++"
    api_version = API_VERSION
    priority = 0
    batch_invariant = False
    rounds_activations = True
    options = frozenset({"gpu_memory", "prefill_weights"})
    default = "emulated:0"

    def __init__(self, total: int = 1 << 30) -> None:
        self.total = total  # bytes of a card

    def devices(self) -> list[DeviceInfo]:
        return [INFO, OTHER]

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> CudaDevice | Pipeline:
        options = options or DeviceOptions()
        known = {info.name: info for info in self.devices()}
        found = [known[name] for name in card_names(device or self.default)]
        settings = {"halves": options.prefill_weights == "half", "joins_norms": bool(os.environ.get(NORMS))}
        cards = [CudaDevice(HostRuntime(self.total, options.gpu_memory), info, **settings) for info in found]
        return cards[0] if len(cards) == 1 else Pipeline(cards, together(found))

    def operations(self) -> Operations:
        return Operations()


class PairProvider(EmulatedProvider):
    """Two cards that hold a model together."""

    name = "cuda-emulated-pair"
    default = "emulated:0,1"


class TensorCoreDevice(CudaDevice):
    cache_dtypes = ("f16",)  # so that the suite's attention is all in halves


class TensorCoreProvider(EmulatedProvider):
    """Prompts on tensor cores."""

    name = "cuda-emulated-tensor-cores"

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> CudaDevice:
        return TensorCoreDevice(HostRuntime(self.total), INFO, prompts_on_tensor_cores=True)


provider, pair, tensor_cores = EmulatedProvider(), PairProvider(), TensorCoreProvider()
