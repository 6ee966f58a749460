"""Plugins as pip would leave them: a module and a dist-info folder on the path."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path

from llorch.providers import API_VERSION

WORKING = """
from llorch.providers import DeviceInfo, ProviderUnavailableError

class Provider:
    name = {name!r}
    summary = "a provider of the tests"
    requires = "a test"
    api_version = {api_version}
    priority = {priority}
    batch_invariant = True

    def devices(self):
        {devices}

    def open(self, device=None, options=None):
        raise NotImplementedError

    def operations(self):
        from llorch.providers.numpy_cpu import NumpyOps

        return NumpyOps()

provider = Provider()
"""


def source(
    name: str,
    *,
    priority: int = 10,
    api_version: int = API_VERSION,
    devices: str = "return [DeviceInfo('dev:0', 'a device', 'cpu')]",
) -> str:
    """A module with a well-formed provider."""
    return WORKING.format(name=name, priority=priority, api_version=api_version, devices=devices)


def install(
    site: Path,
    name: str,
    module: str,
    *,
    distribution: str | None = None,
    version: str = "1.0",
    target: str = "provider",
) -> None:
    """Puts a distribution with one provider into a folder; `module` is its source."""
    distribution = distribution or f"llorch-provider-{name}"
    package = distribution.replace("-", "_")
    (site / f"{package}.py").write_text(textwrap.dedent(module))
    info = site / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[llorch.providers]\n{name} = {package}:{target}\n")
    importlib.invalidate_caches()
