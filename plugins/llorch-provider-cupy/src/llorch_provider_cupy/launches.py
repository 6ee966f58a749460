"""From a kernel of the contract to work on the stream.

A site says, for the tensors of a call, what is to be enqueued (`works`). Called directly, it enqueues that; for a plan,
`steps` gives it prepared, so that the hot loop only enqueues.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llorch.providers import OpSpec, RMSNormSpec, RopeSpec, Step
from llorch_provider_cupy.joining import Joinable
from llorch_provider_cupy.programs import Program

if TYPE_CHECKING:
    from llorch_provider_cupy.device import CudaDevice
    from llorch_provider_cupy.memory import Tensor

Work: TypeAlias = Callable[[], None]

FLAT_THREADS, ROW_THREADS = 256, 512  # as kernels/rows.cu has them


@dataclass(frozen=True)
class Shares:
    """What a site can share with its neighbours, as `Joinable` has it: of the arguments of the contract's kernel."""

    gives: Callable[..., Tensor | None] | None = None
    takes: Callable[..., Tensor | None] | None = None
    adds: Callable[..., Tensor | None] | None = None
    divides: Callable[..., Tensor | None] | None = None
    rope: RopeSpec | None = None
    norm: RMSNormSpec | None = None


class Site:
    """A kernel of the contract. Its works take the changes that what it shares brings."""

    def __init__(
        self, device: CudaDevice, spec: OpSpec, works: Callable[..., Sequence[Work]], shares: Shares | None = None
    ) -> None:
        self._device, self._spec, self._works, self.shares = device, spec, works, shares or Shares()

    def __call__(self, *args: Any) -> None:
        for work in self._works(*args):
            work()

    def steps(self, *args: Any) -> Sequence[Step]:
        """The work prepared, as one step that carries the site's spec: what it writes is there after it."""
        return [Step(self.prepared(args, {}), (), self._spec)]

    def prepared(self, args: tuple[Any, ...], changes: Mapping[str, Any]) -> Prepared:
        works = tuple(self._works(*args, **changes))
        return Prepared(self, args, changes, works, self._device.scratches())


@dataclass(frozen=True, eq=False)
class Prepared(Joinable):
    """The work of a site for the tensors of a plan. Addresses do not keep memory alive, so it does."""

    site: Site
    args: tuple[Any, ...]
    changes: Mapping[str, Any]
    works: tuple[Work, ...]
    scratches: tuple[Any, ...]

    def __call__(self) -> None:
        for work in self.works:
            work()

    @property
    def rope(self) -> RopeSpec | None:  # type: ignore[override]
        return self.site.shares.rope

    @property
    def norm(self) -> RMSNormSpec | None:  # type: ignore[override]
        return self.site.shares.norm

    def gives(self, *_args: Any) -> Tensor | None:
        return self._shared("gives")

    def takes(self, *_args: Any) -> Tensor | None:
        return None if "normed" in self.changes else self._shared("takes")

    def adds(self, *_args: Any) -> Tensor | None:
        return None if "normed" in self.changes else self._shared("adds")

    def divides(self, *_args: Any) -> Tensor | None:
        return None if "into" in self.changes else self._shared("divides")

    def _shared(self, what: str) -> Tensor | None:
        say: Callable[..., Tensor | None] | None = getattr(self.site.shares, what)
        return None if say is None else say(*self.args)

    def changed(self, **changes: Any) -> Prepared:
        return self.site.prepared(self.args, {**self.changes, **changes})


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
