"""Looks for devices in a subprocess, where a driver that crashes takes nothing with it.

Drivers crash at different moments: when they are loaded, when a kernel is built, when it runs. So one process lists
the devices, and one process for each builds and runs a tiny kernel on it. What came out holds for this process.
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llorch.providers import DeviceInfo, ProviderUnavailableError
from llorch_provider_opencl.runtimes import INSTALL, import_pyopencl

TIMEOUT_SECONDS = 60  # a driver's first build may take a while
COUNT = 64

TINY_KERNEL = """
__kernel void probe(__global float *x) {
    x[get_global_id(0)] = fma(x[get_global_id(0)], 2.0f, 1.0f);
}
"""


@dataclass(frozen=True)
class Probe:
    """A device, and what became of it: `info` where it works, else `error`."""

    name: str
    platform: int  # places in pyopencl's lists
    device: int
    info: DeviceInfo | None
    error: str | None = None


@functools.cache
def probe_devices() -> tuple[Probe, ...]:
    """Every device, GPUs first. Raises ProviderUnavailableError where there is none, or where listing them fails."""
    import_pyopencl()  # a missing package is said as such
    listing = _run(["list"])
    if isinstance(listing, str):
        raise ProviderUnavailableError(f"looking for OpenCL devices failed: {listing}. To repair it, {INSTALL}")
    if not listing:
        raise ProviderUnavailableError(f"no OpenCL device is installed: {INSTALL}")
    counts: dict[str, int] = {}
    probes = []
    for entry in sorted(listing, key=lambda entry: entry["kind"] != "gpu"):
        number = counts[entry["kind"]] = counts.get(entry["kind"], -1) + 1
        probes.append(_probe(f"{entry['kind']}:{number}", entry))
    return tuple(probes)


def _probe(name: str, entry: dict[str, Any]) -> Probe:
    platform, device = entry["platform"], entry["device"]
    result = _run(["test", str(platform), str(device)])
    if isinstance(result, str):
        return Probe(name, platform, device, None, f"{name} ({entry['description']}): {result}")
    return Probe(name, platform, device, DeviceInfo(name, entry["description"], "opencl"))


def _run(arguments: Sequence[str], command: Sequence[str] = (sys.executable, "-m", __name__)) -> Any:
    """What a probing process printed as JSON; a str is the reason why there is nothing."""
    try:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"its driver did not answer within {TIMEOUT_SECONDS} s"
    last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    if done.returncode < 0:
        return f"its driver crashes ({signal.Signals(-done.returncode).name}): {last}"
    if done.returncode:
        return f"its driver fails: {last}"
    return json.loads(done.stdout.splitlines()[-1])  # a driver may print too


# ---- the probing process ----


def _list() -> list[dict[str, Any]]:
    cl = import_pyopencl()
    try:
        platforms = cl.get_platforms()
    except cl.LogicError:  # ocl-icd calls "no platform" an error: PLATFORM_NOT_FOUND_KHR
        return []
    kinds = {cl.device_type.GPU: "gpu", cl.device_type.CPU: "cpu"}
    return [
        {
            "platform": p,
            "device": d,
            "kind": next((name for kind, name in kinds.items() if device.type & kind), "accelerator"),
            "description": f"{device.name.strip()}, {platform.name} {device.driver_version}",
        }
        for p, platform in enumerate(platforms)
        for d, device in enumerate(platform.get_devices())
    ]


def _test(platform: int, device: int) -> bool:
    """Builds and runs a kernel. Raises where the device is not what the kernels need."""
    import numpy as np

    cl = import_pyopencl()
    found = cl.get_platforms()[platform].get_devices()[device]
    if not found.available or not found.compiler_available:
        raise SystemExit("the device or its compiler is not available")
    if not found.endian_little:
        raise SystemExit("the device is big-endian, its weights would not be")
    context = cl.Context([found])
    queue = cl.CommandQueue(context)
    host = np.arange(COUNT, dtype=np.float32)
    buffer = cl.Buffer(context, cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR, hostbuf=host)
    program = cl.Program(context, TINY_KERNEL).build(cache_dir=False)
    program.probe(queue, (COUNT,), None, buffer)
    result = np.empty_like(host)
    cl.enqueue_copy(queue, result, buffer)
    if not np.array_equal(result, 2 * host + 1):
        raise SystemExit("it computes 2 x + 1 wrongly")
    return True


if __name__ == "__main__":
    what, *places = sys.argv[1:]
    print(json.dumps(_list() if what == "list" else _test(*map(int, places))))
