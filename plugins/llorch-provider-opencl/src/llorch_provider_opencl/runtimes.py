"""Which OpenCL runtimes the process sees, settled before pyopencl is imported.

pyopencl's wheels bring ocl-icd as their loader. It reads the `.icd` files of one folder: that named by
OCL_ICD_VENDORS, else /etc/OpenCL/vendors; it never merges the two. Intel's CPU runtime from PyPI (`intel-opencl-rt`)
brings an `.icd` file with the path of the machine it was built on. So where that runtime is installed, this module
keeps a folder of its own with the system's files copied beside a one-line file with the right path.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import platformdirs

from llorch.providers import KeptFiles, ProviderUnavailableError

SYSTEM_VENDORS = Path("/etc/OpenCL/vendors")
INTEL_DISTRIBUTION, INTEL_LIBRARY = "intel-opencl-rt", "libintelocl.so"
INSTALL = (
    "install your GPU's OpenCL driver, or a CPU runtime: `pip install 'llorch-provider-opencl[cpu]'` or "
    "`apt install pocl-opencl-icd`; then see `llorch providers`"
)


def kept_files(name: str) -> KeptFiles:
    """A folder of the provider's own below the user's cache."""
    folder = Path(platformdirs.user_cache_dir("llorch")) / "opencl" / name
    return KeptFiles(folder, "of opencl builds its kernels, for some seconds")


def intel_library() -> Path | None:
    """The CPU runtime of the extra [cpu], where it is installed."""
    try:
        files = metadata.files(INTEL_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())).resolve() for file in files if file.name == INTEL_LIBRARY)
    return next((path for path in found if path.exists()), None)


def show_runtimes(system: Path = SYSTEM_VENDORS) -> None:
    """Names a folder with every runtime's `.icd` in OCL_ICD_VENDORS; leaves a value that the user has set."""
    library = intel_library()
    if library is None or sys.platform != "linux" or os.environ.get("OCL_ICD_VENDORS"):
        return
    kept = kept_files("vendors")
    if kept.problem is not None:
        kept = KeptFiles(_temporary_folder(), "of opencl makes it")
    wanted = {"llorch-intel.icd": f"{library}\n".encode()}
    wanted |= {path.name: path.read_bytes() for path in system.glob("*.icd")} if system.is_dir() else {}
    for path in kept.folder.glob("*.icd"):
        if path.name not in wanted:
            path.unlink(missing_ok=True)
    for name, content in wanted.items():
        kept.write(name, content)
    os.environ["OCL_ICD_VENDORS"] = str(kept.folder)


def _do_without_cache() -> None:
    """pyopencl fails where its own cache cannot be written, and PoCL then finds no device."""
    os.environ.setdefault("PYOPENCL_NO_CACHE", "1")
    if "POCL_CACHE_DIR" not in os.environ:
        with contextlib.suppress(ProviderUnavailableError):  # other runtimes may need no folder
            os.environ["POCL_CACHE_DIR"] = str(_temporary_folder())


def _temporary_folder() -> Path:
    """One of this process. Raises ProviderUnavailableError where none can be made."""
    try:
        folder = tempfile.mkdtemp(prefix="llorch-opencl-")
    except OSError as error:
        raise ProviderUnavailableError(
            f"neither the user's cache nor a temporary folder can be written ({error.strerror}), which the CPU "
            "runtime needs: set XDG_CACHE_HOME or TMPDIR"
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def import_pyopencl() -> ModuleType:
    """pyopencl, with every runtime in sight. Raises ProviderUnavailableError where it cannot be imported."""
    if "pyopencl" not in sys.modules:
        if kept_files("programs").problem is not None:
            _do_without_cache()
        show_runtimes()
    try:
        import pyopencl
    except ImportError as error:
        raise ProviderUnavailableError(
            f"pyopencl cannot be imported ({error}): `pip install --upgrade pyopencl`"
        ) from error
    module: ModuleType = pyopencl
    return module
