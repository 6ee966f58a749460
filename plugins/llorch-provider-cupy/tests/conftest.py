"""An emulated card for the tests: see emulator/."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulator.provider import EmulatedProvider
from emulator.runtime import compiler
from llorch_provider_cupy.device import CudaDevice

from llorch.providers.conformance.rig import Rig

NO_COMPILER = "the emulated card needs g++: apt install g++"


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
