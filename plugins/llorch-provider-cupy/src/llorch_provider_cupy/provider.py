"""The provider: which cards there are, and opening one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from llorch.providers import API_VERSION, DeviceInfo, DeviceOptions, ProviderUnavailableError
from llorch_provider_cupy.probe import probe_devices

# off until they are measured: the kernel of kernels/prompt.cu; norms within products
TENSOR_CORES, NORMS = "LLORCH_CUPY_PROMPTS_ON_TENSOR_CORES", "LLORCH_CUPY_JOIN_NORMS"


class CudaProvider:
    """Devices are named cuda:0, cuda:1; cuda:0,1 are both, with the layers of a model split over them."""

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
        found = [self._named(name, available) for name in card_names(device or next(iter(available)))]
        from llorch_provider_cupy.cupy_runtime import CupyRuntime
        from llorch_provider_cupy.device import CudaDevice
        from llorch_provider_cupy.pipeline import Pipeline

        options = options or DeviceOptions()
        settings = {
            "halves": options.prefill_weights == "half",
            "prompts_on_tensor_cores": bool(os.environ.get(TENSOR_CORES)),
            "joins_norms": bool(os.environ.get(NORMS)),
        }
        opened: list[CudaDevice] = []
        try:
            for info in found:
                runtime = CupyRuntime(int(info.name.removeprefix("cuda:")), options.gpu_memory)
                opened.append(CudaDevice(runtime, info, **settings))
        except BaseException:
            for card in opened:
                card.close()
            raise
        return opened[0] if len(opened) == 1 else Pipeline(opened, together(found))

    def _named(self, name: str, available: Mapping[str, DeviceInfo]) -> DeviceInfo:
        if name in available:
            return available[name]
        refused = [str(probe.error) for probe in probe_devices() if f"cuda:{probe.number}" == name]
        why = f": {refused[0]}" if refused else ""
        raise ProviderUnavailableError(f"cupy-cuda has no device {name!r}{why}; it has {', '.join(available)}")

    def operations(self) -> Any:
        from llorch_provider_cupy.placed import Operations

        return Operations()


def card_names(device: str) -> list[str]:
    """The cards that a device's name means: cuda:1, or cuda:0,1 (or cuda:0,cuda:1) for several."""
    kind, _, numbers = device.partition(":")
    return [f"{kind}:{number.removeprefix(f'{kind}:')}" for number in numbers.split(",")] if numbers else [device]


def together(cards: Sequence[DeviceInfo]) -> DeviceInfo:
    """What several cards are called when they hold one model."""
    kind = cards[0].name.partition(":")[0]
    numbers = ",".join(card.name.partition(":")[2] for card in cards)
    return DeviceInfo(f"{kind}:{numbers}", "; ".join(card.description for card in cards), "cuda")


provider = CudaProvider()
