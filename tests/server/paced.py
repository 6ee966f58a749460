"""A provider for tests that depend on when things happen: numpy-cpu, at a pace that the environment sets.

PACED_OPEN_WHEN: a path; the device opens when it exists.
PACED_STEP_SECONDS: pause of each step.
PACED_FAIL_WHEN: a path; a step raises when it exists.
PACED_STALL_WHEN: a path; a step does not return while it exists, and makes PATH.reached.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from llorch.providers import DeviceOptions, EmbedSpec, Kernel, hookimpl
from llorch.providers.numpy_cpu import NumpyDevice, NumpyOps, NumpyProvider


def _exists(variable: str) -> bool:
    path = os.environ.get(variable)
    return path is not None and Path(path).exists()


class PacedOps(NumpyOps):
    @hookimpl
    def embed(self, spec: EmbedSpec) -> Kernel:
        plain = super().embed(spec)
        pause = float(os.environ.get("PACED_STEP_SECONDS", "0"))

        def kernel(out: Any, tokens: Any, table: Any) -> None:
            time.sleep(pause)
            while _exists("PACED_STALL_WHEN"):
                Path(f"{os.environ['PACED_STALL_WHEN']}.reached").touch()
                time.sleep(0.02)
            if _exists("PACED_FAIL_WHEN"):
                raise RuntimeError("the kernel was told to fail")
            plain(out, tokens, table)

        return kernel


class PacedProvider(NumpyProvider):
    name = "paced"
    summary = "numpy-cpu at a set pace, for tests"
    priority = -1

    def open(self, device: str | None = None, options: DeviceOptions | None = None) -> NumpyDevice:
        while "PACED_OPEN_WHEN" in os.environ and not _exists("PACED_OPEN_WHEN"):
            time.sleep(0.02)
        return super().open(device, options)

    def operations(self) -> PacedOps:
        return PacedOps()


provider = PacedProvider()
