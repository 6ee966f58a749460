"""Looks for cards in a subprocess, where a driver that crashes takes nothing with it.

Before that it is settled here, without CUDA, what most often is missing: the driver, and CuPy.
"""

from __future__ import annotations

import ctypes
import functools
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from llorch.providers import DeviceInfo, ProviderUnavailableError

TIMEOUT_SECONDS = 120  # the first start of a driver may take a while, and a kernel is compiled
DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
WHEELS = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}  # by the major version of CUDA
OLDEST_CAPABILITY = (7, 0)
INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver
COUNT = 64


@dataclass(frozen=True)
class Probe:
    """A card, and what became of it: `info` where it works, else `error`."""

    number: int
    info: DeviceInfo | None
    error: str | None = None


@functools.cache
def probe_devices() -> tuple[Probe, ...]:
    """Every card. Raises ProviderUnavailableError where there is none, with the reason and the next command."""
    if (missing := missing_driver()) is not None:
        raise ProviderUnavailableError(missing)
    listing = _run(["driver"])
    if isinstance(listing, str):
        raise ProviderUnavailableError(f"the NVIDIA driver does not start: {listing}; see `nvidia-smi`")
    if (wrong := wrong_cupy(listing["version"], installed_wheels())) is not None:
        raise ProviderUnavailableError(wrong)
    found = _run(["cards"])
    if isinstance(found, str):
        raise ProviderUnavailableError(f"looking for CUDA devices failed: {found}; see `nvidia-smi`")
    return tuple(_probe(entry) for entry in found)


def _probe(entry: dict[str, Any]) -> Probe:
    number, error = entry["number"], entry["error"]
    if error is not None:
        return Probe(number, None, f"cuda:{number} ({entry['description']}): {error}")
    return Probe(number, DeviceInfo(f"cuda:{number}", entry["description"], "cuda"))


def missing_driver() -> str | None:
    """Why there is no driver, or None."""
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        return (
            f"no NVIDIA driver: {DRIVER_LIBRARY} cannot be loaded ({error}); install NVIDIA's driver, see `nvidia-smi`"
        )
    return None


def installed_wheels() -> dict[str, str]:
    """CuPy's distributions for CUDA that are installed, and their versions."""
    found = {}
    for name in ("cupy", "cupy-cuda11x", *WHEELS.values()):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def wrong_cupy(driver: int, wheels: dict[str, str]) -> str | None:
    """What is wrong with the CuPy that is installed for a driver (12040: CUDA 12.4), and what to do; or None."""
    known = f"the driver knows CUDA {driver // 1000}.{driver % 1000 // 10}"
    if driver // 1000 < min(WHEELS):
        return f"the NVIDIA driver is too old: {known}, at least {min(WHEELS)}.0 is needed: update the driver"
    newest = max(major for major in WHEELS if major <= driver // 1000)
    right, extra = WHEELS[newest], f"`pip install 'llorch-provider-cupy[cuda{newest}]'`"
    if not wheels:
        return f"CuPy is not installed; {known}: {extra}, which brings {right}"
    names = ", ".join(f"{name} {version}" for name, version in wheels.items())
    if len(wheels) > 1:
        return f"{names} are installed at once and overwrite each other; {known}: uninstall all of them, then {extra}"
    ((name, version),) = wheels.items()
    wanted = next((major for major, wheel in WHEELS.items() if wheel == name), None)
    if wanted is not None and wanted > driver // 1000:
        return f"{names} is for CUDA {wanted}, {known}: `pip uninstall {name}`, then {extra}; or update the driver"
    if name == "cupy-cuda11x" or int(version.split(".")[0]) < 14:
        needed = "CuPy 14 with CUDA 12 or newer is needed"
        return f"{names} is installed, {needed}; {known}: `pip uninstall {name}`, then {extra}"
    return None


def _run(arguments: Sequence[str], command: Sequence[str] = (sys.executable, "-m", __name__)) -> Any:
    """What a probing process printed as JSON; a str is the reason why there is nothing."""
    try:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it did not answer within {TIMEOUT_SECONDS} s"
    last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    if done.returncode < 0:
        return f"it crashes ({signal.Signals(-done.returncode).name}): {last}"
    if done.returncode:
        return last
    return json.loads(done.stdout.splitlines()[-1])  # a driver may print too


# ---- the probing process ----


def _driver() -> dict[str, int]:
    """The driver's version and its number of cards."""
    library = ctypes.CDLL(DRIVER_LIBRARY)

    def call(name: str, *arguments: Any) -> None:
        if status := getattr(library, name)(*arguments):
            text = ctypes.c_char_p()
            library.cuGetErrorName(status, ctypes.byref(text))
            raise SystemExit(f"{name} says {(text.value or b'an unknown error').decode()} ({status})")

    version, count = ctypes.c_int(), ctypes.c_int()
    call("cuInit", 0)
    call("cuDriverGetVersion", ctypes.byref(version))
    call("cuDeviceGetCount", ctypes.byref(count))
    return {"version": version.value, "count": count.value}


def _cards() -> list[dict[str, Any]]:
    """Runs a kernel on each card."""
    from cupy.cuda import runtime as cuda

    try:
        count = cuda.getDeviceCount()
    except cuda.CUDARuntimeError as error:
        raise SystemExit(no_count(error.status, str(error), cuda.runtimeGetVersion())) from error
    found = []
    for number in range(count):
        properties = cuda.getDeviceProperties(number)
        capability = properties["major"], properties["minor"]
        description = (
            f"{properties['name'].decode()}, {properties['totalGlobalMem'] / 2**30:.0f} GiB, compute capability "
        )
        description += f"{capability[0]}.{capability[1]}"
        found.append({"number": number, "description": description, "error": _test(number, capability)})
    return found


def no_count(status: int, said: str, runtime: int) -> str:
    """Why CUDA gives no number of cards, and what to do. `runtime`: CuPy's, 12090 for CUDA 12.9."""
    if status != INSUFFICIENT_DRIVER:
        return said
    return (
        f"{said}: the driver is too old for CuPy's CUDA {runtime // 1000}.{runtime % 1000 // 10}: update the driver, "
        "or install a CuPy for an older CUDA"
    )


def _test(number: int, capability: tuple[int, int]) -> str | None:
    """Why this card cannot be used, or None."""
    import numpy as np

    from llorch.providers import ProviderError
    from llorch_provider_cupy import programs

    if capability < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is too old, 7.0 is the oldest that is supported"
    try:
        from llorch_provider_cupy.cupy_runtime import CupyRuntime

        runtime = CupyRuntime(number)
        host, found = np.arange(COUNT, dtype=np.float32), np.empty(COUNT, np.float32)
        memory = runtime.allocate(host.nbytes)
        runtime.upload(memory.address, host)
        function, pointer = runtime.function(programs.program("rows"), "add"), np.uint64(memory.address)
        runtime.launch(function, (1, 1, 1), 256, (pointer, pointer, pointer, np.uint64(COUNT)))
        runtime.download(found, memory.address)
        runtime.close()
    except (ProviderError, RuntimeError, MemoryError, ImportError) as error:
        return str(error)
    return None if np.array_equal(found, host + host) else "it computes x + x wrongly"


if __name__ == "__main__":
    print(json.dumps(_driver() if sys.argv[1] == "driver" else _cards()))
