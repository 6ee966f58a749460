"""The provider: which devices there are, and opening one."""

from __future__ import annotations

import functools
from typing import Any

from llorch.providers import API_VERSION, DeviceInfo, DeviceOptions, ProviderUnavailableError
from llorch_provider_opencl.probe import Probe, probe_devices
from llorch_provider_opencl.runtimes import INSTALL, import_pyopencl


class OpenCLProvider:
    """Devices are named by kind and number: gpu:0, gpu:1, cpu:0; GPUs first."""

    name = "opencl"
    summary = "OpenCL on GPUs of any vendor, and on CPUs; weights stay quantised"
    requires = "pyopencl and an OpenCL driver"
    api_version = API_VERSION
    # Above the reference alone: the number cannot tell a GPU from a CPU, and on a CPU a provider that is made for CPUs
    # is the better choice. On a GPU name it: --provider opencl.
    priority = 5
    batch_invariant = True  # a result's rounding depends on its own row, the columns and the site (kernels/*.cl)

    def devices(self) -> list[DeviceInfo]:
        """The devices that passed their probe. Raises ProviderUnavailableError with every reason where none did."""
        probes = probe_devices()
        usable = [probe.info for probe in probes if probe.info is not None]
        if not usable:
            reasons = "; ".join(str(probe.error) for probe in probes)
            raise ProviderUnavailableError(f"no OpenCL device works: {reasons}. To get one, {INSTALL}")
        return usable

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> Any:
        from llorch_provider_opencl.device import OpenCLDevice

        available = {info.name: info for info in self.devices()}
        name = device or next(iter(available))
        if name not in available:
            refused = [str(probe.error) for probe in probe_devices() if probe.name == name]
            why = f": {refused[0]}" if refused else ""
            raise ProviderUnavailableError(f"opencl has no device {name!r}{why}; it has {', '.join(available)}")
        found = _find(available[name], probe_devices())
        threads = options.threads if options else None
        return OpenCLDevice(found if threads is None else _with_threads(found, threads), available[name])

    def operations(self) -> Any:
        from llorch_provider_opencl.operations import OpenCLOps

        return OpenCLOps()


@functools.cache
def _platforms() -> list[Any]:
    platforms: list[Any] = import_pyopencl().get_platforms()
    return platforms


def _find(info: DeviceInfo, probes: tuple[Probe, ...]) -> Any:
    """The pyopencl device behind a probe: found again by the place at which the probing process saw it."""
    probe = next(p for p in probes if p.name == info.name)
    return _platforms()[probe.platform].get_devices()[probe.device]


@functools.cache
def _with_threads(device: Any, threads: int) -> Any:
    """A part of a CPU's compute units, which are its threads; all of them where fewer are there. A GPU stays whole."""
    cl = import_pyopencl()
    if not device.type & cl.device_type.CPU or threads >= device.max_compute_units:
        return device
    part, *_ = device.create_sub_devices([cl.device_partition_property.BY_COUNTS, threads])
    return part


provider = OpenCLProvider()
