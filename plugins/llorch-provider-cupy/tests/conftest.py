"""An emulated card for the tests: see emulator/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from emulator.provider import EmulatedProvider
from emulator.runtime import NO_COMPILER, compiler
from llorch_provider_cupy.device import CudaDevice

from llorch.providers.conformance.rig import Rig


@pytest.fixture(scope="session")
def device() -> Iterator[CudaDevice]:
    if compiler() is None:
        pytest.skip(NO_COMPILER)
    opened = EmulatedProvider().open()
    yield opened
    opened.close()


@pytest.fixture
def emulated(device: CudaDevice) -> Rig:
    return Rig(EmulatedProvider(), device)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated provider as an installed one, for the processes of these tests alone."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "cuda_emulated-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cuda-emulated\nVersion: 0\n")
    entries = ("[llorch.providers]", "cuda-emulated = emulator.provider:provider")
    entries += ("cuda-emulated-pair = emulator.provider:pair",)
    entries += ("cuda-emulated-tensor-cores = emulator.provider:tensor_cores",)
    (info / "entry_points.txt").write_text("\n".join(entries) + "\n")
    return folder
