"""What is said where no card can be used. Drivers are stood for by libraries with the functions that are asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from llorch_provider_cupy import probe, provider

from llorch.errors import ProviderUnavailableError

DRIVER = """
extern "C" int cuInit(int) {{ {init} }}
extern "C" int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
extern "C" int cuDeviceGetCount(int *count) {{ *count = 1; return 0; }}
extern "C" int cuGetErrorName(int, const char **name) {{ *name = "CUDA_ERROR_NO_DEVICE"; return 0; }}
"""
Driver = Callable[..., None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Puts a library in the driver's place, in this process and in the probing ones."""
    if shutil.which("g++") is None:
        pytest.skip("a driver's library is made with g++: apt install g++")

    def install(version: int = 12040, init: str = "return 0;") -> None:
        library = tmp_path / "libcuda.so.1"
        source = DRIVER.format(version=version, init=init)
        subprocess.run(
            ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", library], input=source, text=True, check=True
        )
        program = f"from llorch_provider_cupy import probe; probe.DRIVER_LIBRARY = {str(library)!r}; import json, sys; "
        program += "print(json.dumps(probe._driver() if sys.argv[1] == 'driver' else probe._cards()))"
        real = probe._run
        monkeypatch.setattr(probe, "DRIVER_LIBRARY", str(library))
        monkeypatch.setattr(probe, "_run", lambda arguments: real(arguments, (sys.executable, "-c", program)))

    probe.probe_devices.cache_clear()
    yield install
    probe.probe_devices.cache_clear()


def test_no_driver_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DRIVER_LIBRARY", "libcuda-that-is-not-there.so.1")
    probe.probe_devices.cache_clear()
    with pytest.raises(ProviderUnavailableError, match=r"no NVIDIA driver: .*install NVIDIA's driver"):
        provider.devices()
    probe.probe_devices.cache_clear()


def test_a_driver_without_a_card_is_a_reason(driver: Driver) -> None:
    driver(init="return 100;")
    with pytest.raises(ProviderUnavailableError, match=r"cuInit says CUDA_ERROR_NO_DEVICE \(100\); see `nvidia-smi`"):
        provider.devices()


def test_a_driver_that_crashes_is_a_reason(driver: Driver) -> None:
    driver(init="*(volatile int *)0 = 1; return 0;")
    with pytest.raises(ProviderUnavailableError, match=r"crashes \(SIGSEGV\)"):
        provider.open()


def test_a_driver_that_is_too_old_is_a_reason(driver: Driver) -> None:
    driver(version=11080)
    with pytest.raises(ProviderUnavailableError, match=r"too old: .* CUDA 11\.8, at least 12\.0 is needed"):
        provider.devices()


@pytest.mark.parametrize(
    ("version", "wheels", "said"),
    [
        (12040, {}, r"not installed; the driver knows CUDA 12\.4: .*\[cuda12\].*cupy-cuda12x"),
        (13000, {}, r"not installed; .*13\.0: .*\[cuda13\].*cupy-cuda13x"),
        (15000, {}, r"\[cuda13\]"),
        (12040, {"cupy-cuda13x": "14.2.0"}, r"is for CUDA 13, .*12\.4: `pip uninstall cupy-cuda13x`, .*\[cuda12\]"),
        (12040, {"cupy-cuda12x": "13.6.0"}, r"13\.6\.0 is installed, CuPy 14 .* is needed"),
        (12040, {"cupy-cuda11x": "13.6.0"}, r"`pip uninstall cupy-cuda11x`"),
        (13000, {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}, r"installed at once"),
    ],
)
def test_another_cupy_than_the_driver_needs_is_a_reason(version: int, wheels: dict[str, str], said: str) -> None:
    wrong = probe.wrong_cupy(version, wheels)
    assert wrong is not None
    with pytest.raises(ProviderUnavailableError, match=said):
        raise ProviderUnavailableError(wrong)


@pytest.mark.parametrize(
    ("version", "wheel"), [(12040, "cupy-cuda12x"), (13000, "cupy-cuda12x"), (13010, "cupy-cuda13x")]
)
def test_a_cupy_that_the_driver_runs_is_right(version: int, wheel: str) -> None:
    assert probe.wrong_cupy(version, {f"cupy-cuda{wheel}": "14.2.0"}) is None


def test_a_driver_that_is_older_than_the_runtime_is_a_reason() -> None:
    said = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
    assert probe.no_count(35, said, 12090) == (
        f"{said}: the driver is too old for CuPy's CUDA 12.9: update the driver, or install a CuPy for an older CUDA"
    )
    assert probe.no_count(100, "cudaErrorNoDevice: no CUDA-capable device", 12090).startswith("cudaErrorNoDevice")


def test_importing_the_provider_loads_no_cupy() -> None:
    program = "import sys, llorch_provider_cupy; print('cupy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
