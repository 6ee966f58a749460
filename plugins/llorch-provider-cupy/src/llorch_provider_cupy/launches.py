"""From a kernel of the contract to work on the stream.

A site says, for the tensors of a call, what is to be enqueued (`works`). Called directly, it enqueues that; for a plan,
`steps` gives it prepared, so that the hot loop only enqueues.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llorch.providers import OpSpec, Step
from llorch_provider_cupy.programs import Program

if TYPE_CHECKING:
    from llorch_provider_cupy.device import CudaDevice

Work: TypeAlias = Callable[[], None]

FLAT_THREADS, ROW_THREADS = 256, 512  # as kernels/rows.cu has them


class Site:
    """A kernel of the contract."""

    def __init__(self, device: CudaDevice, spec: OpSpec, works: Callable[..., Sequence[Work]]) -> None:
        self._device, self._spec, self._works = device, spec, works

    def __call__(self, *args: Any) -> None:
        for work in self._works(*args):
            work()

    def steps(self, *args: Any) -> Sequence[Step]:
        """The work prepared, as one step that carries the site's spec: what it writes is there after it."""
        works, kept = tuple(self._works(*args)), (args, self._device.scratches())

        def run() -> None:
            for work in works:
                work()

        run.kept = kept  # type: ignore[attr-defined]  # addresses do not keep memory alive
        return [Step(run, (), self._spec)]


class Function:
    """A kernel of a program on a device, compiled when it is made."""

    def __init__(self, device: CudaDevice, program: Program, name: str, threads: int) -> None:
        self._runtime, self._threads = device.runtime, threads
        self._function = device.runtime.function(program, name)

    def work(self, grid: Sequence[int], *arguments: int | np.generic) -> Work:
        """A launch over `grid` blocks. An int is an address; other numbers come as i32, u64 or f32 make them."""
        x, y, z = (*grid, 1, 1)[:3]
        values = tuple(np.uint64(a) if isinstance(a, int) else a for a in arguments)
        return functools.partial(self._runtime.launch, self._function, (x, y, z), self._threads, values)


i32, u64, f32 = np.int32, np.uint64, np.float32


def blocks(count: int, each: int) -> int:
    return -(-count // each)
