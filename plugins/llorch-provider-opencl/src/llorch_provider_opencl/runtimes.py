"""Which OpenCL runtimes the process sees, settled before pyopencl is imported.

pyopencl's wheels bring ocl-icd as their loader. It reads the `.icd` files of one folder: that named by
OCL_ICD_VENDORS, else /etc/OpenCL/vendors; it never merges the two. Intel's CPU runtime from PyPI (`intel-opencl-rt`)
brings an `.icd` file with the path of the machine it was built on. So where that runtime is installed, this module
keeps a folder of its own with the system's files copied beside a one-line file with the right path.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import platformdirs

from llorch.providers import ProviderUnavailableError

SYSTEM_VENDORS = Path("/etc/OpenCL/vendors")
INTEL_DISTRIBUTION, INTEL_LIBRARY = "intel-opencl-rt", "libintelocl.so"
INSTALL = (
    "install your GPU's OpenCL driver, or a CPU runtime: `pip install 'llorch-provider-opencl[cpu]'` or "
    "`apt install pocl-opencl-icd`; then see `llorch providers`"
)


def cache_folder(name: str) -> Path:
    """A folder of the provider's own below the user's cache, made if need be."""
    folder = Path(platformdirs.user_cache_dir("llorch")) / "opencl" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one: first runs of several processes may coincide."""
    path.parent.mkdir(parents=True, exist_ok=True)  # a cache may be cleared at any time
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


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
    folder = cache_folder("vendors")
    wanted = {"llorch-intel.icd": f"{library}\n".encode()}
    wanted |= {path.name: path.read_bytes() for path in system.glob("*.icd")} if system.is_dir() else {}
    for path in folder.glob("*.icd"):
        if path.name not in wanted:
            path.unlink(missing_ok=True)
    for name, content in wanted.items():
        write_atomically(folder / name, content)
    os.environ["OCL_ICD_VENDORS"] = str(folder)


def import_pyopencl() -> ModuleType:
    """pyopencl, with every runtime in sight. Raises ProviderUnavailableError where it cannot be imported."""
    if "pyopencl" not in sys.modules:
        show_runtimes()
    try:
        import pyopencl
    except ImportError as error:
        raise ProviderUnavailableError(
            f"pyopencl cannot be imported ({error}): `pip install --upgrade pyopencl`"
        ) from error
    module: ModuleType = pyopencl
    return module
