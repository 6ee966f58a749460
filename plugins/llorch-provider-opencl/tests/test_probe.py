"""A driver that crashes, hangs or fails becomes a reason. Each test runs real processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from llorch_provider_opencl import probe, provider, runtimes

from llorch.errors import ProviderUnavailableError
from llorch.providers import KeptFiles

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
LISTING = '[{"platform": 0, "device": 0, "kind": "gpu", "description": "Bad Card"}, ' + (
    '{"platform": 1, "device": 0, "kind": "cpu", "description": "Good CPU"}]'
)
Replace = Callable[[str], None]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Puts a Python program in the place of the probing process."""
    real = probe._run

    def replace(program: str) -> None:
        command = (sys.executable, "-c", program)
        monkeypatch.setattr(probe, "_run", lambda arguments: real(arguments, command))
        probe.probe_devices.cache_clear()

    yield replace
    probe.probe_devices.cache_clear()


def test_a_driver_that_crashes_when_loaded_is_a_reason(driver: Replace) -> None:
    driver(CRASH)
    with pytest.raises(ProviderUnavailableError, match=r"crashes \(SIGSEGV\).*pip install") as error:
        provider.devices()
    assert "looking for OpenCL devices failed" in str(error.value)


def test_a_device_that_crashes_leaves_the_others(driver: Replace) -> None:
    driver(
        f"import sys\nif sys.argv[1] == 'list': print('{LISTING}')\nelif sys.argv[2] == '0': {CRASH}\nelse: print(1)"
    )
    assert [info.name for info in provider.devices()] == ["cpu:0"]
    with pytest.raises(ProviderUnavailableError, match=r"gpu:0.*Bad Card.*SIGSEGV.*it has cpu:0"):
        provider.open("gpu:0")


def test_where_all_fail_every_reason_is_given(driver: Replace) -> None:
    driver(f"import sys\nif sys.argv[1] == 'list': print('{LISTING}')\nelse: raise SystemExit('no compiler')")
    with pytest.raises(ProviderUnavailableError, match=r"gpu:0 .*no compiler; cpu:0 .*no compiler"):
        provider.devices()


def test_a_driver_that_hangs_is_given_up(driver: Replace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TIMEOUT_SECONDS", 0.5)
    driver("import time; time.sleep(60)")
    with pytest.raises(ProviderUnavailableError, match="did not answer within"):
        provider.devices()


def test_no_runtime_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path))
    probe.probe_devices.cache_clear()
    try:
        with pytest.raises(ProviderUnavailableError, match="no OpenCL device is installed: install your GPU's"):
            provider.devices()
    finally:
        probe.probe_devices.cache_clear()


def test_a_missing_pyopencl_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    probe.probe_devices.cache_clear()
    with pytest.raises(ProviderUnavailableError, match="pip install --upgrade pyopencl"):
        provider.devices()


def test_importing_the_provider_loads_no_opencl() -> None:
    import subprocess

    program = "import sys, llorch_provider_opencl; print('pyopencl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- runtimes ----


@pytest.fixture
def vendors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The provider's own folder of .icd files, in a cache of the test's own."""
    monkeypatch.setattr(runtimes, "kept_files", lambda name: KeptFiles(tmp_path, ""))
    monkeypatch.setenv("OCL_ICD_VENDORS", "")  # set here, so that it is restored
    return tmp_path


def test_the_cpu_runtime_is_named_beside_the_systems(vendors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, library = vendors / "system", vendors / "libintelocl.so"
    system.mkdir()
    (system / "card.icd").write_text("libcard.so\n")
    (vendors / "gone.icd").write_text("libgone.so\n")
    monkeypatch.setattr(runtimes, "intel_library", lambda: library)
    runtimes.show_runtimes(system)
    assert os.environ["OCL_ICD_VENDORS"] == str(vendors)
    found = {path.name: path.read_text().strip() for path in vendors.glob("*.icd")}
    assert found == {"card.icd": "libcard.so", "llorch-intel.icd": str(library)}


@pytest.mark.parametrize("temporary", [True, False])
def test_where_the_cache_cannot_be_written_the_folder_is_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: bool
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path if temporary else tmp_path / "file"))
    monkeypatch.setenv("OCL_ICD_VENDORS", "")
    monkeypatch.setattr(runtimes, "intel_library", lambda: tmp_path / "libintelocl.so")
    if temporary:
        runtimes.show_runtimes(tmp_path / "no-system")
        folder = Path(os.environ["OCL_ICD_VENDORS"])
        assert folder.parent == tmp_path
        assert [path.name for path in folder.iterdir()] == ["llorch-intel.icd"]
    else:
        with pytest.raises(ProviderUnavailableError, match="set XDG_CACHE_HOME or TMPDIR"):
            runtimes.show_runtimes()


def test_a_users_own_choice_of_runtimes_stands(vendors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCL_ICD_VENDORS", "/elsewhere")
    monkeypatch.setattr(runtimes, "intel_library", lambda: vendors / "libintelocl.so")
    runtimes.show_runtimes()
    assert os.environ["OCL_ICD_VENDORS"] == "/elsewhere"


def test_without_the_cpu_runtime_the_loader_is_left_alone(vendors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "intel_library", lambda: None)
    runtimes.show_runtimes()
    assert os.environ["OCL_ICD_VENDORS"] == ""
