"""Tests that need a device skip with the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llorch_provider_opencl import provider

from llorch.errors import ProviderUnavailableError


@pytest.fixture(scope="session")
def device() -> Iterator[Any]:
    try:
        opened = provider.open()
    except ProviderUnavailableError as error:
        pytest.skip(f"no OpenCL device: {error}")
    yield opened
    opened.close()
