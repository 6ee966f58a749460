"""From a kernel of the contract to work on the stream.

A site says, for the tensors of a call, what is to be enqueued (`works`). Called directly, it enqueues that; for a plan,
`steps` gives it prepared, so that the hot loop only enqueues.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llorch.providers import OpSpec, RopeSpec, Step
from llorch_provider_cupy.programs import Program

if TYPE_CHECKING:
    from llorch_provider_cupy.device import CudaDevice
    from llorch_provider_cupy.memory import Tensor

Work: TypeAlias = Callable[[], None]

FLAT_THREADS, ROW_THREADS = 256, 512  # as kernels/rows.cu has them


class Joinable:
    """A kernel of a plan that may do a part of its neighbour's work. Arguments are those of its entry there."""

    rope: RopeSpec | None = None  # where it rotates q and k, and does no more

    def gives(self, *_args: Any) -> Tensor | None:
        """The tensor that it can round for a product as well as write."""
        return None

    def takes(self, *_args: Any) -> Tensor | None:
        """The tensor that it rounds first."""
        return None

    def rounded(self) -> Joinable:
        """Itself, with the rounding that it gives, or without the one that it takes."""
        raise NotImplementedError

    def after(self, _rope: Joinable, *_args: Any) -> Joinable | None:
        """Itself, with the rotation right before it, which is then left out. None where it has no use for it."""
        return None


class Site:
    """A kernel of the contract.

    `gives(*args)`, `takes(*args)` as those of `Joinable`: such a site's works take `rounded=True`, and do (or leave
    out) the rounding.
    """

    def __init__(
        self,
        device: CudaDevice,
        spec: OpSpec,
        works: Callable[..., Sequence[Work]],
        *,
        gives: Callable[..., Tensor | None] | None = None,
        takes: Callable[..., Tensor | None] | None = None,
        rope: RopeSpec | None = None,
    ) -> None:
        self._device, self._spec, self._works = device, spec, works
        self.gives, self.takes, self.rope = gives, takes, rope

    def __call__(self, *args: Any) -> None:
        for work in self._works(*args):
            work()

    def steps(self, *args: Any) -> Sequence[Step]:
        """The work prepared, as one step that carries the site's spec: what it writes is there after it."""
        return [Step(self.prepared(args), (), self._spec)]

    def prepared(self, args: tuple[Any, ...], **variant: bool) -> Prepared:
        works = tuple(self._works(*args, **variant))
        return Prepared(self, args, works, self._device.scratches())


@dataclass(frozen=True)
class Prepared(Joinable):
    """The work of a site for the tensors of a plan. Addresses do not keep memory alive, so it does."""

    site: Site
    args: tuple[Any, ...]
    works: tuple[Work, ...]
    scratches: tuple[Any, ...]

    def __call__(self) -> None:
        for work in self.works:
            work()

    @property
    def rope(self) -> RopeSpec | None:  # type: ignore[override]
        return self.site.rope

    def gives(self, *_args: Any) -> Tensor | None:
        return None if self.site.gives is None else self.site.gives(*self.args)

    def takes(self, *_args: Any) -> Tensor | None:
        return None if self.site.takes is None else self.site.takes(*self.args)

    def rounded(self) -> Prepared:
        return self.site.prepared(self.args, rounded=True)


def fuse(steps: Sequence[Any]) -> dict[int, Any]:
    """The kernels of a plan's entries by their place, those that were joined with the next left out.

    Attention rotates q and k; what writes a tensor that the product right behind it takes rounds it, as nothing comes
    between the two.
    """
    kernels = {place: step.kernel for place, step in enumerate(steps)}
    pairs = list(enumerate(itertools.pairwise(steps)))
    for place, (first, second) in pairs:
        a, b = first.kernel, second.kernel
        if isinstance(a, Joinable) and isinstance(b, Joinable) and a.rope is not None:
            turning = b.after(a, *second.args)
            if turning is not None:
                del kernels[place]
                kernels[place + 1] = turning
    for place, (first, second) in pairs:
        a, b = kernels.get(place), kernels.get(place + 1)
        if not isinstance(a, Joinable) or not isinstance(b, Joinable):
            continue
        given = a.gives(*first.args)
        if given is not None and given == b.takes(*second.args):
            kernels[place], kernels[place + 1] = a.rounded(), b.rounded()
    return kernels


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
